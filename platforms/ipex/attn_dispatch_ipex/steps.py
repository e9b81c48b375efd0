"""A batch cut up for ops that want either one query per sequence or many: NumPy only, shared by CPU and XPU.

IPEX decodes with one op (one query per row of the block table) and prefills with another (ragged queries). Which of
them is right for a layer is a `Route`; where only the first is, each token of a prompt becomes a sequence of its own
over the same blocks, as long as the token can see: attention is the same, only the page table differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, BatchView

__all__ = ["PARTITION_TOKENS", "OneTokenStep", "Route", "Steps", "VarlenStep", "cut", "direct_pages", "route"]

I32 = npt.NDArray[np.int32]
Rows = slice | npt.NDArray[np.int64]

PARTITION_TOKENS = 128
"""IPEX's decode op works in partitions of so many tokens and takes it that blocks never straddle them."""


@dataclass(frozen=True)
class Route:
    """Which ops are right for a layer.

    Attributes:
        one_token: the decode op.
        varlen: the prefill op.
    """

    one_token: bool
    varlen: bool


@dataclass(frozen=True, eq=False)
class OneTokenStep:
    """Queries that each have a row of the block table.

    Attributes:
        rows: their rows of q and of the output.
        tables: i32[n, M], contiguous.
        lens: i32[n], tokens that each attends to, from the start of its table.
        longest: the largest of `lens`.
    """

    rows: Rows
    tables: I32
    lens: I32
    longest: int


@dataclass(frozen=True, eq=False)
class VarlenStep:
    """Sequences of several queries.

    Attributes:
        rows: their rows of q and of the output.
        tables: i32[s, M], contiguous.
        query_start: i32[s + 1].
        kv_start: i32[s + 1], the sums of their lengths.
        lens: i32[s], tokens of each.
        longest_query: tokens.
        longest: tokens.
    """

    rows: Rows
    tables: I32
    query_start: I32
    kv_start: I32
    lens: I32
    longest_query: int
    longest: int


@dataclass(frozen=True, eq=False)
class Steps:
    """A batch as the ops take it. `idle` are rows that attend to nothing: no op can be given those."""

    one_token: OneTokenStep | None
    varlen: VarlenStep | None
    idle: Rows | None


def route(spec: AttentionSpec, block_size: int, stored: str) -> Route:
    """Return which of IPEX's CPU ops compute this layer over blocks of this size and type."""
    left = spec.window[0]
    capped_window = spec.logits_soft_cap is not None and left >= 0  # the decode op raises
    one_token = (
        PARTITION_TOKENS % block_size == 0  # other sizes are wrong in silence
        and not capped_window
        and not (stored != spec.dtype and spec.dtype == "float32")  # fp8 under float32 queries: raises
    )
    # The prefill op has no ALiBi, and takes a window of nothing to the left for no window.
    return Route(one_token, varlen=not spec.alibi and left != 0)


def cut(spec: AttentionSpec, view: BatchView, tables: I32, block_size: int, ops: Route) -> Steps:
    """Cut a batch up for the ops of a route; at least one of them must be right for it.

    Args:
        spec: the layer.
        view: the batch.
        tables: i32[S, M], 0 beyond each sequence's last block.
        block_size: of the blocks in `tables`.
        ops: what may be used. Without `varlen` every query is given the decode op, which is causal.
    """
    queries = view.query_lens
    live = (view.kv_lens > 0) & (queries > 0)
    single = live & (queries == 1) if ops.one_token else np.zeros(len(live), bool)
    if not ops.varlen:
        single = live
    one_token = many = idle = None
    if single.any():
        one_token = _one_token(spec, view, tables, block_size, np.flatnonzero(single))
    rest = live & ~single
    if rest.any():
        many = _varlen(view, tables, block_size, np.flatnonzero(rest))
    if not live.all():
        nothing = _rows(view, np.flatnonzero(~live & (queries > 0)))
        idle = nothing if isinstance(nothing, slice) or len(nothing) else None
        idle = None if isinstance(idle, slice) and idle.start == idle.stop else idle
    return Steps(one_token, many, idle)


def direct_pages(view: BatchView, block_size: int) -> tuple[I32, npt.NDArray[np.int32], int]:
    """Return a block table i32[S, M], slots i32[rows] and a number of blocks for tokens that are in no cache.

    Each sequence's new tokens fill blocks of their own, one after the other.
    """
    used = -(-view.kv_lens // np.int32(block_size))
    first = np.cumsum(used, dtype=np.int32) - used
    wide = int(used.max(initial=0))
    tables = np.where(np.arange(wide) < used[:, None], first[:, None] + np.arange(wide), 0).astype(np.int32)
    new = np.diff(view.new_start_loc)
    sequence = np.repeat(np.arange(len(new)), new)
    at = np.arange(view.num_new, dtype=np.int64) - view.new_start_loc[sequence]
    slots = first[sequence].astype(np.int64) * block_size + at
    return tables, np.where(at < view.kv_lens[sequence], slots, -1).astype(np.int32), int(used.sum())


def _rows(view: BatchView, sequences: npt.NDArray[np.intp]) -> Rows:
    """Return the query rows of sequences: a slice when they are neighbours."""
    if not len(sequences):
        return slice(0, 0)
    start = view.query_start_loc
    first, last = int(sequences[0]), int(sequences[-1])
    if last - first + 1 == len(sequences):
        return slice(int(start[first]), int(start[last + 1]))
    lens = view.query_lens[sequences]
    ends = np.cumsum(lens)
    rows: npt.NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(start[sequences] - (ends - lens), lens)
    return rows


def _one_token(
    spec: AttentionSpec, view: BatchView, tables: I32, block_size: int, sequences: npt.NDArray[np.intp]
) -> OneTokenStep:
    queries = view.query_lens[sequences]
    row_of = np.repeat(np.arange(len(sequences)), queries)
    ends = np.cumsum(queries)
    after = ends[row_of] - np.arange(len(row_of)) - 1  # queries of the same sequence that come later
    lens = view.kv_lens[sequences][row_of] - after
    first = np.zeros_like(lens)
    if spec.window[0] >= 0:
        # Blocks that lie wholly before the window are left out of the table. It saves work, and more: the decode op
        # takes the largest score of a partition that its window leaves out to be 0, and loses weights that are small
        # beside exp(0) (with scores around -15 the output is off by a thousandth, with -20 it is wrong).
        first = np.maximum(lens - spec.window[0] - 1, 0) // block_size
        lens = lens - first * block_size
    longest = int(lens.max())
    columns = first[:, None] + np.arange(-(-longest // block_size))
    picked = tables[sequences[row_of][:, None], np.minimum(columns, tables.shape[1] - 1)]
    return OneTokenStep(_rows(view, sequences), np.ascontiguousarray(picked), lens.astype(np.int32), longest)


def _varlen(view: BatchView, tables: I32, block_size: int, sequences: npt.NDArray[np.intp]) -> VarlenStep:
    queries, lens = view.query_lens[sequences], view.kv_lens[sequences]
    longest = int(lens.max())
    return VarlenStep(
        rows=_rows(view, sequences),
        tables=np.ascontiguousarray(tables[sequences, : -(-longest // block_size)]),
        query_start=_starts(queries),
        kv_start=_starts(lens),
        lens=np.ascontiguousarray(lens),
        longest_query=int(queries.max()),
        longest=longest,
    )


def _starts(lens: I32) -> I32:
    start = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=start[1:])
    return start
