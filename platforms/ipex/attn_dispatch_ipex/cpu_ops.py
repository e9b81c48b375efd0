"""IPEX's CPU ops, called so that none of their faults can be reached. Imports torch and IPEX.

What the ops take on trust, and what is therefore done here:
- tables, lengths and slots are int32 and contiguous (others are read as if they were);
- no slot is -1 (the process aborts), no sequence is empty (NaN), no slot is beyond int32;
- the heads of a query lie together, and so do its elements (strides of the two are ignored);
- float32 is rounded to fp8 twice on its way into the cache, and too large numbers become infinity: torch stores fp8.

With four or more leading sequences that share their first block (a shared prefix) the decode op takes them for a beam
search and chooses a kernel that always raises "Sliding window unsupported". The environment variable
PAGED_ATTENTION_SINGLE_QUERY_KERNEL=1, read by the op at each call, names the other kernel. It is set for the process
when this module is imported, and again by `CpuPlan` should somebody have changed it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import intel_extension_for_pytorch as ipex
import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.backend import Plan
from attn_dispatch.contract import Array, KVCache, LayerParameters
from attn_dispatch.contract.dtypes import FINITE_MAX
from attn_dispatch.errors import ArrayError, CacheError
from attn_dispatch_ipex.steps import OneTokenStep, Rows, Steps, VarlenStep, cut, direct_pages, route

__all__ = ["CpuPlan", "indexable_view", "run", "zeros"]

_PAGED = ipex.llm.modules.PagedAttention
_KERNEL, _FLASH_DECODING = "PAGED_ATTENTION_SINGLE_QUERY_KERNEL", "1"
_E5M2 = torch.float8_e5m2
_SLOT_LIMIT = 1 << 31
_DIRECT_BLOCK = 128
"""Block size of the pages that keys and values without a cache are put into."""

_NO_MAPPING = torch.zeros(1, dtype=torch.int32)
"""Which kv head a query head reads: an argument that the decode op ignores."""


def zeros(shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
    """Return a zeroed tensor in host memory."""
    if device is not None and torch.device(device).type != "cpu":
        raise CacheError(f"device={device!r}: this backend computes on the CPU, and so do its caches")
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def indexable_view(array: Array) -> Array:
    """Return a view that torch can index."""
    return array.view(torch.uint8) if array.dtype == _E5M2 else array


@dataclass(frozen=True, eq=False)
class _Step:
    """A step of `steps` as tensors."""

    rows: slice | Array
    arrays: tuple[Array, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A batch as tensors: what `steps.Steps` says, and where new keys and values go."""

    one_token: _Step | None
    varlen: _Step | None
    idle: slice | Array | None
    written: Array | None  # i64, rows of k and v that are written (None: all)
    slots: Array  # i32[rows that are written]
    block_size: int
    num_blocks: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class CpuPlan(Plan):
    """A plan over the cache's pages. `direct` is the same batch over pages of its own, for encoders without a cache."""

    paged: _Prepared = field(init=False)
    _direct: _Prepared | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # (Dataclasses with slots are made anew: `super()` without arguments would look for the old class.)
        Plan.__post_init__(self)
        _pin_kernel()
        spec, side = self.spec, self.view.side
        if side.num_written and (side.highest_block + 1) * spec.block_size > _SLOT_LIMIT:
            raise CacheError(
                f"block {side.highest_block} of {spec.block_size} tokens: slots of {_SLOT_LIMIT} and more do not fit "
                f"IPEX's 32-bit slots. Use blocks below {_SLOT_LIMIT // spec.block_size}"
            )
        tables = side.table
        ops = route(spec, spec.block_size, spec.kv_cache_dtype)
        reads = side.has_blocks or spec.kind != "encoder"
        steps = cut(spec, self.view, tables, spec.block_size, ops) if reads else Steps(None, None, None)
        self.paged = _prepare(steps, side.slots, spec.block_size)

    @property
    def direct(self) -> _Prepared:
        """The batch over pages of its own, made when first wanted."""
        if self._direct is None:
            spec, size = self.spec, _DIRECT_BLOCK
            tables, slots, num_blocks = direct_pages(self.view, size)
            steps = cut(spec, self.view, tables, size, route(spec, size, spec.dtype))
            self._direct = _prepare(steps, slots, size, num_blocks)
        return self._direct


def _pin_kernel() -> None:
    if os.environ.get(_KERNEL) != _FLASH_DECODING:
        os.environ[_KERNEL] = _FLASH_DECODING


_pin_kernel()


def _prepare(steps: Steps, slots: npt.NDArray[Any], block_size: int, num_blocks: int = 0) -> _Prepared:
    written = np.flatnonzero(slots >= 0)
    everything = len(written) == len(slots)
    return _Prepared(
        one_token=_one_token(steps.one_token),
        varlen=_varlen(steps.varlen),
        idle=None if steps.idle is None else _as_index(steps.idle),
        written=None if everything else torch.from_numpy(written),
        slots=torch.from_numpy((slots if everything else slots[written]).astype(np.int32)),
        block_size=block_size,
        num_blocks=num_blocks,
    )


def _as_index(rows: Rows) -> slice | Array:
    return rows if isinstance(rows, slice) else torch.from_numpy(rows)


