"""A batch as vendors' kernels take it: every sequence asks for something and sees something. NumPy only.

What a vendor does with a sequence that has no query, or no key, differs between kernels and releases, so none of them
is shown one. Without queries a sequence has no rows anywhere and is left out. Without keys (padding, an empty encoder)
it is given some, of block 0, and its rows are overwritten afterwards: `idle`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, BatchView

__all__ = ["Batch", "Writes", "cut", "token_list", "writes_of"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Sequences that all have queries and keys, in the order of their rows in q.

    Attributes:
        query_start: i32[s + 1].
        lens: i32[s], keys that each attends to, at least 1.
        tables: i32[s, W], blocks of each, 0 beyond its last (W = 0 without pages).
        first_row: i32[s], without pages: the first of its rows of k and v.
        idle: bool[T], rows that attend to nothing (None: there are none).
        max_query: the most queries of a sequence.
        min_query: the fewest.
        max_keys: the most keys.
    """

    query_start: I32
    lens: I32
    tables: I32
    first_row: I32
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
        return _sums(self.lens)


def cut(view: BatchView, spec: AttentionSpec, *, paged: bool, tile: int = 1) -> Batch:
    """Return a batch without what kernels cannot be given.

    Args:
        view: the batch.
        spec: the layers.
        paged: keys lie in a cache; otherwise they are the batch's own rows.
        tile: a row of the table covers a multiple of so many tokens: kernels look up whole tiles.
    """
    live = view.query_lens > 0
    queries = view.query_lens[live].astype(np.int32)
    seen = view.kv_lens[live].astype(np.int32)
    first = view.new_start_loc[:-1][live].astype(np.int32)
    if paged:
        # Those that see nothing read block 0, which every cache has.
        lens = np.where(seen == 0, queries, seen).astype(np.int32)
        reach = -(-lens // np.int32(tile)) * np.int32(tile)
        width = max(int((-(-reach // np.int32(spec.block_size))).max(initial=0)), 1)
        tables = view.side.table[live][:, :width]
        tables = np.pad(tables, ((0, 0), (0, width - tables.shape[1])))
    else:
        lens, tables = np.maximum(seen, 1), np.zeros((len(seen), 0), np.int32)
        first = np.where(seen == 0, 0, first).astype(np.int32)
    return Batch(
        query_start=_sums(queries),
        lens=lens,
        tables=np.ascontiguousarray(tables, np.int32),
        first_row=first,
        idle=_idle(queries, seen, spec),
        max_query=int(queries.max(initial=0)),
        min_query=int(queries.min()) if len(queries) else 0,
        max_keys=int(lens.max(initial=0)),
    )


def _sums(lens: I32) -> I32:
    start = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=start[1:])
    return start


def _idle(queries: I32, seen: I32, spec: AttentionSpec) -> Bools | None:
    """Return which rows attend to nothing: those of sequences without keys, or all of whose keys a mask hides."""
    if not (seen < queries).any():
        return None  # each row's own position holds a key, which no mask hides
    rows = np.repeat(np.arange(len(queries)), queries)
    start = _sums(queries)
    length = seen[rows]
    at = length - queries[rows] + (np.arange(len(rows)) - start[rows])
    left, right = spec.window[0], 0 if spec.causal else spec.window[1]
    first = np.maximum(at - left, 0) if left >= 0 else np.zeros_like(at)
    last = np.minimum(at + right, length - 1) if right >= 0 else length - 1
    idle: Bools = first > last
    return idle if idle.any() else None


def token_list(batch: Batch, spec: AttentionSpec, *, paged: bool, spare: int) -> I32:
    """Return where each key lies: a slot of the cache, or a row of k; sequence after sequence, then zeros.

    Args:
        batch: the batch.
        spec: the layers.
        paged: slots are meant; otherwise rows.
        spare: zeros at the end: a kernel may look up a tile's places beyond the last key.
    """
    total = int(batch.lens.sum())
    out = np.zeros(total + spare, np.int32)
    sequence = np.repeat(np.arange(batch.num_seqs), batch.lens)
    position = np.arange(total) - np.repeat(batch.key_start[:-1].astype(np.int64), batch.lens)
    if not paged:
        out[:total] = batch.first_row[sequence] + position
        return out
    size = spec.block_size
    slots = batch.tables[sequence, position // size].astype(np.int64) * size + position % size
    # A number beyond 32 bits is a block that no cache has: the run is refused (`BatchPrefill.check`).
    out[:total] = np.minimum(slots, _INT32_MAX)
    return out


@dataclass(frozen=True, eq=False)
class Writes:
    """Which rows of k and v go where.

    Attributes:
        rows: i64[n], rows of k and v (None: all, in order).
        block: i64[n].
        offset: i64[n], the token's place in its block.
    """

    rows: I64 | None
    block: I64
    offset: I64


def writes_of(slots: I64, block_size: int) -> Writes | None:
    """Return what is written (a slot of -1 is not), or None for nothing."""
    written = slots >= 0
    if written.all():
        return Writes(None, slots // block_size, slots % block_size) if len(slots) else None
    if not written.any():
        return None
    rows = np.flatnonzero(written).astype(np.int64)
    return Writes(rows, slots[rows] // block_size, slots[rows] % block_size)
