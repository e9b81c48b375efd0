"""How a step's work is cut: which kernel takes which rows, and pieces small enough to keep every thread busy.

Few rows per kv head go to the decode kernel, in items of a sequence and neighbouring kv heads; a sequence that is long
beside the others is cut by heads first (nothing has to be merged then), by context after that. Many rows go to the
prefill kernel in items of rows of one kv head. Items are handed out in order, the longest first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch import AttentionSpec
from attn_dispatch.contract import BatchView
from attn_dispatch_cpu.code_path import path_of
from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.scratch import (
    PREFILL_ROWS,
    Scratch,
    amx_decode_scratch,
    amx_prefill_rows,
    amx_prefill_scratch,
    decode_scratch,
    merge_scratch,
    prefill_scratch,
)

I32 = npt.NDArray[np.int32]

DECODE_MAX_ROWS = 8  # query rows per kv head up to which keys stream through the decode kernel
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
        kernel: "decode" or "prefill".
        items: i32[items][ITEM_WORDS].
        splits: i32[split items][SPLIT_WORDS].
        parts: how many partial results there are.
        partial_rows: rows of the largest of them.
        threads: how many are worth waking.
        path: see `code_path`.
        scratch: of one worker.
        merge_scratch: likewise, of merging the parts.
        items_at: the address of `items`.
    """

    kernel: str
    items: I32
    splits: I32
    parts: int
    partial_rows: int
    threads: int
    path: str
    scratch: Scratch
    merge_scratch: Scratch
    items_at: int = field(init=False)

    def __post_init__(self) -> None:
        self.items_at = self.items.__array_interface__["data"][0]


def cut(spec: AttentionSpec, view: BatchView, threads: int, in_blocks: bool) -> list[Work]:
    """Cut a step into work for the kernels.

    Args:
        spec: the layers it is for.
        view: the batch as they see it.
        threads: how many there are.
        in_blocks: keys are in a cache; otherwise one after the other, and only the prefill kernel reads them.
    """
    stored = spec.kv_cache_dtype if in_blocks else spec.dtype
    lens = view.query_lens
    rows = lens * spec.group_size
    most = DECODE_MAX_ROWS if in_blocks else 0
    few, many = np.flatnonzero((rows > 0) & (rows <= most)), np.flatnonzero(rows > most)
    work = []
    if len(few):
        work.append(_decode(spec, view, few, threads, path_of(spec.dtype, stored)))
    if len(many):
        work.append(_prefill(spec, view, many, threads, path_of(spec.dtype, stored)))
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
    items = np.zeros((count, A.ITEM_WORDS), np.int32)
    items[:, A.ITEM_PART] = -1
    items[:, A.ITEM_SINK] = 1
    items[:, A.ITEM_GROUPS] = group_size
    return items


