"""A call to the kernels' arguments: a batch as tiles on a device, and one layer's launches."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from attn_dispatch.adapters.torch.cache_tensors import CacheTensors, as_bytes, round_to
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBuffer, on_device
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.backend import Call
from attn_dispatch.contract import AttentionSpec, BatchView

from . import kernels
from .constants import attend_constants, pass_constants, tile_sizes
from .fixed_maximum import fixed_maximum, level_constants
from .planning import TiledRows, decodes_and_prefills, longest_span, num_splits, tile_rows
from .targets import INTERPRETER, Target, target_of
from .tiles import Tiles, decode_tiles, padded, prefill_tiles

__all__ = ["INTERPRETED", "LaunchPlan", "PagedBatch", "run_layer"]

INTERPRETED = isinstance(kernels.prefill, InterpretedFunction)
"""Triton was told to interpret before the kernels were imported."""

_LANGUAGE = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}
_WRITE_ROWS = 64 if INTERPRETED else 16
_LOG2_E = 1.4426950408889634
_interpreter = threading.Lock()  # it keeps the program that it is in in a global


@dataclass(frozen=True, eq=False, slots=True)
class LaunchPlan:
    """One kernel over some tiles.

    Attributes:
        tiles: their sizes.
        sequence, row: i32[tiles], see `planning.TiledRows`.
        splits: parts that keys are cut into; 1: `prefill` computes the result at once.
        constants: the kernel's compile-time arguments.
    """

    tiles: Tiles
    sequence: torch.Tensor
    row: torch.Tensor
    splits: int
    constants: Mapping[str, Any]


class PagedBatch:
    """A batch on one device, cut into tiles: every layer of a spec runs it.

    Attributes:
        spec: the layers.
        num_tokens: T.
        tensors: everything on the device, by name: query_start i32[S + 1], kv_lens i32[S], key_start i32[S + 1], table
            i32[S, M], slots i64[rows] (absent when nothing is written), tiles.
        launches: one for the sequences that are decoded, one for the others.
    """

    def __init__(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> None:
        """Cut a plan's batch into tiles and bring all that kernels read of it to a device, in one copy.

        Raises:
            EnvironmentVariableError: `fixed_maximum.VARIABLE` is not a number.
        """
        self.spec = spec = plan.spec
        view, capacity = plan.view, plan.max_seq_len
        self.num_tokens = view.num_tokens
        # What a renewed plan writes is not known: a slot of -1 is not written.
        wants_slots = view.side.num_written > 0 or (capacity is not None and view.num_new > 0)
        self._writes = paged and spec.writes_kv and wants_slots
        self._width = view.side.table.shape[1] if capacity is None else -(-capacity // spec.block_size)
        parts = _parts(plan, device, paged)
        self._tiles: Arrays = {
            f"{name}_{i}": getattr(rows, name) for i, (rows, _, _) in enumerate(parts) for name in ("sequence", "row")
        }
        self._buffer = DeviceBuffer(self.prepare(view), device)
        self.tensors = tensors = self._buffer.tensors
        self.slots = tensors.get("slots")
        self.sequences = tuple(tensors[name] for name in ("query_start", "kv_lens", "key_start", "table"))
        level = fixed_maximum()
        self.launches = tuple(
            LaunchPlan(
                tiles,
                tensors[f"sequence_{i}"],
                tensors[f"row_{i}"],
                splits,
                {
                    **_constants(spec, paged),
                    **pass_constants(spec, tiles),
                    **(level_constants(spec, paged, level) if splits > 1 else {}),
                },
            )
            for i, (_, tiles, splits) in enumerate(parts)
        )

    def prepare(self, view: BatchView) -> Arrays:
        """Return a batch of this one's shape on the host; what tiles are made of stays as it is."""
        table = view.side.table[:, : self._width]
        table = np.pad(table, ((0, 0), (0, self._width - table.shape[1])))
        arrays: Arrays = {"slots": view.side.slots} if self._writes else {}
        arrays |= {"query_start": view.query_start_loc, "kv_lens": view.kv_lens, "key_start": view.new_start_loc}
        return arrays | {"table": table} | self._tiles

    def renew(self, prepared: Arrays) -> None:
        """Bring a prepared batch into the buffer."""
        self._buffer.renew(prepared)


def _parts(plan: DevicePlan, device: torch.device, paged: bool) -> list[tuple[TiledRows, Tiles, int]]:
    """Return the tiles of decodes and those of prefills, with the parts that keys are cut into."""
    spec, view = plan.spec, plan.view
    target, processors = _machine(device)
    decodes, prefills = decodes_and_prefills(view)
    sizes = tile_sizes(spec, paged)
    parts = []
    if len(decodes):
        longest = int(view.query_lens[decodes].max()) * spec.group_size
        tiles = decode_tiles(target, *sizes, longest)
        rows = tile_rows(decodes, view, spec.group_size, tiles.rows)
        span = longest_span(decodes, view, spec, plan.max_seq_len)
        parts.append((rows, tiles, num_splits(span, tiles.keys, len(rows) * spec.num_kv_heads, processors)))
    if len(prefills):
        tiles = prefill_tiles(target, *sizes)
        parts.append((tile_rows(prefills, view, spec.group_size, tiles.rows), tiles, 1))
    return parts


