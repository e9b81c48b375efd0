"""A batch cut up for IPEX's two CPU ops: one takes a query per row of the block table, one ragged queries. NumPy only.

Which of them is right for a layer is `UsableOps`; where only the decode op is, each token of a prompt becomes a
sequence of its own over the same blocks, as long as the token can see: attention is the same, only the block table
differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.adapters.batch import HostBatch, start_loc
from attn_dispatch.contract import AttentionSpec

__all__ = ["PARTITION_TOKENS", "DecodeGroup", "PrefillGroup", "UsableOps", "cacheless_tables", "cut", "usable_ops"]

I32 = npt.NDArray[np.int32]
Rows = slice | npt.NDArray[np.int64]

PARTITION_TOKENS = 128
"""IPEX's decode op works in partitions of so many tokens and takes it that blocks never straddle them."""


@dataclass(frozen=True)
class UsableOps:
    """Which of IPEX's CPU ops are right for a layer."""

    decode: bool
    prefill: bool


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Queries that each have a row of the block table.

    Attributes:
        rows: their rows of q and of the output.
        tables: i32[n, M], contiguous.
        lens: i32[n], tokens that each attends to, from the start of its table.
        max_keys: the largest of `lens`.
    """

    rows: Rows
    tables: I32
    lens: I32
    max_keys: int


@dataclass(frozen=True, eq=False)
class PrefillGroup:
    """Sequences of several queries.

    Attributes:
        rows: their rows of q and of the output.
        tables: i32[s, M], contiguous.
        query_start: i32[s + 1].
        key_start: i32[s + 1], sums of their lengths.
        max_query: the most queries of a sequence.
        max_keys: the most keys of a sequence.
    """

    rows: Rows
    tables: I32
    query_start: I32
    key_start: I32
    max_query: int
    max_keys: int


def usable_ops(spec: AttentionSpec, block_size: int, stored: str) -> UsableOps:
    """Return which ops compute a layer over blocks of this size and type."""
    left = spec.window[0]
    capped_window = spec.logits_soft_cap is not None and left >= 0  # the decode op raises
    decode = (
        PARTITION_TOKENS % block_size == 0  # other sizes are wrong in silence
        and not capped_window
        and not (stored != spec.dtype and spec.dtype == "float32")  # fp8 under float32 queries: raises
    )
    # The prefill op has no ALiBi, and treats a left side of 0 as no window.
    return UsableOps(decode, prefill=not spec.alibi and left != 0)


def cut(
    spec: AttentionSpec, batch: HostBatch, tables: I32, block_size: int, ops: UsableOps
) -> tuple[DecodeGroup | None, PrefillGroup | None]:
    """Cut a batch up for the ops that may be used; at least one of them must be right for the layer.

    Args:
        spec: the layer.
        batch: sequences with queries and keys.
        tables: i32[s, M], blocks of each.
        block_size: of the blocks in `tables`.
        ops: what may be used. Without `prefill` every query is given the decode op, which is causal.
    """
    begin, queries = batch.query_start[:-1], np.diff(batch.query_start)
    if spec.causal and (queries > batch.lens).any():
        # Queries before a sequence's first key attend to nothing, and a sequence with more queries than keys is NaN.
        before = np.maximum(queries - batch.lens, 0)
        begin, queries = begin + before, queries - before
    single = queries > 0 if not ops.prefill else (queries == 1) & ops.decode
    decodes, prefills = np.flatnonzero(single), np.flatnonzero(~single & (queries > 0))
    decode = prefill = None
    if len(decodes):
        decode = _decode_group(spec, begin[decodes], queries[decodes], batch.lens[decodes], tables[decodes], block_size)
    if len(prefills):
        many, keys = queries[prefills], batch.lens[prefills]
        max_keys = int(keys.max())
        prefill = PrefillGroup(
            rows=_rows(begin[prefills], many),
            tables=np.ascontiguousarray(tables[prefills, : -(-max_keys // block_size)]),
            query_start=start_loc(many),
            key_start=start_loc(keys),
            max_query=int(many.max()),
            max_keys=max_keys,
        )
    return decode, prefill


def cacheless_tables(batch: HostBatch, block_size: int) -> tuple[I32, I32, int]:
    """Return a block table i32[s, M], slots i32[rows of k] and a number of blocks for keys that are in no cache.

    Each sequence's tokens fill blocks of their own, one after the other.
    """
    used = -(-batch.lens // np.int32(block_size))
    first = np.cumsum(used, dtype=np.int32) - used
    column = np.arange(int(used.max(initial=0)), dtype=np.int32)
    tables = np.where(column < used[:, None], first[:, None] + column, 0).astype(np.int32)
    sequence = np.repeat(np.arange(len(used)), batch.lens)
    slots = first[sequence] * block_size + np.arange(len(sequence)) - batch.key_start[sequence]
    return tables, slots.astype(np.int32), int(used.sum())


def _rows(begin: I32, queries: I32) -> Rows:
    """Return the rows of sequences that begin there: a slice when they are neighbours."""
    ends = begin + queries
    if (ends[:-1] == begin[1:]).all():
        return slice(int(begin[0]), int(ends[-1]))
    ahead = start_loc(queries)
    rows: npt.NDArray[np.int64] = np.arange(ahead[-1]) + np.repeat(begin.astype(np.int64) - ahead[:-1], queries)
    return rows


def _decode_group(
    spec: AttentionSpec, begin: I32, queries: I32, keys: I32, tables: I32, block_size: int
) -> DecodeGroup:
    sequence = np.repeat(np.arange(len(queries)), queries)
    after = np.cumsum(queries)[sequence] - np.arange(len(sequence)) - 1  # queries of the same sequence that come later
    lens = keys[sequence] - after
    first = np.zeros_like(lens)
    if spec.window[0] >= 0:
        # Blocks that lie wholly before the window are left out of the table. It saves work, and more: the decode op
        # takes the largest score of a partition that its window leaves out to be 0, and loses weights that are small
        # beside exp(0) (with scores around -15 the output is off by a thousandth, with -20 it is wrong).
        first = np.maximum(lens - spec.window[0] - 1, 0) // block_size
        lens = lens - first * block_size
    max_keys = int(lens.max())
    columns = first[:, None] + np.arange(-(-max_keys // block_size))
    picked = tables[sequence[:, None], np.minimum(columns, tables.shape[1] - 1)]
    return DecodeGroup(_rows(begin, queries), np.ascontiguousarray(picked), lens.astype(np.int32), max_keys)
