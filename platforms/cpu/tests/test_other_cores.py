"""Other cores than this one: AVX2 is run here, through Numba's name of a CPU; NEON is compiled and looked at."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
RUN = """
from attn_dispatch.conformance import Case, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry
from attn_dispatch_cpu.code_path import path_of
from attn_dispatch_cpu.kernels.isa import host_isa
assert (host_isa().name, host_isa().lanes) == ("avx2", 8)
assert path_of("bfloat16", "bfloat16") == "fma"
spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=72, sinks=True, logits_soft_cap=2.0, window=(20, 0))
result = run_case(registry().load("cpu/numba"), Case("avx2", "avx2", spec, (300, 9, 0), (1, 2, 40)))
assert result.verdict, str(result.verdict)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not run: not an x86 CPU")
def test_avx2() -> None:
    subprocess.run([sys.executable, "-c", RUN], env=os.environ | AVX2, check=True, timeout=300)


NEON = """
from attn_dispatch_cpu.kernels import isa
neon = isa.Isa("neon", 4, 4, 4, 4, bf16_dot=True, amx=False)
isa.host_isa = lambda: neon
"""
COMPILE = """
import re, sys
import llvmlite.binding as llvm
from attn_dispatch_cpu.kernels.build import compile_module
from attn_dispatch_cpu.kernels.vector import Emit
name, path = sys.argv[1:]
stand_in = "stand_in_of_bfdot"  # Numba cannot compile ARM's own instruction for this CPU
call = Emit._call
llvm.add_symbol(stand_in, 4096)  # never called
Emit._call = lambda e, name, *rest: call(e, stand_in if "bfdot" in name else name, *rest)
text = str(compile_module(name, 2, path, "kernel")).replace(stand_in, "llvm.aarch64.neon.bfdot.v4f32.v8bf16")
triple = "aarch64-unknown-linux-gnu"
text = re.sub("target triple = .*", f'target triple = "{triple}"', re.sub("target datalayout = .*", "", text))
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
cores = ("neoverse-v1", "neoverse-v2", "apple-m2") if path == "bf16-dot" else ("neoverse-n1", "neoverse-v1", "apple-m1")
for core in cores:
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=core, opt=3)
    print("CORE", core)
    print(machine.emit_assembly(llvm.parse_assembly(text)))
"""


@pytest.mark.parametrize(
    ("name", "path", "least", "most_spills"),
    [("decode", "fma", 200, 100), ("decode", "bf16-dot", 80, 200), ("prefill", "bf16-dot", 60, 200)],
)
def test_neon(name: str, path: str, least: int, most_spills: int) -> None:
    """Compiled for ARM: products and sums in one instruction, with few vectors spilled to the stack."""
    program = [sys.executable, "-c", NEON + COMPILE, name, path]
    out = subprocess.run(program, capture_output=True, text=True, check=True, timeout=300)
    cores = out.stdout.split("CORE ")[1:]
    assert len(cores) == 3
    instruction = r"\bfmla\s+v\d+\.4s" if path == "fma" else r"\bbfdot\s+v\d+\.4s"
    for text in cores:
        assert len(re.findall(instruction, text)) >= least, text[:20]
        assert len(re.findall(r"\b(?:str|ldr)\s+q\d+, \[sp", text)) <= most_spills, text[:20]


BFDOT = """
from attn_dispatch_cpu.kernels.vector import F32, I32, Emit, vec
def dot(e, acc, a, b):
    # What BFDOT computes, four lanes wide, in multiply-adds.
    assert acc.type.count == 4
    words, row = vec(I32, 4), vec(F32, 4)
    a, b = e.b.bitcast(a, words), e.b.bitcast(b, words)
    for half in (lambda x: e.b.shl(x, e.consti(16, 4)), lambda x: e.b.and_(x, e.consti(-65536, 4))):
        acc = e.fma(e.b.bitcast(half(a), row), e.b.bitcast(half(b), row), acc)
    return acc
Emit.dot_bf16 = dot
from attn_dispatch.conformance import Case, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry
from attn_dispatch_cpu.code_path import path_of
assert path_of("bfloat16", "bfloat16") == "bf16-dot"
for sizes in ((64, 64), (33, 9)):
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=sizes[0], value_head_size=sizes[1], window=(20, 0))
    result = run_case(registry().load("cpu/numba"), Case("neon", "neon", spec, (300, 9, 0), (1, 2, 40)))
    assert result.verdict, str(result.verdict)
"""


def test_neon_with_the_dot_product(tmp_path: Path) -> None:
    """ARM's tiles of four lanes, run here: only the instruction itself is put together from others."""
    environment = os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(tmp_path), "ATTN_DISPATCH_CPU_CODE_PATH": "bf16-dot"}
    subprocess.run([sys.executable, "-c", NEON + BFDOT], env=environment, check=True, timeout=300)