@cache
def _machine(device: torch.device) -> tuple[Target, int]:
    """Return what a device is, and how many processors it has."""
    if INTERPRETED:
        return INTERPRETER, 32  # as many as make short sequences be split
    with on_device(device):
        gpu = triton.runtime.driver.active.get_current_target()
    properties = getattr(torch, device.type).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64
    return target_of(gpu.backend, gpu.arch, gpu.warp_size), processors


def _constants(spec: AttentionSpec, paged: bool) -> dict[str, Any]:
    constants = attend_constants(spec, paged, INTERPRETED)
    return {**constants, "COMPUTE": _LANGUAGE[constants["COMPUTE"]]}


def run_layer(
    call: Call, batch: PagedBatch, cache: CacheTensors | None, layer: LayerTensors
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write new keys and values into the cache, then attend; see `Backend.run`."""
    spec, q, out = batch.spec, call.q.detach(), call.out
    result = out
    if out is None or out.stride(2) != 1 or out.requires_grad:
        result = q.new_empty((batch.num_tokens, spec.num_heads, spec.value_head_size))
    assert result is not None
    lse = q.new_empty((batch.num_tokens, spec.num_heads), dtype=torch.float32) if call.return_lse else None
    with torch.no_grad(), on_device(q.device), _interpreter if INTERPRETED else nullcontext():
        k, v = (None if x is None else _rows(x) for x in (call.k, call.v))
        if cache is not None and batch.slots is not None:
            assert k is not None
            assert v is not None
            _write(batch.slots, k, cache.key, None if layer.k_scale == 1 else layer.k_scale_dev)
            _write(batch.slots, v, cache.value, None if layer.v_scale == 1 else layer.v_scale_dev)
        if cache is not None:
            key, value = as_bytes(cache.key), as_bytes(cache.value)
            strides = (*key.stride()[:3], *value.stride()[:3])
        else:
            assert k is not None
            assert v is not None
            key, value = k, v
            strides = (0, key.stride(1), key.stride(0), 0, value.stride(1), value.stride(0))
        _attend(batch, _rows(q), (key, value), strides, layer, result, lse)
        if out is not None and result is not out:
            out.copy_(result)
            result = out
    return result if lse is None else (result, lse)


def _rows(array: torch.Tensor) -> torch.Tensor:
    """Return rows whose elements lie together."""
    rows = array.detach()
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _write(slots: torch.Tensor, new: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Store rows [rows, K, D] in their slots of an HND array."""
    rows = as_bytes(round_to(new, cache.dtype, scale))
    count, heads, width = rows.shape
    kernels.write[triton.cdiv(count, _WRITE_ROWS), heads](
        rows,
        as_bytes(cache),
        slots,
        count,
        rows.stride(0),
        rows.stride(1),
        heads,
        BLOCK_SIZE=cache.shape[2],
        WIDTH=width,
        ROWS=_WRITE_ROWS,
        BLOCK_WIDTH=padded(width),
        num_warps=4,
    )


def _attend(
    batch: PagedBatch,
    q: torch.Tensor,
    sources: tuple[torch.Tensor, torch.Tensor],
    strides: tuple[int, ...],
    layer: LayerTensors,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Launch the kernels.

    Args:
        batch: on the device.
        q: [T, H, D].
        sources: keys and values, [N, K, B, D] or rows [T, K, D].
        strides: of a key's page, head and token, and of a value's.
        layer: slopes, sinks; scales, which are 1 unless the cache is quantised.
        out: [T, H, Dv].
        lse: f32[T, H]; None: not wanted.
    """
    spec = batch.spec
    cap = spec.logits_soft_cap or 0.0
    scale = spec.scale * layer.k_scale * (1.0 if cap else _LOG2_E)
    # What a kernel was compiled not to read is given as something that it could.
    slopes, sinks = (q if x is None else x for x in (layer.slopes, layer.sinks))
    lse_or_any = q if lse is None else lse
    width = batch.sequences[3].shape[1]
    ends = {"SINKS": spec.sinks, "LSE": lse is not None}
    for launch in batch.launches:
        tiles, items = launch.tiles, (launch.sequence, launch.row)
        num_tiles, options = len(launch.sequence), {"num_warps": launch.tiles.warps}
        inputs = (width, scale, cap)
        if launch.splits == 1:
            kernels.prefill[num_tiles, spec.num_kv_heads](
                q, *sources, out, lse_or_any, slopes, sinks, *batch.sequences, *items, *inputs, layer.v_scale,
                q.stride(0), q.stride(1), *strides, out.stride(0), out.stride(1), spec.num_heads,
                **launch.constants, **ends, **options,
            )  # fmt: skip
            continue
        shape = (num_tiles, spec.num_kv_heads, launch.splits, tiles.rows)
        part = q.new_empty((*shape, spec.value_head_size), dtype=torch.float32)
        part_lse = q.new_empty(shape, dtype=torch.float32)
        kernels.decode[num_tiles, spec.num_kv_heads, launch.splits](
            q, *sources, part, part_lse, slopes, *batch.sequences, *items, *inputs, q.stride(0), q.stride(1), *strides,
            **launch.constants, **options,
        )  # fmt: skip
        kernels.merge[num_tiles, spec.num_kv_heads, tiles.rows](
            part, part_lse, out, lse_or_any, sinks, batch.sequences[0], *items, launch.splits, layer.v_scale,
            out.stride(0), out.stride(1), spec.num_heads, GROUP=spec.group_size, VALUE_SIZE=spec.value_head_size,
            ROWS=tiles.rows, BLOCK_DV=padded(spec.value_head_size), **ends, num_warps=1,
        )  # fmt: skip
