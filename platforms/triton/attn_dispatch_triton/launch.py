"""From torch tensors to kernels: a step on a device, the cache's memory, and the launches of one layer."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache as memoised
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from attn_dispatch.contract import AttentionSpec, BatchView, KVCache, LayerParameters
from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised
from attn_dispatch.errors import CacheError

from . import kernels
from .constants import attend_constants, pass_constants, tile_sizes
from .fixed_maximum import fixed_maximum, level_constants
from .packing import Packed
from .planning import I32, Work, longest_span, num_splits, split_work, tiles_of
from .targets import INTERPRETER, Target, target_of
from .tiles import Tiles, decode_tiles, padded, prefill_tiles

__all__ = ["INTERPRETED", "Owned", "Step", "Store", "owned", "run", "step_on"]

INTERPRETED = isinstance(kernels.prefill, InterpretedFunction)
"""Triton was told to interpret before the kernels were imported."""

_LANGUAGE = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WRITE_ROWS = 64 if INTERPRETED else 16
_interpreter = threading.Lock()  # it keeps the program that it is in in a global


class Store:
    """A cache's two arrays as kernels take them: contiguous, fp8 as bytes."""

    __slots__ = ("dtype", "key", "value")

    def __init__(self, cache: KVCache) -> None:
        arrays = cache.arrays_as("torch")
        for name, array in arrays.items():
            if not array.is_contiguous():
                raise CacheError(f"the cache's {name} array has strides {array.stride()}: kernels need it contiguous")
        self.dtype: torch.dtype = arrays["key"].dtype
        self.key, self.value = (
            arrays[name].view(torch.uint8) if self.dtype in _FP8 else arrays[name] for name in ("key", "value")
        )


@dataclass(frozen=True, eq=False, slots=True)
class Owned:
    """What a layer owns, as kernels take it. The scales of a quantised cache are factors of scores and of outputs."""

    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    k_scale: float
    v_scale: float
    k_scale_there: torch.Tensor | None
    v_scale_there: torch.Tensor | None


def owned(spec: AttentionSpec, layer: LayerParameters, device: torch.device) -> Owned:
    """Bring what a layer owns to a device."""

    def there(value: Any) -> torch.Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.float32, device=device)

    with torch.inference_mode(False):
        return Owned(
            there(layer.alibi_slopes),
            there(layer.sinks),
            layer.k_scale,
            layer.v_scale,
            there(layer.k_scale) if layer.k_scale != 1 else None,
            there(layer.v_scale) if layer.v_scale != 1 else None,
        )


