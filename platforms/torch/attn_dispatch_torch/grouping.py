"""Which sequences of a batch one call attends for, and which keys it looks at. NumPy alone: no device, no layer.

Steps of a few tokens (decodes) of similar length are gathered into one padded batch, with the query-head group folded
into the query length: each key is then read once for all the heads that share it. Longer steps (prefills) go one by
one, in tiles of queries where a mask is needed, each with the keys that it can see: no work beyond the diagonal or the
window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attn_dispatch import AttentionSpec
from attn_dispatch.contract import BatchView

__all__ = ["DECODE_TOKENS", "DecodeGroup", "Limits", "Prefill", "QueryTile", "group", "visible"]

I64 = npt.NDArray[np.int64]

DECODE_TOKENS = 16
"""Steps of up to so many tokens are folded and batched; longer ones go alone."""

_TILE_TOKENS = 512
_TILE_ELEMENTS = 1 << 22
"""Elements of a tile's mask or scores: 16 MiB in float32."""


@dataclass(frozen=True)
class Limits:
    """What a device likes.

    Attributes:
        chunk_bytes: gathered keys and values of one call. A CPU should still have them in its cache when they are read.
        call_bytes: gathered bytes that cost as much as one more call: what padding may waste.
    """

    chunk_bytes: int
    call_bytes: int


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Sequences that one call attends for: G of them, n queries each.

    Attributes:
        rows: their rows of q, G * n: a slice, or indices.
        queries: n.
        table: gathered blocks, i64[G, nb]; beyond a sequence's last block its first one again.
        used: blocks that are a sequence's own, i64[G].
        ends: gathered tokens that are, i64[G].
        begin, end: gathered tokens that are looked at, the same for all.
        masked: not every query sees all of those.
    """

    rows: slice | I64
    queries: int
    table: I64
    used: I64
    ends: I64
    begin: int
    end: int
    masked: bool


class QueryTile(NamedTuple):
    """Queries [a, b) of a sequence's new ones, and the gathered tokens [low, high) that they see some of.

    `anchor`: the position, in gathered tokens, of query b - 1. `masked`: not every query sees all. `causal`: what
    they see is the lower triangle of a square.
    """

    a: int
    b: int
    low: int
    high: int
    anchor: int
    masked: bool
    causal: bool


@dataclass(frozen=True, eq=False)
class Prefill:
    """One sequence of many queries.

    Attributes:
        rows: its rows of q.
        table: gathered blocks, i64[nb]; None when the step brings all of its keys itself.
        new: its rows of k and v.
        tiles: calls.
    """

    rows: slice
    table: I64 | None
    new: slice
    tiles: tuple[QueryTile, ...]


def group(
    spec: AttentionSpec, view: BatchView, limits: Limits, *, per_head: bool, square: bool, fresh: bool
) -> tuple[list[DecodeGroup], list[Prefill]]:
    """Sort the sequences that attend to something into calls.

    Args:
        spec: the layers.
        view: the batch.
        limits: of the device.
        per_head: masks or scores are materialised for each head, which makes tiles smaller.
        square: the kernel knows causality by itself when queries and keys are the same tokens.
        fresh: new keys and values are as good as what the cache stores of them.
    """
    lens, new = view.kv_lens.astype(np.int64), view.query_lens.astype(np.int64)
    alive = (lens > 0) & (new > 0)
    few = alive & (new <= DECODE_TOKENS) if view.side.has_blocks else np.zeros(len(lens), np.bool_)
    decodes: list[DecodeGroup] = []
    if few.any():
        for n in np.unique(new[few]).tolist():
            decodes += _decode_groups(spec, view, np.flatnonzero(few & (new == n)), n, limits)
    whole = _written_whole(view) if fresh else np.zeros(len(lens), np.bool_)
    prefills = [
        _prefill(
            spec, view, int(s), per_head=per_head, square=square, direct=not view.side.has_blocks or bool(whole[s])
        )
        for s in np.flatnonzero(alive & ~few).tolist()
    ]
    return decodes, prefills


def visible(
    spec: AttentionSpec, query_at: npt.NDArray[np.int64], key_at: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which query position sees which key position."""
    ahead = key_at - query_at
    left, right = spec.window
    seen = ahead <= 0 if spec.causal else np.ones(ahead.shape, np.bool_)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _decode_groups(
    spec: AttentionSpec, view: BatchView, members: npt.NDArray[np.intp], n: int, limits: Limits
) -> list[DecodeGroup]:
    size, left = view.side.block_size, spec.window[0]
    lens = view.kv_lens[members].astype(np.int64)
    first = np.maximum(lens - n - left, 0) // size if left >= 0 else np.zeros_like(lens)
    used = -(-lens // size) - first
    stored = 4  # bytes of an element while it is computed with; half of them for 16-bit types, which is near enough
    block_bytes = stored * size * spec.num_kv_heads * (spec.head_size + spec.value_head_size)
    room, spare = max(limits.chunk_bytes // block_bytes, 1), limits.call_bytes // block_bytes
    most = int(used.max())
    if most * len(members) <= room and most * len(members) - int(used.sum()) <= spare:
        return [_decode_group(spec, view, members, first, used, n)]
    order = np.argsort(used, kind="stable")
    groups, start = [], 0
    counts = used[order].tolist()
    for i in range(1, len(counts) + 1):
        closed = i == len(counts)
        if not closed:
            taller = (i - start) * (counts[i] - counts[i - 1])
            closed = taller > spare or (i + 1 - start) * counts[i] > room
        if closed:
            part = np.sort(order[start:i])
            groups.append(_decode_group(spec, view, members[part], first[part], used[part], n))
            start = i
    return groups


def _decode_group(
    spec: AttentionSpec, view: BatchView, members: npt.NDArray[np.intp], first: I64, used: I64, n: int
) -> DecodeGroup:
    size, tables = view.side.block_size, view.side.table
    column = np.arange(int(used.max()))
    at = first[:, None] + np.where(column < used[:, None], column, 0)
    starts = view.query_start_loc[members].astype(np.int64)
    rows: slice | I64
    if len(members) == 1 or bool((np.diff(starts) == n).all()):
        rows = slice(int(starts[0]), int(starts[-1]) + n)
    else:
        rows = (starts[:, None] + np.arange(n)).ravel()
    ends = view.kv_lens[members].astype(np.int64) - first * size
    begins = np.zeros_like(ends)
    if spec.window[0] >= 0:
        begins = np.maximum(ends - n - spec.window[0], 0)
    alike = bool((ends == ends[0]).all() and (begins == begins[0]).all())
    # A lone query is at the last key: what it sees is one stretch. Several see different stretches.
    masked = not alike or (n > 1 and (spec.causal or spec.has_window))
    begin, end = (int(begins[0]), int(ends[0])) if alike else (0, len(column) * size)
    table = tables[members[:, None], at].astype(np.int64)
    return DecodeGroup(rows, n, table, used, ends, begin, end, masked)


def _written_whole(view: BatchView) -> npt.NDArray[np.bool_]:
    """Return which sequences have all of their tokens in this launch, none of them with slot -1."""
    new = np.diff(view.new_start_loc)
    whole: npt.NDArray[np.bool_] = (new == view.kv_lens) & (new > 0)
    if not view.side.writes_all:
        missing = np.concatenate([[0], np.cumsum(view.side.slots < 0)])
        whole &= missing[view.new_start_loc[1:]] == missing[view.new_start_loc[:-1]]
    return whole


def _prefill(spec: AttentionSpec, view: BatchView, s: int, *, per_head: bool, square: bool, direct: bool) -> Prefill:
    start, stop = view.query_start_loc[s : s + 2].tolist()
    n, length = stop - start, int(view.kv_lens[s])
    before = length - n
    left, right = spec.window
    right = 0 if spec.causal else right
    # A side of the window that reaches beyond every key is open.
    left, right = (-1 if reach >= length - 1 else reach for reach in (left, right))
    first = 0
    if left >= 0 and not direct:
        first = max(before - left, 0) // view.side.block_size * view.side.block_size
    tiles = tuple(
        tile._replace(low=tile.low - first, high=tile.high - first, anchor=tile.anchor - first)
        for tile in _tiles(n, before, length, left, right, spec.num_heads if per_head else 1, square and not per_head)
    )
    table = None
    if not direct:
        size = view.side.block_size
        last = max(tile.high for tile in tiles) + first
        table = view.side.table[s, first // size : -(-last // size)].astype(np.int64)
    return Prefill(slice(start, stop), table, slice(*view.new_start_loc[s : s + 2].tolist()), tiles)


def _tiles(n: int, before: int, length: int, left: int, right: int, heads: int, square: bool) -> list[QueryTile]:
    if left < 0 and right < 0 and (heads == 1 or n * length * heads <= _TILE_ELEMENTS):
        return [QueryTile(0, n, 0, length, length - 1, False, False)]
    if square and left < 0 and right == 0 and before == 0:
        return [QueryTile(0, n, 0, n, n - 1, False, True)]
    reach = length if left < 0 else min(length, left + max(right, 0) + _TILE_TOKENS)
    tokens = min(max(_TILE_ELEMENTS // (heads * reach), 16), _TILE_TOKENS)
    tiles = []
    for a in range(0, n, tokens):
        b = min(a + tokens, n)
        low = max(before + a - left, 0) if left >= 0 else 0
        high = min(before + b + right, length) if right >= 0 else length
        # Only one query, or none of whom sees beyond what all see.
        masked = (left >= 0 and before + b - 1 - left > low) or (right >= 0 and before + a + 1 + right < high)
        tiles.append(QueryTile(a, b, low, high, before + b - 1, masked, False))
    return tiles