def _decode(spec: AttentionSpec, view: BatchView, sequences: npt.NDArray[np.intp], threads: int, path: str) -> Work:
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
    items, splits = [], []
    num_parts = 0
    if head_groups.max() == 1 and parts.max() == 1:  # the common case, without a loop
        table = _blank(len(sequences), spec.group_size)
        table[:, A.ITEM_SEQUENCE], table[:, A.ITEM_QUERIES] = sequences, queries
        table[:, A.ITEM_BEGIN], table[:, A.ITEM_END] = begin, end
        table[:, A.ITEM_HEADS] = heads
        items.append(table)
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
                    entry = np.zeros((1, A.SPLIT_WORDS), np.int32)
                    entry[0, [A.SPLIT_PART, A.SPLIT_PARTS, A.SPLIT_ITEM]] = num_parts, len(bounds), sum(map(len, items))
                    splits.append(entry)
                for p, (first, last) in enumerate(bounds):
                    item = _blank(1, spec.group_size)
                    item[0, [A.ITEM_SEQUENCE, A.ITEM_QUERIES]] = sequence, queries[i]
                    item[0, [A.ITEM_BEGIN, A.ITEM_END]] = first, last
                    item[0, [A.ITEM_HEAD, A.ITEM_HEADS]] = low, high - low
                    if split:
                        item[0, [A.ITEM_PART, A.ITEM_SINK]] = num_parts + p, int(p == 0)
                    items.append(item)
            if split:
                num_parts += len(bounds)  # shared by its head groups: partial results have room for every head
    table = np.concatenate(items)
    split_table = np.concatenate(splits) if splits else np.zeros((0, A.SPLIT_WORDS), np.int32)
    if threads > 1:
        size = (table[:, A.ITEM_END] - table[:, A.ITEM_BEGIN]).astype(np.int64) * table[:, A.ITEM_HEADS]
        order = np.argsort(-size, kind="stable")
        table = table[order]
        now_at = np.empty(len(order), np.int32)
        now_at[order] = np.arange(len(order))
        split_table[:, A.SPLIT_ITEM] = now_at[split_table[:, A.SPLIT_ITEM]]
    most = int(table[:, A.ITEM_HEADS].max())
    useful = min(threads, len(table))
    sizes = spec.head_size, spec.value_head_size
    scratch = amx_decode_scratch(*sizes) if path.startswith("amx") else decode_scratch(*sizes, most, rows)
    merge = merge_scratch(spec.value_head_size)
    return Work("decode", np.ascontiguousarray(table), split_table, num_parts, rows, useful, path, scratch, merge)


def _prefill(spec: AttentionSpec, view: BatchView, sequences: npt.NDArray[np.intp], threads: int, path: str) -> Work:
    heads, group_size = spec.num_kv_heads, spec.group_size
    sizes = spec.head_size, spec.value_head_size
    lens = view.query_lens[sequences]
    most_rows = PREFILL_ROWS
    if path.startswith("amx"):
        # As many as the second-level cache holds, but no fewer items than keep every thread busy.
        share = -(-int(lens.sum()) * group_size * heads // (PIECES_PER_THREAD * threads))
        most_rows = min(amx_prefill_rows(*sizes), max(-(-share // 32) * 32, PREFILL_ROWS))
    per_tile = max(1, most_rows // group_size)
    group_parts = -(-group_size // most_rows)  # of a group that is larger than an item
    count = -(-lens // per_tile)
    owner = np.repeat(np.arange(len(sequences)), count)
    first = (np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)) * per_tile
    queries = np.minimum(per_tile, lens[owner] - first)
    begin, end = _ranges(spec, view, sequences[owner], first, queries)
    order = np.argsort(-(end - begin) * queries, kind="stable") if threads > 1 else slice(None)
    base = _blank(len(owner), group_size)
    base[:, A.ITEM_SEQUENCE], base[:, A.ITEM_QUERY], base[:, A.ITEM_QUERIES] = sequences[owner], first, queries
    base[:, A.ITEM_BEGIN], base[:, A.ITEM_END] = begin, end
    base[:, A.ITEM_HEADS] = 1
    items = np.repeat(base[order], heads * group_parts, axis=0)
    items[:, A.ITEM_HEAD] = np.tile(np.repeat(np.arange(heads), group_parts), len(base))
    if group_parts > 1:
        part = np.tile(np.arange(group_parts), len(base) * heads)
        items[:, A.ITEM_GROUP] = part * most_rows
        items[:, A.ITEM_GROUPS] = np.minimum(most_rows, group_size - part * most_rows)
    no_splits = np.zeros((0, A.SPLIT_WORDS), np.int32)
    scratch = amx_prefill_scratch(*sizes, most_rows) if path.startswith("amx") else prefill_scratch(*sizes)
    merge = merge_scratch(spec.value_head_size)
    useful = min(threads, len(items))
    return Work("prefill", np.ascontiguousarray(items), no_splits, 0, 0, useful, path, scratch, merge)


__all__ = ["Work", "cut"]
