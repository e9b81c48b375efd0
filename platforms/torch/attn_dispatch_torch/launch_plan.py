"""What is launched for a batch on one device: every index, mask and distance that no layer changes, copied once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch import AttentionSpec
from attn_dispatch.contract import BatchView
from attn_dispatch.contract.dtypes import COMPUTE_DTYPES, is_quantised
from attn_dispatch.errors import PlanError

from .grouping import DecodeGroup, Limits, Prefill, QueryTile, group, visible

__all__ = ["DecodeLaunch", "LaunchPlan", "PrefillLaunch", "SdpaBatch", "TileLaunch", "make_launch_plan"]

_CPU = Limits(chunk_bytes=8 << 20, call_bytes=256 << 10)
_OTHER = Limits(chunk_bytes=512 << 20, call_bytes=16 << 20)


@dataclass(slots=True, eq=False)
class DecodeLaunch:
    """`DecodeGroup` on a device.

    Attributes:
        rows: of q: a slice, or i64[G * n].
        size, queries: G and n.
        index: i64[G * K * nb], rows of the cache's [N * K, B * D].
        blank: i64, gathered rows [G * K * nb * B] that are nobody's and get zeroed: a masked NaN still counts.
        begin, end: gathered tokens that are looked at (end None: all).
        shape: of the batch axes: (G * K, 1) when one query of each sequence allows it, else (G, K).
        mask: [G, 1, n * g, L], or [G * K, 1, 1, L].
        distance: f32[G, 1, n, 1, L], |query position - key position|, of layers with ALiBi.
        views: a thread's own gathered memory, by the thread; see `gathering.gather`.
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
class TileLaunch:
    """`QueryTile` on a device: mask [t, w] and distance f32[t, w] are parts of one matrix that all tiles share."""

    rows: slice
    low: int
    high: int
    causal: bool
    mask: torch.Tensor | None
    distance: torch.Tensor | None


