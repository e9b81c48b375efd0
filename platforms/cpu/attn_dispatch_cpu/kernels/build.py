"""Kernels by name: the Python function that Numba is to compile, and its LLVM IR. Imported only to compile."""

from __future__ import annotations

import re
from typing import Any

import llvmlite.binding as llvm
from numba import cfunc, int64, void

from attn_dispatch_cpu.kernels.amx_decode import make_amx_decode_kernel
from attn_dispatch_cpu.kernels.amx_prefill import make_amx_prefill_kernel
from attn_dispatch_cpu.kernels.calls import guarded
from attn_dispatch_cpu.kernels.decode import make_decode_kernel
from attn_dispatch_cpu.kernels.isa import host_isa, target_machine
from attn_dispatch_cpu.kernels.merge import make_merge_kernel
from attn_dispatch_cpu.kernels.prefill import make_prefill_kernel
from attn_dispatch_cpu.kernels.rate import make_rate_kernel
from attn_dispatch_cpu.kernels.wait import make_wait_kernel
from attn_dispatch_cpu.kernels.write import make_write_kernel

# No flag that lets LLVM assume NaN or infinity away: masked rows and empty rows depend on them.
OPTIONS = {"nopython": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}


def make_function(name: str, kind: int, path: str) -> Any:
    """Return the function of a kernel; see `machine_code.kernel` for the arguments."""
    isa = host_isa()
    dot = path == "bf16-dot"
    if name in ("decode", "prefill") and path.startswith("amx"):
        make_amx_kernel = make_amx_decode_kernel if name == "decode" else make_amx_prefill_kernel
        return guarded(make_amx_kernel(isa, kind, emulated=path == "amx-emulated"))
    if name == "wait":
        return make_wait_kernel()
    if name == "rate":
        return make_rate_kernel(isa, path)
    if name == "decode":
        return guarded(make_decode_kernel(isa, kind, dot))
    if name == "prefill":
        return guarded(make_prefill_kernel(isa, kind, dot))
    if name == "write":
        return guarded(make_write_kernel(isa, kind))
    return guarded(make_merge_kernel(isa))


def compile_module(name: str, kind: int, path: str, symbol: str) -> llvm.ModuleRef:
    """Return a kernel's optimised module; its only external function is `void symbol(i64, i64, i64)`.

    Raises:
        RuntimeError: Numba's functions are not called as they were when this was written.
    """
    compiled = cfunc(void(int64, int64, int64), **OPTIONS)(make_function(name, kind, path))
    # Numba's own C function reports Python exceptions, which needs Numba at run time; no kernel raises any. So it is
    # left out, and the function beneath it called: `i32 (return value*, exception**, arguments...)`.
    native = compiled.native_name.removeprefix("cfunc.")
    text = compiled.inspect_llvm()
    parameters = r"\(ptr [^,]*, ptr [^,]*, i64 [^,]*, i64 [^,]*, i64 [^,)]*\)"
    if not re.search(rf'define [^@]*i32 @"?{re.escape(native)}"?{parameters}', text):
        raise RuntimeError(
            "this release of Numba calls compiled functions in a way that attn-dispatch-cpu does not know; "
            "install an earlier one (the newest known: see the dependencies of attn-dispatch-cpu)"
        )
    module = llvm.parse_assembly(text)
    entry = f"""
        declare i32 @"{native}"(ptr, ptr, i64, i64, i64)
        define void @{symbol}(i64 %arguments, i64 %call, i64 %worker) {{
            %result = alloca ptr
            %exception = alloca ptr
            %status = call i32 @"{native}"(ptr %result, ptr %exception, i64 %arguments, i64 %call, i64 %worker)
            ret void
        }}"""
    module.link_in(llvm.parse_assembly(entry))
    for function in module.functions:
        if not function.is_declaration and function.name != symbol:
            function.linkage = llvm.Linkage.internal
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(target_machine(), llvm.create_pipeline_tuning_options()))
    return module
