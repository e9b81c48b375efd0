"""How a step's work is cut: which kernel takes which rows, and pieces small enough to keep every thread busy.

Few rows per kv head go to the narrow kernel, in items of a sequence and neighbouring kv heads; a sequence that is long
beside the others is cut by heads first (nothing has to be merged then), by context after that. Many rows go to the wide
kernel in items of up to 64 rows of one kv head. Items are handed out in order, the longest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch import AttentionSpec
from attn_dispatch.contract import BatchView
from attn_dispatch_cpu.kernels import job as J

I32 = npt.NDArray[np.int32]

NARROW_ROWS = 8  # query rows per kv head up to which keys stream through the narrow kernel
WIDE_ROWS = 64
PIECES_PER_THREAD = 3  # what lets the threads end at about the same time
MIN_PART = 256  # tokens: a context is not cut into smaller parts than this
MIN_HEADS = 4  # kv heads whose rows lie side by side; fewer make runs that the hardware's prefetcher is too late for
SMALL_ELEMENTS = 1 << 21  # of keys and values: these lie in a CPU's cache, and a thread that wakes late finds work
WORTH_WAKING = 1 << 18  # elements of keys and values (10 to 20 us of work): fewer are done before a thread woke up
SCRATCH_LIMIT = 1 << 18  # bytes of accumulators and queries that stay in the second-level cache


@dataclass(slots=True, eq=False)
class Work:
    """One kernel's share of a step.

    Attributes:
        kernel: "narrow" or "wide".
        tiles: i32[items][TILE_WORDS].
        groups: i32[split tiles][GROUP_WORDS].
        parts: how many partial results there are.
        partial_rows: rows of the largest of them.
        heads, rows: the largest item's kv heads and rows, for the size of the scratch.
        threads: how many are worth waking.
        scratch_bytes: of one worker.
        tiles_at: the address of `tiles`.
    """

    kernel: str
    tiles: I32
    groups: I32
    parts: int
    partial_rows: int
    heads: int
    rows: int
    threads: int
    scratch_bytes: int = 0
    tiles_at: int = 0


def cut(spec: AttentionSpec, view: BatchView, threads: int, in_blocks: bool) -> list[Work]:
    """Cut a step into work for the kernels.

    Args:
        spec: the layers it is for.
        view: the batch as they see it.
        threads: how many there are.
        in_blocks: keys are in a cache; otherwise one after the other, and only the wide kernel reads them.
    """
    lens = view.query_lens
    narrow = np.flatnonzero((lens > 0) & (lens * spec.group_size <= (NARROW_ROWS if in_blocks else 0)))
    wide = np.flatnonzero((lens > 0) & (lens * spec.group_size > (NARROW_ROWS if in_blocks else 0)))
    work = []
    if len(narrow):
        work.append(_narrow(spec, view, narrow, threads))
    if len(wide):
        work.append(_wide(spec, view, wide, threads))
    return work


def _ranges(
    spec: AttentionSpec, view: BatchView, sequences: Any, first: Any, count: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which keys queries `first` to `first + count` of some sequences see between them: (begin, end)."""
    lens = view.kv_lens[sequences].astype(np.int64)
    position = lens - view.query_lens[sequences] + first
    left, right = spec.window
    right = 0 if spec.causal else right
    begin = np.maximum(position - left, 0) if left >= 0 else np.zeros_like(lens)
    end = np.minimum(position + count + right, lens) if right >= 0 else lens
    empty = end <= begin
    return np.where(empty, 0, begin), np.where(empty, 0, end)


def _blank(count: int, group_size: int) -> I32:
    tiles = np.zeros((count, J.TILE_WORDS), np.int32)
    tiles[:, J.TILE_PART] = -1
    tiles[:, J.TILE_SINK] = 1
    tiles[:, J.TILE_GROUPS] = group_size
    return tiles


