"""Backend `cpu/numba`: paged attention on any CPU, for every feature of the contract."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

import attn_dispatch
from attn_dispatch import AttentionMetadata, AttentionSpec
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.contract import HND, Array, CacheLayout, register_layout
from attn_dispatch.contract.dtypes import is_quantised, numpy_dtype

if TYPE_CHECKING:
    from attn_dispatch_cpu.planning import Work

HND_SCALED = register_layout(CacheLayout("HND+scales", HND.arrays, per_token_scales=True))
"""The order of HND, with a scale per token and kv head beside the elements."""

MAX_HEAD_SIZE = 576  # what latent attention needs (512 of the latent, 64 rotary)
_X86_FLAGS = ("avx2", "fma", "f16c")
_STORED = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")


@dataclass(slots=True, eq=False, kw_only=True)
class NumbaPlan(Plan):
    """A step cut into work, for each way that its keys can lie (in a cache, or for an encoder one after the other)."""

    threads: int
    template: npt.NDArray[np.int64]
    kept: list[npt.NDArray[Any]]
    table_at: int
    work: dict[bool, list[Work]] = field(default_factory=dict)


class NumbaBackend(Backend):
    """Attention compiled for this CPU by Numba."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("numpy", "torch"), nan_safe=True)

    def __init__(self, name: str = "cpu/numba") -> None:
        super().__init__(name)

    def probe(self) -> Availability:
        """Numba is a dependency of this distribution: what could be missing is its wheel for this machine."""
        try:
            found = version("numba")
        except PackageNotFoundError:
            return Availability(False, "the package numba is not installed", "pip install numba")
        facts = attn_dispatch.platform.facts
        missing = [flag for flag in _X86_FLAGS if flag not in facts["cpu_flags"]]
        if facts["machine"] in ("x86_64", "AMD64") and facts["cpu_flags"] and missing:
            reason = f"this CPU lacks {', '.join(missing)}, which x86 has had since 2013"
            return Availability(False, reason, version=found)
        return Availability(True, f"compiled for this CPU by Numba {found}", version=found)

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

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed NumPy array."""
        return np.zeros(shape, numpy_dtype(dtype))

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> NumbaPlan:
        """Cut the step into work for the threads."""
        from attn_dispatch_cpu.running import address, prepare, work_of
        from attn_dispatch_cpu.threads import num_threads

        view = metadata.view(spec.kind)
        template, kept = prepare(spec, view)
        plan = NumbaPlan(
            spec=spec, view=view, threads=num_threads(), template=template, kept=kept, table_at=address(kept[0])
        )
        if view.side.has_blocks:
            work_of(plan, in_blocks=True)
        return plan

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write the new keys and values, then attend."""
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out, return_lse = call.cache, call.layer, call.out, call.return_lse
        from attn_dispatch_cpu.running import Runner

        assert isinstance(plan, NumbaPlan)
        spec = plan.spec
        shape = (plan.num_tokens, spec.num_heads, spec.value_head_size)
        result = _empty(q, shape) if out is None else out
        target = result if out is None or _rows_are_dense(out) else _empty(q, shape)
        lse = _empty(q, shape[:2], "float32") if return_lse else None
        runner = Runner(plan, layer)
        runner.give(q, target, lse)
        if cache is not None:
            runner.give_cache(cache)
            if k is not None and v is not None:
                runner.write(k, v)
        else:
            assert k is not None
            assert v is not None
            runner.give_rows(k, v)
        runner.attend()
        if target is not result:
            result[...] = target
        return result if lse is None else (result, lse)


def _empty(like: Array, shape: tuple[int, ...], dtype: str = "") -> Array:
    """Return a new array of the library that `like` is of, and of its dtype unless another is named."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype or like.dtype)
    torch = sys.modules["torch"]
    if not dtype and like.shape == shape and like.is_contiguous():
        return torch.empty_like(like, requires_grad=False)  # half of what asking with a shape costs
    return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype)


def _rows_are_dense(array: Array) -> bool:
    step = array.strides[-1] == array.itemsize if isinstance(array, np.ndarray) else array.stride(-1) == 1
    return bool(step)


__all__ = ["HND_SCALED", "NumbaBackend", "NumbaPlan"]
