"""A plan on one device: every index, mask and distance that no layer changes, copied there once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch import AttentionSpec
from attn_dispatch.contract import BatchView
from attn_dispatch.contract.dtypes import COMPUTE_DTYPES, is_quantised

from .grouping import Fold, Limits, Long, Tile, group, visible
from .plan import SdpaPlan

__all__ = ["FoldStep", "LongStep", "Step", "TileStep", "make_step", "step_on"]

_CPU = Limits(chunk_bytes=8 << 20, call_bytes=256 << 10)
_OTHER = Limits(chunk_bytes=512 << 20, call_bytes=16 << 20)


@dataclass(slots=True, eq=False)
class FoldStep:
    """`Fold` on a device.

    Attributes:
        rows: of q: a slice, or i64[G * n].
        size, queries: G and n.
        index: i64[G * K * nb], rows of the cache's [N * K, B * D].
        blank: i64, gathered rows [G * K * nb * B] that are nobody's and get zeroed: a masked NaN still counts.
        begin, end: gathered tokens that are looked at (end None: all).
        shape: of the batch axes: (G * K, 1) when one query of each sequence allows it, else (G, K).
        mask: [G, 1, n * g, L], or [G * K, 1, 1, L].
        distance: f32[G, 1, n, 1, L], |query position - key position|, of layers with ALiBi.
        views: a thread's own gathered memory, by the thread; see `store.gather`.
    """

    rows: slice | torch.Tensor
    size: int
    queries: int
    index: torch.Tensor
    blank: torch.Tensor | None
    begin: int
    end: int | None
    shape: tuple[int, ...]
    mask: torch.Tensor | None
    distance: torch.Tensor | None
    views: dict[int, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class TileStep:
    """`Tile` on a device: mask [t, w] and distance f32[t, w] are parts of one matrix that all tiles share."""

    rows: slice
    low: int
    high: int
    causal: bool
    mask: torch.Tensor | None
    distance: torch.Tensor | None


@dataclass(slots=True, eq=False)
class LongStep:
    """`Long` on a device; `index` i64[K * nb] is None when the step's own k and v are attended to."""

    index: torch.Tensor | None
    new: slice
    tiles: list[TileStep]
    shape: tuple[int, ...]
    begin: int = 0
    end: int | None = None
    blank: torch.Tensor | None = None
    views: dict[int, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Step:
    """Everything that `attend` needs beside a layer's arrays.

    Attributes:
        spec: the layers.
        device: where the tensors are.
        cpu: by the CPU's own kernel and through a thread's scratch memory, rather than by what all devices have.
        compute: the type that attention is computed in; float16 and mixed types go by float32 on a CPU.
        plain: scores are written out in float32, because no fused kernel does what is asked.
        num_tokens: T.
        write_rows: i64[written * K], rows of the cache's [N * K * B, D] (None: nothing is written).
        written: i64[written], rows of k and v (None: all).
        folds, longs: the calls.
        nothing: rows of q that attend to nothing.
        alone: one fold does it all, in the order of q.
    """

    spec: AttentionSpec
    device: torch.device
    cpu: bool
    compute: torch.dtype
    plain: bool
    num_tokens: int
    write_rows: torch.Tensor | None
    written: torch.Tensor | None
    folds: list[FoldStep]
    longs: list[LongStep]
    nothing: list[slice]
    alone: bool


def step_on(plan: SdpaPlan, device: torch.device, return_lse: bool) -> Step:
    """Return a plan on a device, made at the first run there."""
    step: Step | None = plan.steps.get((device, return_lse))
    if step is None:
        cpu = device.type == "cpu"
        step = make_step(plan.spec, plan.view, device, return_lse or plan.spec.sinks, cpu=cpu)
        plan.steps[device, return_lse] = step
        if cpu:  # whose kernel gives the log-sum-exp for nothing
            plan.steps[device, not return_lse] = step
    return step


def make_step(spec: AttentionSpec, view: BatchView, device: torch.device, wants_lse: bool, *, cpu: bool) -> Step:
    """Sort a batch's sequences into calls for a device, and copy there what they need.

    Args:
        spec: the layers.
        view: the batch.
        device: of q.
        wants_lse: the log-sum-exp is wanted, by the caller or for the sinks: other devices' fused kernels keep it.
        cpu: see `Step`.
    """
    plain = spec.logits_soft_cap is not None or (not cpu and (wants_lse or spec.alibi))
    compute = _compute_dtype(spec, cpu, plain)
    fresh = spec.writes_kv and spec.kv_cache_dtype == spec.dtype
    folds, longs = group(
        spec, view, _CPU if cpu else _OTHER, per_head=plain or spec.alibi, square=not plain, fresh=fresh
    )
    # What other devices' kernels mask with is one byte; what is added to scores is a number.
    additive = cpu or plain
    # Made in an inference_mode block, tensors could not be used outside of it: a plan may outlive the block.
    with torch.inference_mode(False):
        write_rows, written = _writes(spec, view, device)
        fold_steps = [_fold_step(spec, view, fold, device, additive) for fold in folds]
        band = _Band(spec, [tile for long in longs for tile in long.tiles], device, additive)
        long_steps = [_long_step(spec, long, band, device) for long in longs]
    starts, lens = view.query_start_loc, view.kv_lens
    nothing = [slice(*starts[s : s + 2].tolist()) for s in np.flatnonzero((lens == 0) & (view.query_lens > 0))]
    alone = len(fold_steps) == 1 and not long_steps and not nothing and isinstance(fold_steps[0].rows, slice)
    return Step(
        spec=spec,
        device=device,
        cpu=cpu,
        compute=compute,
        plain=plain,
        num_tokens=view.num_tokens,
        write_rows=write_rows,
        written=written,
        folds=fold_steps,
        longs=long_steps,
        nothing=nothing,
        alone=alone,
    )


def _compute_dtype(spec: AttentionSpec, cpu: bool, plain: bool) -> torch.dtype:
    stored = spec.dtype if is_quantised(spec.kv_cache_dtype) else spec.kv_cache_dtype
    assert stored in COMPUTE_DTYPES
    if "float64" in (spec.dtype, stored):
        return torch.float64
    # A CPU's float16 arithmetic costs five times float32's (flash kernel and matrix product alike, on AVX-512 without
    # FP16); widening costs a twentieth of what it saves.
    if plain or stored != spec.dtype or (cpu and spec.dtype == "float16"):
        return torch.float32
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def _to(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _writes(
    spec: AttentionSpec, view: BatchView, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    side = view.side
    if not side.num_written or not spec.writes_kv:
        return None, None
    slots, used = side.slots, None
    if not side.writes_all:
        used = np.flatnonzero(slots >= 0)
        slots = slots[used]
    block, offset = np.divmod(slots, side.block_size)
    heads = np.arange(spec.num_kv_heads)
    rows = (block[:, None] * spec.num_kv_heads + heads) * side.block_size + offset[:, None]
    return _to(rows.ravel(), device), None if used is None else _to(used, device)


def _fold_step(spec: AttentionSpec, view: BatchView, fold: Fold, device: torch.device, additive: bool) -> FoldStep:
    heads, size, tokens = spec.num_kv_heads, len(fold.ends), view.side.block_size
    index = fold.table[:, None, :] * heads + np.arange(heads)[:, None]
    merged = fold.queries == 1 and not spec.alibi
    mask = distance = blank = None
    if fold.masked or spec.alibi:
        key_at = np.arange(fold.begin, fold.end)
        query_at = (fold.ends[:, None] - fold.queries + np.arange(fold.queries))[:, :, None]
        if fold.masked:
            seen = visible(spec, query_at, key_at) & (key_at < fold.ends[:, None, None])
            seen = seen if merged else seen.repeat(spec.group_size, axis=1)
            mask = _mask(spec, seen[:, None], device, additive)
            if merged:
                mask = mask.repeat_interleave(heads, dim=0)
        if spec.alibi:
            far = np.abs(query_at - key_at).astype(_bias_dtype(spec))
            distance = _to(far[:, None, :, None, :], device)
    width = fold.table.shape[1] * tokens
    own = np.where(fold.used == 1, width, fold.used * tokens)  # a second copy of a full block is no stranger
    if fold.masked and bool((fold.ends < own).any()):
        column = np.arange(width)
        seq, token = np.nonzero((column >= fold.ends[:, None]) & (column < own[:, None]))
        rows = (seq[:, None] * heads + np.arange(heads)) * width + token[:, None]
        blank = _to(rows.ravel(), device)
    rows_of = fold.rows if isinstance(fold.rows, slice) else _to(fold.rows, device)
    whole = fold.begin == 0 and fold.end == width
    return FoldStep(
        rows=rows_of,
        size=size,
        queries=fold.queries,
        index=_to(index.ravel(), device),
        blank=blank,
        begin=fold.begin,
        end=None if whole else fold.end,
        shape=(size * heads, 1) if merged else (size, heads),
        mask=mask,
        distance=distance,
    )


def _mask(spec: AttentionSpec, seen: npt.NDArray[np.bool_], device: torch.device, additive: bool) -> torch.Tensor:
    """Return who sees whom, or what is added to the scores so that they do not.

    The CPU's kernel reads a float32 mask as it is whatever it computes in, but for float64: it takes its bytes for
    float64's. Not torch's default dtype, which is the user's to set.
    """
    visible_to = _to(seen, device)
    if not additive:
        return visible_to
    dtype = torch.float64 if _bias_dtype(spec) == np.float64 else torch.float32
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~visible_to, -torch.inf)


def _bias_dtype(spec: AttentionSpec) -> type[np.floating[Any]]:
    return np.float64 if "float64" in (spec.dtype, spec.kv_cache_dtype) else np.float32


class _Band:
    """One matrix that every tile's mask is a part of: who sees whom depends on how far apart they are, and on no more.

    Row `-1 - j` is the query j before its tile's last, column `-1 - e` the key e before the furthest that any tile
    looks at from its last query.
    """

    def __init__(self, spec: AttentionSpec, tiles: list[Tile], device: torch.device, additive: bool) -> None:
        self.ahead = max((tile.high - 1 - tile.anchor for tile in tiles), default=0)
        masked = [tile for tile in tiles if tile.masked or spec.alibi]
        self.mask = self.distance = None
        if not masked:
            return
        rows = max(tile.b - tile.a for tile in masked)
        columns = max(tile.anchor + self.ahead + 1 - tile.low for tile in masked)
        query_at = np.arange(1 - rows, 1)[:, None]
        key_at = np.arange(1 - columns, 1)[None, :] + self.ahead
        if any(tile.masked for tile in masked):
            self.mask = _mask(spec, visible(spec, query_at, key_at), device, additive)
        if spec.alibi:
            self.distance = _to(np.abs(query_at - key_at).astype(_bias_dtype(spec)), device)

    def part(self, band: torch.Tensor | None, tile: Tile) -> torch.Tensor | None:
        if band is None:
            return None
        spare = tile.anchor + self.ahead + 1 - tile.high
        columns = band.shape[1] - spare
        return band[band.shape[0] - (tile.b - tile.a) :, columns - (tile.high - tile.low) : columns]


def _long_step(spec: AttentionSpec, long: Long, band: _Band, device: torch.device) -> LongStep:
    index = None
    if long.table is not None:
        heads = np.arange(spec.num_kv_heads)[:, None]
        index = _to((long.table * spec.num_kv_heads + heads).ravel(), device)
    tiles = [
        TileStep(
            rows=slice(long.rows.start + tile.a, long.rows.start + tile.b),
            low=tile.low,
            high=tile.high,
            causal=tile.causal,
            mask=band.part(band.mask, tile) if tile.masked else None,
            distance=band.part(band.distance, tile),
        )
        for tile in long.tiles
    ]
    return LongStep(index, long.new, tiles, (spec.num_kv_heads,))