def _one_token(step: OneTokenStep | None) -> _Step | None:
    if step is None:
        return None
    return _Step(_as_index(step.rows), tuple(map(torch.from_numpy, (step.tables, step.lens))), (step.longest,))


def _varlen(step: VarlenStep | None) -> _Step | None:
    if step is None:
        return None
    arrays = tuple(map(torch.from_numpy, (step.query_start, step.kv_start, step.tables)))
    return _Step(_as_index(step.rows), arrays, (step.longest_query, step.longest))


def run(
    plan: CpuPlan,
    q: Array,
    k: Array | None,
    v: Array | None,
    cache: KVCache | None,
    layer: LayerParameters,
    out: Array | None,
) -> Array:
    """Write the new keys and values, then attend. Arguments as in `Backend.run`."""
    spec = plan.spec
    if q.device.type != "cpu":
        raise ArrayError(f"q is on {q.device}: this backend computes on the CPU. Give it q.cpu(), or use torch/sdpa")
    if out is None:
        out = torch.empty((plan.num_tokens, spec.num_heads, spec.value_head_size), dtype=q.dtype)
    if cache is not None:
        prepared = plan.paged
        arrays = cache.arrays_as("torch")
        key, value = arrays["key"], arrays["value"]
    else:
        prepared = plan.direct
        shape = (prepared.num_blocks, spec.num_kv_heads, prepared.block_size, spec.head_size)
        key, value = torch.empty(shape, dtype=q.dtype), torch.empty(shape, dtype=q.dtype)
    if k is not None and v is not None and prepared.slots.numel():
        _write(prepared, k, v, key, value, layer)
    _attend(plan, prepared, q, key, value, layer, out)
    return out


def _write(prepared: _Prepared, k: Array, v: Array, key: Array, value: Array, layer: LayerParameters) -> None:
    if prepared.written is not None:
        k, v = k.index_select(0, prepared.written), v.index_select(0, prepared.written)
    if key.dtype == _E5M2:
        slots = prepared.slots.long()
        block, offset = slots // prepared.block_size, slots % prepared.block_size
        for rows, pages, scale in ((k, key, layer.k_scale), (v, value, layer.v_scale)):
            pages.view(torch.uint8)[block, :, offset] = _to_e5m2(rows, scale).view(torch.uint8)
        return
    if k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    _PAGED.reshape_and_cache(k, v, key, value, prepared.slots)


def _to_e5m2(x: Array, scale: float) -> Array:
    limit = FINITE_MAX["float8_e5m2"]
    return (x.float() / scale).clamp_(-limit, limit).to(_E5M2)


def _attend(
    plan: CpuPlan, prepared: _Prepared, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array
) -> None:
    q = q if _heads_lie_together(q) else q.contiguous()
    target = out if _heads_lie_together(out) else torch.empty(out.shape, dtype=out.dtype)
    if prepared.idle is not None:
        target[prepared.idle] = 0
    for step, op in ((prepared.one_token, _decode), (prepared.varlen, _prefill)):
        if step is None:
            continue
        if isinstance(step.rows, slice):
            op(plan, step, q[step.rows], key, value, layer, target[step.rows])
        else:
            part = torch.empty((len(step.rows), *out.shape[1:]), dtype=out.dtype)
            op(plan, step, q.index_select(0, step.rows), key, value, layer, part)
            target.index_copy_(0, step.rows, part)
    if key.dtype == _E5M2 and layer.v_scale != 1.0:
        target.mul_(layer.v_scale)
    if target is not out:
        out.copy_(target)


def _heads_lie_together(x: Array) -> bool:
    return bool(x.is_contiguous() or (x.stride(2) == 1 and x.stride(1) == x.shape[2]))


def _decode(plan: CpuPlan, step: _Step, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array) -> None:
    spec = plan.spec
    tables, lens = step.arrays
    slopes: Any = None
    if layer.alibi_slopes is not None:
        slopes = layer.memoize(__name__, lambda: torch.tensor(layer.alibi_slopes))
    _PAGED.single_query_cached_kv_attention(
        out,
        q,
        key,
        value,
        _NO_MAPPING,
        _scale(spec.scale, key, layer),
        tables,
        lens,
        key.shape[2],
        step.lengths[0],
        slopes,
        window_size=spec.window[0] + 1 if spec.window[0] >= 0 else -1,  # of tokens, the query's own included
        softcap=spec.logits_soft_cap or -1.0,
    )


def _prefill(
    plan: CpuPlan, step: _Step, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array
) -> None:
    spec = plan.spec
    query_start, kv_start, tables = step.arrays
    _PAGED.flash_attn_varlen_func(
        out,
        q,
        key,
        value,
        query_start,
        kv_start,
        step.lengths[0],
        step.lengths[1],
        _scale(spec.scale, key, layer),
        spec.causal,
        tables,
        None,
        window_size_left=spec.window[0],  # of tokens before the query's own
        window_size_right=spec.window[1],
        kv_cache_dtype="fp8_e5m2" if key.dtype == _E5M2 else "auto",
        softcap=spec.logits_soft_cap or -1.0,
    )


def _scale(scale: float, key: Array, layer: LayerParameters) -> float:
    return scale * layer.k_scale if key.dtype == _E5M2 else scale
