"""A batch as vendors' kernels take it: every sequence asks for something and sees something. NumPy only.

What a vendor does with a sequence that has no query, or no key, differs between kernels (and from release to release),
so none of them is shown one. Without queries a sequence has no rows anywhere and is left out. Without keys (padding, an
empty encoder) it is given some, of its own or of block 0, and its rows are overwritten afterwards: `idle`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import BatchView
from attn_dispatch.errors import PlanError

__all__ = ["Batch", "Csr", "Writes", "cut", "fitted", "page_lists", "part_of", "writes_of"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Sequences that all have queries and keys, in the order of their rows in q.

    Attributes:
        query_start: i32[s + 1].
        lens: i32[s], keys that each attends to; at least as many as it has queries when it is idle.
        tables: i32[s, W], blocks of each, 0 beyond its last.
        idle: bool[T], rows that attend to nothing (None: there are none).
        max_query: the most queries of a sequence.
        min_query: the fewest.
        max_keys: the most keys.
    """

    query_start: I32
    lens: I32
    tables: I32
    idle: Bools | None
    max_query: int
    min_query: int
    max_keys: int

    @property
    def num_seqs(self) -> int:
        """Sequences."""
        return len(self.lens)

    @property
    def num_tokens(self) -> int:
        """Rows of q."""
        return int(self.query_start[-1])

    @property
    def uniform(self) -> bool:
        """Whether all sequences have equally many queries."""
        return self.min_query == self.max_query

    @property
    def key_start(self) -> I32:
        """Sums of the lengths, i32[s + 1]."""
        start = np.zeros(len(self.lens) + 1, np.int32)
        np.cumsum(self.lens, out=start[1:])
        return start


def cut(view: BatchView, block_size: int, *, paged: bool) -> Batch:
    """Return a batch without what kernels cannot be given.

    Args:
        view: the batch.
        block_size: B.
        paged: keys lie in a cache; otherwise they are the batch's own rows, and `lens` their number.
    """
    live = view.query_lens > 0
    queries = view.query_lens[live].astype(np.int32)
    lens = view.kv_lens[live].astype(np.int32)
    empty = lens == 0
    tables = view.side.table[live]
    idle = None
    if empty.any():
        idle = np.repeat(empty, queries)
        lens = np.where(empty, queries, lens).astype(np.int32)
    if not paged:
        lens = np.diff(view.new_start_loc)[live].astype(np.int32)
        tables = tables[:, :0]
    else:
        used = int((-(-lens // np.int32(block_size))).max(initial=0))
        missing = used - tables.shape[1]
        # Idle sequences read block 0: every cache has one.
        tables = np.pad(tables, ((0, 0), (0, missing))) if missing > 0 else tables[:, : max(used, 1)]
    start = np.zeros(len(queries) + 1, np.int32)
    np.cumsum(queries, out=start[1:])
    return Batch(
        query_start=start,
        lens=lens,
        tables=np.ascontiguousarray(tables),
        idle=idle,
        max_query=int(queries.max(initial=0)),
        min_query=int(queries.min()) if len(queries) else 0,
        max_keys=int(lens.max(initial=0)),
    )


def part_of(batch: Batch, first: int, last: int) -> Batch:
    """Return the sequences first..last - 1 as a batch of their own; `idle` stays with the whole."""
    start = batch.query_start[first : last + 1]
    queries = np.diff(start)
    lens = batch.lens[first:last]
    return Batch(
        query_start=(start - start[0]).astype(np.int32),
        lens=lens,
        tables=batch.tables[first:last],
        idle=None,
        max_query=int(queries.max(initial=0)),
        min_query=int(queries.min()) if len(queries) else 0,
        max_keys=int(lens.max(initial=0)),
    )


@dataclass(frozen=True, eq=False)
class Csr:
    """Block tables as FlashInfer takes them.

    Attributes:
        indptr: i32[s + 1].
        indices: i32[indptr[-1]], the blocks of each sequence, one after the other.
        last_page_len: i32[s], tokens in its last block, 1..B.
    """

    indptr: I32
    indices: I32
    last_page_len: I32


def page_lists(lens: I32, tables: I32, block_size: int) -> Csr:
    """Return the blocks that lengths of at least 1 use, as lists."""
    used = -(-lens // np.int32(block_size))
    indptr = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(used, out=indptr[1:])
    in_use = np.arange(tables.shape[1], dtype=np.int32) < used[:, None]
    last = lens - (used - 1) * np.int32(block_size)
    return Csr(indptr, tables[in_use].astype(np.int32), last.astype(np.int32))


@dataclass(frozen=True, eq=False)
class Writes:
    """Which rows of k and v go where.

    Attributes:
        rows: i64[n], rows of k and v (None: all, in order).
        block: i64[n].
        offset: i64[n], the token's place in its block.
        any_row: bool[1], of a fixed plan: False when nothing is written, and the slots named keep what they hold.
    """

    rows: I64 | None
    block: I64
    offset: I64
    any_row: Bools | None = None


def writes_of(slots: I64, block_size: int, *, fixed: bool = False) -> Writes | None:
    """Return what is written, or None for nothing.

    Args:
        slots: i64[rows], -1: not written.
        block_size: B.
        fixed: shapes must not depend on which rows are written, so that a captured graph can be replayed: a row that
            is not written repeats the first one that is, in the same slot with the same contents.
    """
    written = slots >= 0
    count = int(np.count_nonzero(written))
    if fixed:
        first = int(np.argmax(written)) if count else 0
        rows = np.where(written, np.arange(len(slots)), first).astype(np.int64)
        target = np.maximum(slots[rows], 0) if len(slots) else slots
        return Writes(rows, target // block_size, target % block_size, np.array([count > 0]))
    if not count:
        return None
    if count == len(slots):
        return Writes(None, slots // block_size, slots % block_size)
    rows = np.flatnonzero(written).astype(np.int64)
    return Writes(rows, slots[rows] // block_size, slots[rows] % block_size)


def fitted(batch: Batch, width: int, like: Batch) -> Batch:
    """Return a batch in the shapes that a fixed plan was made for.

    Args:
        batch: the new one.
        width: blocks of a row of the plan's table.
        like: the batch that the plan was made with.

    Raises:
        PlanError: it has another shape, or does not fit.
    """
    if batch.num_seqs != like.num_seqs or not np.array_equal(batch.query_start, like.query_start):
        raise PlanError(
            f"a fixed plan keeps its shape: it was made for {like.num_seqs} sequences with "
            f"{np.diff(like.query_start).tolist()} queries, this batch has {np.diff(batch.query_start).tolist()}"
        )
    if batch.max_keys > like.max_keys or batch.tables.shape[1] > width:
        raise PlanError(
            f"a sequence has {batch.max_keys} tokens, the fixed plan was made for {like.max_keys}: "
            "make it with a larger max_seq_len"
        )
    tables = np.pad(batch.tables, ((0, 0), (0, width - batch.tables.shape[1])))
    idle = np.zeros(batch.num_tokens, np.bool_) if batch.idle is None else batch.idle
    return Batch(
        query_start=batch.query_start,
        lens=batch.lens,
        tables=tables,
        idle=idle,
        max_query=like.max_query,
        min_query=like.min_query,
        max_keys=like.max_keys,
    )
