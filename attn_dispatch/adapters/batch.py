"""A batch as vendors' kernels take it: every sequence has queries and keys. NumPy only.

What a vendor does with a sequence that has no query, or no key, differs between kernels and releases, so none of them
is given one. A sequence without queries has no rows anywhere and is left out. One without keys (padding, an empty
encoder) is given some, its own rows or block 0, and its rows are overwritten afterwards: `idle`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import PlanError

__all__ = [
    "HostBatch",
    "PageLists",
    "SlotWrites",
    "check_renewable",
    "page_lists",
    "query_rows",
    "slot_writes",
    "split_decodes",
    "start_loc",
]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Sequences = npt.NDArray[np.intp]


def start_loc(lens: I32) -> I32:
    """Return the sums of lengths, i32[s + 1]."""
    start = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=start[1:])
    return start


@dataclass(frozen=True, eq=False, kw_only=True)
class HostBatch:
    """The sequences of a batch that have queries, in the order of their rows in q; each has at least one key.

    Attributes:
        query_start: i32[s + 1].
        lens: i32[s], keys of each.
        tables: i32[s, W], blocks of each, 0 beyond its last (W = 0: keys are rows of k, one sequence after the other).
        idle: bool[T], rows that attend to nothing (None: there are none).
        max_query, min_query: the most and the fewest queries of a sequence.
        max_keys: the most keys of a sequence; in a fixed plan, the most that it may have.
    """

    query_start: I32
    lens: I32
    tables: I32
    idle: Bools | None
    max_query: int
    min_query: int
    max_keys: int

    @classmethod
    def of(cls, view: BatchView, spec: AttentionSpec, *, paged: bool, tile: int = 1) -> HostBatch:
        """Return a batch without what kernels cannot be given.

        Args:
            view: the batch.
            spec: the layers.
            paged: keys lie in a cache; otherwise they are the batch's own rows.
            tile: a row of `tables` covers a multiple of so many tokens, for kernels that look up whole tiles.
        """
        asking = view.query_lens > 0
        queries, keys = view.query_lens[asking].astype(np.int32), view.kv_lens[asking].astype(np.int32)
        if paged:
            lens = np.where(keys == 0, queries, keys).astype(np.int32)  # read from block 0, which every cache has
            tables = _columns(view.side.table[asking], _blocks(int(lens.max(initial=1)), spec.block_size, tile))
        else:
            lens = np.diff(view.new_start_loc)[asking].astype(np.int32)
            tables = np.zeros((len(lens), 0), np.int32)
        return cls(
            query_start=start_loc(queries),
            lens=lens,
            tables=tables,
            idle=_idle_rows(queries, keys, spec),
            max_query=int(queries.max(initial=0)),
            min_query=int(queries.min()) if len(queries) else 0,
            max_keys=int(lens.max(initial=0)),
        )

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
        return start_loc(self.lens)

    def part(self, first: int, last: int) -> HostBatch:
        """Return the sequences first..last - 1 as a batch of their own; `idle` stays with the whole."""
        queries, lens = np.diff(self.query_start[first : last + 1]), self.lens[first:last]
        return HostBatch(
            query_start=start_loc(queries),
            lens=lens,
            tables=self.tables[first:last],
            idle=None,
            max_query=int(queries.max(initial=0)),
            min_query=int(queries.min()) if len(queries) else 0,
            max_keys=int(lens.max(initial=0)),
        )

    def fixed(self, max_seq_len: int, block_size: int, tile: int = 1) -> HostBatch:
        """Return the batch in shapes that depend on a fixed plan's capacity and query rows alone; see `of`."""
        return replace(
            self,
            tables=_columns(self.tables, _blocks(max_seq_len, block_size, tile)),
            idle=np.zeros(self.num_tokens, np.bool_) if self.idle is None else self.idle,
            max_keys=max_seq_len,
        )