@dataclass(slots=True, eq=False)
class PrefillLaunch:
    """`Prefill` on a device; `index` i64[K * nb] is None when the step's own k and v are attended to."""

    index: torch.Tensor | None
    new: slice
    tiles: list[TileLaunch]
    shape: tuple[int, ...]
    begin: int = 0
    end: int | None = None
    blank: torch.Tensor | None = None
    views: dict[int, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class LaunchPlan:
    """What `attend` needs beside a layer's arrays.

    Attributes:
        spec: the layers.
        device: where the tensors are.
        cpu: by the CPU's own kernel and through a thread's scratch memory, rather than by what all devices have.
        compute: the type that attention is computed in; float16 and mixed types go by float32 on a CPU.
        materialise_scores: scores are written out in float32, because no fused kernel does what is asked.
        num_tokens: T.
        write_rows: i64[written * K], rows of the cache's [N * K * B, D] (None: nothing is written).
        written: i64[written], rows of k and v (None: all).
        decodes, prefills: the calls.
        rows_without_keys: rows of q that attend to nothing.
        single_group: one group of decodes is all, in the order of q.
    """

    spec: AttentionSpec
    device: torch.device
    cpu: bool
    compute: torch.dtype
    materialise_scores: bool
    num_tokens: int
    write_rows: torch.Tensor | None
    written: torch.Tensor | None
    decodes: list[DecodeLaunch]
    prefills: list[PrefillLaunch]
    rows_without_keys: list[slice]
    single_group: bool


class SdpaBatch:
    """A step's batch on one device: a launch plan with the log-sum-exp, and one without."""

    def __init__(self, spec: AttentionSpec, view: BatchView, device: torch.device, *, cpu: bool | None = None) -> None:
        self._spec, self._view, self._device = spec, view, device
        # The CPU's kernel is an operator that torch calls private: without it, a CPU runs what all devices run.
        known = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        self._cpu = (device.type == "cpu" and known) if cpu is None else cpu
        self._plans: dict[bool, LaunchPlan] = {}
        self.launch(spec.returns_lse)

    def launch(self, return_lse: bool) -> LaunchPlan:
        """Return the launch plan, made when it is first wanted; a CPU's kernel always gives the log-sum-exp."""
        wants_lse = return_lse or self._spec.sinks or self._cpu
        plan = self._plans.get(wants_lse)
        if plan is None:
            plan = make_launch_plan(self._spec, self._view, self._device, wants_lse, cpu=self._cpu)
            self._plans[wants_lse] = plan
        return plan

    def prepare(self, view: BatchView) -> Any:
        """Refuse: calls are grouped by lengths, which a fixed plan's batches do not share.

        Raises:
            PlanError: always.
        """
        raise PlanError("torch/sdpa has no fixed plans: its calls are grouped by the sequences' lengths")

    def renew(self, prepared: Any) -> None:
        """See `prepare`.

        Raises:
            PlanError: always.
        """
        self.prepare(prepared)


def make_launch_plan(
    spec: AttentionSpec, view: BatchView, device: torch.device, wants_lse: bool, *, cpu: bool
) -> LaunchPlan:
    """Sort a batch's sequences into calls for a device, and copy there what they need.

    Args:
        spec: the layers.
        view: the batch.
        device: of q.
        wants_lse: the log-sum-exp is wanted, by the caller or for the sinks: other devices' fused kernels keep it.
        cpu: see `LaunchPlan`.
    """
    materialise_scores = spec.logits_soft_cap is not None or (not cpu and (wants_lse or spec.alibi))
    compute = _compute_dtype(spec, cpu, materialise_scores)
    fresh = spec.writes_kv and spec.kv_cache_dtype == spec.dtype
    decodes, prefills = group(
        spec,
        view,
        _CPU if cpu else _OTHER,
        per_head=materialise_scores or spec.alibi,
        square=not materialise_scores,
        fresh=fresh,
    )
    # What other devices' kernels mask with is one byte; what is added to scores is a number.
    additive = cpu or materialise_scores
    # Made in an inference_mode block, tensors could not be used outside of it: a plan may outlive the block.
    with torch.inference_mode(False):
        write_rows, written = _writes(spec, view, device)
        decode_launches = [_decode_launch(spec, view, decode, device, additive) for decode in decodes]
        band = _Band(spec, [tile for prefill in prefills for tile in prefill.tiles], device, additive)
        prefill_launches = [_prefill_launch(spec, prefill, band, device) for prefill in prefills]
    starts, lens = view.query_start_loc, view.kv_lens
    rows_without_keys = [
        slice(*starts[s : s + 2].tolist()) for s in np.flatnonzero((lens == 0) & (view.query_lens > 0))
    ]
    single_group = (
        len(decode_launches) == 1
        and not prefill_launches
        and not rows_without_keys
        and isinstance(decode_launches[0].rows, slice)
    )
    return LaunchPlan(
        spec=spec,
        device=device,
        cpu=cpu,
        compute=compute,
        materialise_scores=materialise_scores,
        num_tokens=view.num_tokens,
        write_rows=write_rows,
        written=written,
        decodes=decode_launches,
        prefills=prefill_launches,
        rows_without_keys=rows_without_keys,
        single_group=single_group,
    )


def _compute_dtype(spec: AttentionSpec, cpu: bool, materialise_scores: bool) -> torch.dtype:
    stored = spec.dtype if is_quantised(spec.kv_cache_dtype) else spec.kv_cache_dtype
    assert stored in COMPUTE_DTYPES
    if "float64" in (spec.dtype, stored):
        return torch.float64
    # A CPU's float16 arithmetic costs five times float32's (flash kernel and matrix product alike, on AVX-512 without
    # FP16); widening costs a twentieth of what it saves.
    if materialise_scores or stored != spec.dtype or (cpu and spec.dtype == "float16"):
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


def _decode_launch(
    spec: AttentionSpec, view: BatchView, decode: DecodeGroup, device: torch.device, additive: bool
) -> DecodeLaunch:
    heads, size, tokens = spec.num_kv_heads, len(decode.ends), view.side.block_size
    index = decode.table[:, None, :] * heads + np.arange(heads)[:, None]
    merged = decode.queries == 1 and not spec.alibi
    mask = distance = blank = None
    if decode.masked or spec.alibi:
        key_at = np.arange(decode.begin, decode.end)
        query_at = (decode.ends[:, None] - decode.queries + np.arange(decode.queries))[:, :, None]
        if decode.masked:
            seen = visible(spec, query_at, key_at) & (key_at < decode.ends[:, None, None])
            seen = seen if merged else seen.repeat(spec.group_size, axis=1)
            mask = _mask(spec, seen[:, None], device, additive)
            if merged:
                mask = mask.repeat_interleave(heads, dim=0)
        if spec.alibi:
            distance = np.abs(query_at - key_at).astype(_bias_dtype(spec))
            distance = _to(distance[:, None, :, None, :], device)
    width = decode.table.shape[1] * tokens
    own = np.where(decode.used == 1, width, decode.used * tokens)  # a second copy of a full block is no stranger
    if decode.masked and bool((decode.ends < own).any()):
        column = np.arange(width)
        seq, token = np.nonzero((column >= decode.ends[:, None]) & (column < own[:, None]))
        rows = (seq[:, None] * heads + np.arange(heads)) * width + token[:, None]
        blank = _to(rows.ravel(), device)
    rows_of = decode.rows if isinstance(decode.rows, slice) else _to(decode.rows, device)
    whole = decode.begin == 0 and decode.end == width
    return DecodeLaunch(
        rows=rows_of,
        size=size,
        queries=decode.queries,
        index=_to(index.ravel(), device),
        blank=blank,
        begin=decode.begin,
        end=None if whole else decode.end,
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
    """One matrix that every tile's mask is a part of: who sees whom depends on how far apart they are alone.

    Row `-1 - j` is the query j before its tile's last, column `-1 - e` the key e before the furthest that any tile
    looks at from its last query.
    """

    def __init__(self, spec: AttentionSpec, tiles: list[QueryTile], device: torch.device, additive: bool) -> None:
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

    def part(self, band: torch.Tensor | None, tile: QueryTile) -> torch.Tensor | None:
        if band is None:
            return None
        spare = tile.anchor + self.ahead + 1 - tile.high
        columns = band.shape[1] - spare
        return band[band.shape[0] - (tile.b - tile.a) :, columns - (tile.high - tile.low) : columns]


def _prefill_launch(spec: AttentionSpec, prefill: Prefill, band: _Band, device: torch.device) -> PrefillLaunch:
    index = None
    if prefill.table is not None:
        heads = np.arange(spec.num_kv_heads)[:, None]
        index = _to((prefill.table * spec.num_kv_heads + heads).ravel(), device)
    tiles = [
        TileLaunch(
            rows=slice(prefill.rows.start + tile.a, prefill.rows.start + tile.b),
            low=tile.low,
            high=tile.high,
            causal=tile.causal,
            mask=band.part(band.mask, tile) if tile.masked else None,
            distance=band.part(band.distance, tile),
        )
        for tile in prefill.tiles
    ]
    return PrefillLaunch(index, prefill.new, tiles, (spec.num_kv_heads,))