@dataclass(frozen=True, eq=False, slots=True)
class Launch:
    """One kernel over some tiles.

    Attributes:
        tiles: their sizes.
        sequence, row: i32[tiles], see `planning.Work`.
        splits: parts that keys are cut into; 1: `prefill` computes the result at once.
        constants: the kernel's compile-time arguments.
    """

    tiles: Tiles
    sequence: torch.Tensor
    row: torch.Tensor
    splits: int
    constants: Mapping[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A batch on a device: every layer of a spec runs it.

    Attributes:
        spec: the layers.
        num_tokens: T.
        packed: everything below, in one buffer.
        slots: i64[rows]; None when nothing is written.
        query_start, kv_lens, key_start: i32[S + 1], i32[S], i32[S + 1].
        table: i32[S, M].
        launches: one for the sequences that are decoded, one for the others.
    """

    spec: AttentionSpec
    num_tokens: int
    packed: Packed
    slots: torch.Tensor | None
    query_start: torch.Tensor
    kv_lens: torch.Tensor
    key_start: torch.Tensor
    table: torch.Tensor
    launches: tuple[Launch, ...]

    def renew(self, view: BatchView) -> None:
        """Bring a batch of the same shape into this step's buffers; what tiles are made of stays as it is."""
        arrays = [*_of_batch(view, self.table.shape[1]), *self.packed.arrays[4:]]
        self.packed.renew(arrays, None if self.slots is None else view.side.slots)


@memoised
def _machine(device: torch.device) -> tuple[Target, int]:
    """Return what a device is, and how many processors it has."""
    if INTERPRETED:
        return INTERPRETER, 32  # as many as make short sequences be split
    with _on(device):
        found = triton.runtime.driver.active.get_current_target()
    facts = getattr(torch, device.type).get_device_properties(device)
    processors = getattr(facts, "multi_processor_count", 0) or getattr(facts, "gpu_subslice_count", 0) or 64
    return target_of(found.backend, found.arch, found.warp_size), processors


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return context


def step_on(
    spec: AttentionSpec, view: BatchView, device: torch.device, paged: bool, capacity: int | None = None
) -> Step:
    """Cut a batch into tiles and bring all that kernels read of it to a device, in one copy.

    Args:
        spec: the layers.
        view: the batch.
        device: where the tensors are.
        paged: keys are in a cache.
        capacity: keys that a sequence may have when the step is renewed; None: it is for this batch alone.

    Raises:
        EnvironmentVariableError: `fixed_maximum.VARIABLE` is not a number.
    """
    target, processors = _machine(device)
    level = fixed_maximum()
    decoded, prefilled = split_work(view)
    longest = int(view.query_lens[decoded].max(initial=1)) * spec.group_size
    sizes = tile_sizes(spec, paged)
    parts: list[tuple[Work, Tiles, int]] = []
    if len(decoded):
        tiles = decode_tiles(target, *sizes, longest)
        work = tiles_of(decoded, view, spec.group_size, tiles.rows)
        programs = len(work) * spec.num_kv_heads
        span = longest_span(decoded, view, spec, capacity)
        parts.append((work, tiles, num_splits(span, tiles.keys, programs, processors)))
    if len(prefilled):
        tiles = prefill_tiles(target, *sizes)
        parts.append((tiles_of(prefilled, view, spec.group_size, tiles.rows), tiles, 1))
    width = view.side.table.shape[1] if capacity is None else -(-capacity // spec.block_size)
    arrays = _of_batch(view, width)
    arrays += [array for work, _, _ in parts for array in (work.sequence, work.row)]
    # What a renewed step writes is not known: a slot of -1 is not written.
    writes = paged and spec.writes_kv and (view.side.num_written > 0 or (capacity is not None and view.num_new > 0))
    packed = Packed(arrays, view.side.slots if writes else None, device)
    there = packed.tensors
    launches = tuple(
        Launch(
            tiles,
            there[4 + 2 * i],
            there[5 + 2 * i],
            splits,
            {
                **_constants(spec, paged),
                **pass_constants(spec, tiles),
                **(level_constants(spec, paged, level) if splits > 1 else {}),
            },
        )
        for i, (_, tiles, splits) in enumerate(parts)
    )
    query_start, kv_lens, key_start, table = there[:4]
    return Step(spec, view.num_tokens, packed, packed.slots, query_start, kv_lens, key_start, table, launches)


def _of_batch(view: BatchView, width: int) -> list[I32]:
    table = view.side.table
    if table.shape[1] > width:
        table = table[:, :width]  # longer than any sequence
    elif table.shape[1] < width:
        table = np.pad(table, ((0, 0), (0, width - table.shape[1])))
    return [view.query_start_loc, view.kv_lens, view.new_start_loc, table]


def _constants(spec: AttentionSpec, paged: bool) -> dict[str, Any]:
    found = attend_constants(spec, paged, INTERPRETED)
    return {**found, "COMPUTE": _LANGUAGE[found["COMPUTE"]]}


def run(
    step: Step,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    store: Store | None,
    layer: Owned,
    out: torch.Tensor | None,
    *,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write new keys and values into the cache, then attend; see `Backend.run`."""
    spec = step.spec
    result = out
    if out is None or out.stride(2) != 1 or out.requires_grad:
        result = torch.empty((step.num_tokens, spec.num_heads, spec.value_head_size), dtype=q.dtype, device=q.device)
    assert result is not None
    lse = None
    if return_lse:
        lse = torch.empty((step.num_tokens, spec.num_heads), dtype=torch.float32, device=q.device)
    with torch.no_grad(), _on(q.device), _interpreter if INTERPRETED else nullcontext():
        if store is not None and k is not None and v is not None and step.slots is not None:
            _write(step, k, store.key, store.dtype, layer.k_scale_there)
            _write(step, v, store.value, store.dtype, layer.v_scale_there)
        _attend(step, _rows(q), k, v, store, layer, result, lse)
        if out is not None and result is not out:
            out.copy_(result)
            result = out
    return result if lse is None else (result, lse)


def _rows(array: torch.Tensor) -> torch.Tensor:
    return array.detach() if array.stride(2) == 1 else array.detach().contiguous()


def _write(step: Step, new: torch.Tensor, cache: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> None:
    """Store rows [rows, K, D] in the step's slots: round(x / scale), saturated, where the type is quantised."""
    assert step.slots is not None
    count, heads, width = new.shape
    new = _rows(new)
    if new.dtype != dtype:
        limit = FINITE_MAX.get(str(dtype).removeprefix("torch."))
        if limit is not None:
            new = new.float()
            if scale is not None:
                # By a tensor: some devices divide by a number as a product with its reciprocal, which rounds otherwise.
                new = new / scale
            new = new.clamp(-limit, limit)
            new = new.round() if dtype == torch.int8 else new
        new = new.to(dtype)
    if dtype in _FP8:
        new = new.view(torch.uint8)
    kernels.write[triton.cdiv(count, _WRITE_ROWS), heads](
        new,
        cache,
        step.slots,
        count,
        new.stride(0),
        new.stride(1),
        heads,
        BLOCK_SIZE=cache.shape[2],
        WIDTH=width,
        ROWS=_WRITE_ROWS,
        BLOCK_WIDTH=padded(width),
        num_warps=4,
    )


def _attend(
    step: Step,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    store: Store | None,
    layer: Owned,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    spec = step.spec
    if store is not None:
        key, value = store.key, store.value
        strides = (*key.stride()[:3], *value.stride()[:3])
        scales = (layer.k_scale, layer.v_scale) if is_quantised(spec.kv_cache_dtype) else (1.0, 1.0)
    else:
        assert k is not None
        assert v is not None
        key, value = _rows(k), _rows(v)
        strides = (0, key.stride(1), key.stride(0), 0, value.stride(1), value.stride(0))
        scales = (1.0, 1.0)
    cap = spec.logits_soft_cap or 0.0
    scale = spec.scale * scales[0] * (1.0 if cap else 1.4426950408889634)
    # What a kernel was compiled not to read is given as something that it could.
    slopes = q if layer.slopes is None else layer.slopes
    sinks = q if layer.sinks is None else layer.sinks
    batch = (step.query_start, step.kv_lens, step.key_start, step.table)
    width = step.table.shape[1]
    ends = {"SINKS": spec.sinks, "LSE": lse is not None}
    for launch in step.launches:
        tiles, items = launch.tiles, (launch.sequence, launch.row)
        num_tiles, options = len(launch.sequence), {"num_warps": launch.tiles.warps}
        inputs = (width, scale, cap)
        if launch.splits == 1:
            kernels.prefill[num_tiles, spec.num_kv_heads](
                q, key, value, out, q if lse is None else lse, slopes, sinks, *batch, *items, *inputs, scales[1],
                q.stride(0), q.stride(1), *strides, out.stride(0), out.stride(1), spec.num_heads,
                **launch.constants, **ends, **options,
            )  # fmt: skip
            continue
        shape = (num_tiles, spec.num_kv_heads, launch.splits, tiles.rows)
        part = torch.empty((*shape, spec.value_head_size), dtype=torch.float32, device=q.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        kernels.decode[num_tiles, spec.num_kv_heads, launch.splits](
            q, key, value, part, part_lse, slopes, *batch, *items, *inputs, q.stride(0), q.stride(1), *strides,
            **launch.constants, **options,
        )  # fmt: skip
        kernels.merge[num_tiles, spec.num_kv_heads, tiles.rows](
            part, part_lse, out, q if lse is None else lse, sinks, step.query_start, *items, launch.splits, scales[1],
            out.stride(0), out.stride(1), spec.num_heads, GROUP=spec.group_size, VALUE_SIZE=spec.value_head_size,
            ROWS=tiles.rows, BLOCK_DV=padded(spec.value_head_size), **ends, num_warps=1,
        )  # fmt: skip
