"""Backend `cpu/numba`: paged attention on any CPU, for every feature of the contract."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

import numpy as np

import attn_dispatch
from attn_dispatch import AttentionMetadata, AttentionSpec
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.contract import HND, Array, CacheLayout, register_layout
from attn_dispatch.contract.dtypes import is_quantised, numpy_dtype

HND_SCALED = register_layout(CacheLayout("HND+scales", HND.arrays, per_token_scales=True))
"""The order of HND, with a scale per token and kv head beside the elements."""

MAX_HEAD_SIZE = 576  # what latent attention needs (512 of the latent, 64 rotary)
_X86_FLAGS = ("avx2", "fma", "f16c")
_STORED = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")

LINE_BYTES = 64  # rows that begin with a cache line are not read as two
HUGE_PAGE_BYTES = 1 << 21
HUGE_PAGES_FROM_BYTES = 1 << 22  # from this size on NumPy asks the system for huge pages


class NumbaBackend(Backend):
    """Attention compiled for this CPU by Numba."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        libraries=("numpy", "torch"), nan_safe=True, cache_views="strided"
    )

    def __init__(self, name: str = "cpu/numba") -> None:
        super().__init__(name)

    def probe(self) -> Availability:
        """Numba is a dependency of this distribution: what could be missing is its wheel for this machine."""
        try:
            numba_version = version("numba")
        except PackageNotFoundError:
            return Availability(False, "the package numba is not installed", "pip install numba")
        facts = attn_dispatch.platform.facts
        missing = [flag for flag in _X86_FLAGS if flag not in facts["cpu_flags"]]
        if facts["machine"] in ("x86_64", "AMD64") and facts["cpu_flags"] and missing:
            reason = f"this CPU lacks {', '.join(missing)}, which x86 has had since 2013"
            return Availability(False, reason, version=numba_version)
        return Availability(True, f"compiled for this CPU by Numba {numba_version}", version=numba_version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but float64, packed integer caches, and blocks that are not a multiple of 8."""
        refusals = []
        if spec.dtype == "float64":
            refusals.append(Refusal("dtype", spec.dtype, "takes float32, float16, bfloat16", "Use float32"))
        if spec.kv_cache_dtype not in _STORED:
            refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, f"stores {', '.join(_STORED)}", "Use int8"))
        if spec.block_size % 8:
            refusals.append(Refusal("block_size", spec.block_size, "needs a multiple of 8", "Ask for block_size=32"))
        for name, size in (("head_size", spec.head_size), ("value_head_size", spec.value_head_size)):
            if size > MAX_HEAD_SIZE:
                refusals.append(Refusal(name, size, f"goes up to {MAX_HEAD_SIZE}"))
        return self.refuse(*refusals)

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """HND, with scales beside it where the cache is quantised."""
        return HND_SCALED if is_quantised(spec.kv_cache_dtype) else HND

    def code_paths(self) -> dict[str, str]:
        """Return, for each type of queries and cache, which instructions compute it and why; for `doctor`."""
        from attn_dispatch_cpu.code_path import describe

        return describe()

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed NumPy array that begins with a cache line, a large one with a huge page."""
        element = numpy_dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * element.itemsize
        unit = HUGE_PAGE_BYTES if size >= HUGE_PAGES_FROM_BYTES else LINE_BYTES
        memory = np.zeros(size + unit, np.uint8)
        start = -memory.ctypes.data % unit
        return memory[start : start + size].view(element).reshape(shape)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Cut the step into work for the threads."""
        from attn_dispatch_cpu.numba_call import make_plan

        return make_plan(spec, metadata.view(spec.kind))

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write the new keys and values, then attend."""
        from attn_dispatch_cpu.numba_call import run

        return run(call)


__all__ = ["HND_SCALED", "NumbaBackend"]