def _narrow(spec: AttentionSpec, view: BatchView, sequences: npt.NDArray[np.intp], threads: int) -> Work:
    heads = spec.num_kv_heads
    queries = view.query_lens[sequences]
    begin, end = _ranges(spec, view, sequences, np.zeros_like(queries), queries)
    rows = int(queries.max()) * spec.group_size
    row_bytes = 20 * (spec.head_size + spec.value_head_size) * (-(-rows // 4))
    most_heads = max(1, min(heads, SCRATCH_LIMIT // row_bytes))
    length = end - begin
    total = int(length.sum())
    # Pieces of each sequence, by its share of the work: (head groups) x (parts of the context).
    elements = total * heads * (spec.head_size + spec.value_head_size)
    threads = max(1, min(threads, elements // WORTH_WAKING))
    small = elements <= SMALL_ELEMENTS
    share = threads if len(sequences) < threads and not small else PIECES_PER_THREAD * threads
    wanted = np.maximum(-(-length * share // max(total, 1)), 1) if threads > 1 else np.ones_like(length)
    head_groups = np.minimum(wanted, heads if small else max(1, heads // MIN_HEADS))
    head_groups = np.maximum(head_groups, -(-heads // most_heads))
    parts = np.minimum(-(-wanted // head_groups), np.maximum(length // MIN_PART, 1))
    short = head_groups * parts < wanted  # too short to be cut by context: by single heads, then
    head_groups = np.where(short, np.minimum(-(-wanted // parts), heads), head_groups)
    tiles, groups = [], []
    num_parts = 0
    if head_groups.max() == 1 and parts.max() == 1:  # the common case, without a loop
        table = _blank(len(sequences), spec.group_size)
        table[:, J.TILE_SEQUENCE], table[:, J.TILE_QUERIES] = sequences, queries
        table[:, J.TILE_BEGIN], table[:, J.TILE_END] = begin, end
        table[:, J.TILE_HEADS] = heads
        tiles.append(table)
    else:
        unit = int(np.lcm(spec.block_size, 8))
        for i, sequence in enumerate(sequences):
            edges = [heads * g // int(head_groups[i]) for g in range(int(head_groups[i]) + 1)]
            count = int(parts[i])
            step = -(-int(length[i]) // count)
            step = max(-(-step // unit), 1) * unit
            start = int(begin[i]) // unit * unit
            bounds = [(max(b, int(begin[i])), min(b + step, int(end[i]))) for b in range(start, int(end[i]), step)]
            bounds = bounds or [(0, 0)]
            split = len(bounds) > 1
            for low, high in pairwise(edges):
                if split:
                    entry = np.zeros((1, J.GROUP_WORDS), np.int32)
                    entry[0, [J.GROUP_PART, J.GROUP_PARTS, J.GROUP_TILE]] = num_parts, len(bounds), sum(map(len, tiles))
                    groups.append(entry)
                for p, (first, last) in enumerate(bounds):
                    tile = _blank(1, spec.group_size)
                    tile[0, [J.TILE_SEQUENCE, J.TILE_QUERIES]] = sequence, queries[i]
                    tile[0, [J.TILE_BEGIN, J.TILE_END]] = first, last
                    tile[0, [J.TILE_HEAD, J.TILE_HEADS]] = low, high - low
                    if split:
                        tile[0, [J.TILE_PART, J.TILE_SINK]] = num_parts + p, int(p == 0)
                    tiles.append(tile)
            if split:
                num_parts += len(bounds)  # shared by its head groups: partial results have room for every head
    table = np.concatenate(tiles)
    grouped = np.concatenate(groups) if groups else np.zeros((0, J.GROUP_WORDS), np.int32)
    if threads > 1:
        size = (table[:, J.TILE_END] - table[:, J.TILE_BEGIN]).astype(np.int64) * table[:, J.TILE_HEADS]
        order = np.argsort(-size, kind="stable")
        table = table[order]
        now_at = np.empty(len(order), np.int32)
        now_at[order] = np.arange(len(order))
        grouped[:, J.GROUP_TILE] = now_at[grouped[:, J.GROUP_TILE]]
    most = int(table[:, J.TILE_HEADS].max())
    useful = min(threads, len(table))
    return Work("narrow", np.ascontiguousarray(table), grouped, num_parts, rows, most, rows, useful)


def _wide(spec: AttentionSpec, view: BatchView, sequences: npt.NDArray[np.intp], threads: int) -> Work:
    heads, group = spec.num_kv_heads, spec.group_size
    per_tile = max(1, WIDE_ROWS // group)
    group_parts = -(-group // WIDE_ROWS)  # of a group that is larger than a tile
    lens = view.query_lens[sequences]
    count = -(-lens // per_tile)
    which = np.repeat(np.arange(len(sequences)), count)
    first = (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)) * per_tile
    queries = np.minimum(per_tile, lens[which] - first)
    begin, end = _ranges(spec, view, sequences[which], first, queries)
    order = np.argsort(-(end - begin) * queries, kind="stable") if threads > 1 else slice(None)
    base = _blank(len(which), group)
    base[:, J.TILE_SEQUENCE], base[:, J.TILE_QUERY], base[:, J.TILE_QUERIES] = sequences[which], first, queries
    base[:, J.TILE_BEGIN], base[:, J.TILE_END] = begin, end
    base[:, J.TILE_HEADS] = 1
    tiles = np.repeat(base[order], heads * group_parts, axis=0)
    tiles[:, J.TILE_HEAD] = np.tile(np.repeat(np.arange(heads), group_parts), len(base))
    if group_parts > 1:
        part = np.tile(np.arange(group_parts), len(base) * heads)
        tiles[:, J.TILE_GROUP] = part * WIDE_ROWS
        tiles[:, J.TILE_GROUPS] = np.minimum(WIDE_ROWS, group - part * WIDE_ROWS)
    none = np.zeros((0, J.GROUP_WORDS), np.int32)
    return Work("wide", np.ascontiguousarray(tiles), none, 0, 0, 1, WIDE_ROWS, min(threads, len(tiles)))


__all__ = ["Work", "cut"]