def _blocks(tokens: int, block_size: int, tile: int) -> int:
    """Return how many blocks hold tokens, counted in whole tiles."""
    return -(-(-(-tokens // tile) * tile) // block_size)


def _columns(tables: I32, width: int) -> I32:
    """Return tables i32[s, width]: cut, or filled up with 0."""
    missing = width - tables.shape[1]
    return np.ascontiguousarray(np.pad(tables, ((0, 0), (0, missing))) if missing > 0 else tables[:, :width], np.int32)


def _idle_rows(queries: I32, keys: I32, spec: AttentionSpec) -> Bools | None:
    """Return which rows attend to nothing: those of sequences without keys, or all of whose keys a mask hides."""
    if not (keys < queries).any():
        return None  # each row's own position holds a key, which no mask hides
    sequence = np.repeat(np.arange(len(queries)), queries)
    length = keys[sequence]
    position = length - queries[sequence] + np.arange(len(sequence)) - start_loc(queries)[sequence]
    left, right = spec.window[0], 0 if spec.causal else spec.window[1]
    first = np.maximum(position - left, 0) if left >= 0 else 0
    last = np.minimum(position + right, length - 1) if right >= 0 else length - 1
    idle: Bools = first > last
    return idle if idle.any() else None


def check_renewable(old: BatchView, new: BatchView, max_seq_len: int) -> None:
    """Check that a batch has the shape that a fixed plan was made for.

    Args:
        old: the batch that the plan was made with.
        new: the batch that it is to be renewed with.
        max_seq_len: keys that a sequence may have at most.

    Raises:
        PlanError: it has another shape, or too many keys.
    """
    if not np.array_equal(old.query_start_loc, new.query_start_loc) or old.num_new != new.num_new:
        raise PlanError(
            f"a fixed plan keeps its shape: it is for {old.num_tokens} query rows in {old.num_seqs} sequences "
            f"({_listed(old.query_lens)} queries) and {old.num_new} new keys; this batch has {new.num_tokens} in "
            f"{new.num_seqs} ({_listed(new.query_lens)}) and {new.num_new}"
        )
    if new.max_kv_len > max_seq_len:
        raise PlanError(
            f"a sequence has {new.max_kv_len} tokens, the fixed plan has room for {max_seq_len}: "
            "make it with a larger max_seq_len"
        )


def _listed(lens: I32) -> str:
    return ", ".join(map(str, lens[:8].tolist())) + ("..." if len(lens) > 8 else "")


@dataclass(frozen=True, eq=False)
class PageLists:
    """Block tables as lists, one sequence's after the other's (CSR).

    Attributes:
        indptr: i32[s + 1].
        indices: i32[indptr[-1]], the blocks of each sequence.
        last_page_len: i32[s], tokens in its last block, 1..B.
    """

    indptr: I32
    indices: I32
    last_page_len: I32


def page_lists(batch: HostBatch, block_size: int) -> PageLists:
    """Return the blocks that a batch's keys lie in."""
    used = (batch.lens - 1) // np.int32(block_size) + np.int32(1)
    in_use = np.arange(batch.tables.shape[1], dtype=np.int32) < used[:, None]
    last = batch.lens - (used - np.int32(1)) * np.int32(block_size)
    return PageLists(start_loc(used), batch.tables[in_use], last)


@dataclass(frozen=True, eq=False)
class SlotWrites:
    """Which rows of k and v are written, and where.

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


def slot_writes(slots: I64, block_size: int, *, fixed: bool = False) -> SlotWrites | None:
    """Return what is written, or None for nothing.

    Args:
        slots: i64[rows], -1: not written.
        block_size: B.
        fixed: shapes must not depend on which rows are written, so that a captured graph can be replayed: a row that
            is not written repeats the first one that is, in the same slot with the same contents.
    """
    written = slots >= 0
    count = int(np.count_nonzero(written))
    if fixed and len(slots):
        first = int(np.argmax(written))
        rows = np.where(written, np.arange(len(slots)), first).astype(np.int64)
        target = np.maximum(slots[rows], 0)
        return SlotWrites(rows, target // block_size, target % block_size, np.array([count > 0]))
    if not count:
        return None
    if count == len(slots):
        return SlotWrites(None, slots // block_size, slots % block_size)
    rows = np.flatnonzero(written).astype(np.int64)
    return SlotWrites(rows, slots[rows] // block_size, slots[rows] % block_size)


def split_decodes(query_lens: I32, most: int = 1) -> tuple[Sequences, Sequences]:
    """Return the sequences with 1 to `most` queries, and those with more; without queries a sequence is in neither."""
    return np.flatnonzero((query_lens > 0) & (query_lens <= most)), np.flatnonzero(query_lens > most)


def query_rows(query_start: I32, sequences: Sequences) -> slice | I64:
    """Return the rows of sequences, one after the other: a slice when they are neighbours, else i64[n].

    Args:
        query_start: i32[S + 1].
        sequences: some of them, in any order.
    """
    if not len(sequences):
        return slice(0, 0)
    if (np.diff(sequences) == 1).all():
        return slice(int(query_start[sequences[0]]), int(query_start[sequences[-1] + 1]))
    begin = query_start[sequences].astype(np.int64)
    lens = query_start[sequences + 1] - begin
    ends = np.cumsum(lens)
    rows: I64 = np.arange(ends[-1]) + np.repeat(begin - (ends - lens), lens)
    return rows
