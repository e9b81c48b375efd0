"""`DeviceBatch`: a batch as the op takes it: sequences with past lengths, and their blocks in one row. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import BatchView
from attn_dispatch.errors import MetadataError

__all__ = ["DeviceBatch", "Tree", "cacheless_batch", "paged_batch", "tree_bias"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer]
Indices = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]
Tails = tuple[tuple[int, int], ...]
Rows = slice | Indices


@dataclass(slots=True, eq=False, kw_only=True)
class DeviceBatch:
    """A batch of `s` sequences, which need not be those of the step (see `paged_batch`).

    Attributes:
        past_lens: i32[s], keys of each before its rows.
        begins: i32[s + 1], its rows.
        blocks: i32[capacity], the blocks of all, zeros at the end. The capacity grows in leaps, so that steps that
            follow each other have arrays of one size.
        block_begins: i32[s + 1], where each one's blocks begin.
        max_context_len: the exact largest number of keys. Less corrupts memory, more costs a hundredfold.
        rows: which rows of q these are; None: all of them, in order.
        num_rows: how many.
        sequences: i64[s], whose blocks they are (indices into the step); None: the step's own.
        tails: (block, first offset) of what the op clears and is to be put back; see `_tails`.
        parted: a sequence of the step is several of the op's: its new keys are written before, not by the op.
    """

    past_lens: I32
    begins: I32
    blocks: I32
    block_begins: I32
    max_context_len: int
    rows: Rows | None
    num_rows: int
    sequences: Indices | None
    tails: Tails = ()
    parted: bool = False

    def slots(self, view: BatchView, block_size: int) -> I64:
        """Return the slot in which each row's own position lies, i64[num_rows]."""
        lens = np.diff(self.begins)
        owners = np.arange(view.num_seqs) if self.sequences is None else self.sequences
        position = np.arange(self.num_rows) - np.repeat(self.begins[:-1] - self.past_lens, lens)
        blocks = view.side.table[np.repeat(owners, lens), position // block_size].astype(np.int64)
        slots: I64 = blocks * block_size + position % block_size
        return slots


@dataclass(frozen=True, eq=False)
class Tree:
    """Masks among the new tokens of each sequence, in the op's form.

    Attributes:
        bias: u8[sum of n * n], 1: seen.
        begins: i32[s + 1], where each sequence's begin.
    """

    bias: npt.NDArray[np.uint8]
    begins: I32


def paged_batch(
    view: BatchView, *, causal: bool = True, rows_at_once: int | None = None, clears_tails: bool = False
) -> DeviceBatch | None:
    """Return what the op is given for a batch that reads blocks, or None when no row attends to anything.

    Sequences without rows or without keys are left out: their rows are 0 by the contract, and the op is never asked.

    Args:
        view: the batch as the layer sees it.
        causal: a row sees what is before it and itself; else every row sees every key of its sequence.
        rows_at_once: rows that may share a sequence of the op (None: all). The op takes a sequence's rows for its
            last tokens, in order, so that no more than it has keys can share it; 1 makes every row the last token.
        clears_tails: see `_tails`.
    """
    side, block_size = view.side, view.side.block_size
    taken = (view.query_lens > 0) & (view.kv_lens > 0)
    sequences = np.flatnonzero(taken)
    if not len(sequences):
        return None
    n, keys = view.query_lens[sequences], view.kv_lens[sequences]
    limit = np.minimum(n, keys if rows_at_once is None else rows_at_once)
    tails: Tails = ()
    if clears_tails:
        tails, in_danger = _tails(keys, limit, side.table[sequences], block_size)
        if in_danger is not None:
            limit = np.where(in_danger, 1, limit)
    rows = _rows(view, taken)
    if (limit == n).all():
        whole = len(sequences) == view.num_seqs
        begins = view.query_start_loc if rows is None and whole else _offsets(n)
        table = side.table if whole else side.table[sequences]
        return _batch(keys - n, begins, -(-keys // block_size), table, rows, None if whole else sequences, tails)
    parts = -(-n // limit)
    owners = np.repeat(np.arange(len(sequences)), parts)
    first = (np.arange(len(owners)) - np.repeat(np.cumsum(parts) - parts, parts)) * limit[owners]
    lens = np.minimum(limit[owners], n[owners] - first)
    seen = keys[owners] - (n[owners] - first - lens) if causal else keys[owners]
    table = side.table[sequences[owners]]
    batch = _batch(seen - lens, _offsets(lens), -(-seen // block_size), table, rows, sequences[owners], tails)
    batch.parted = True
    return batch


def cacheless_batch(view: BatchView, block_size: int) -> tuple[DeviceBatch | None, int]:
    """Return a batch without a cache as one over blocks of its own, numbered in order, and how many those are."""
    taken = (view.query_lens > 0) & (view.kv_lens > 0)
    lens = view.kv_lens[taken]
    if not len(lens):
        return None, 0
    used = -(-lens // np.int32(block_size))
    count = int(used.sum())
    batch = DeviceBatch(
        past_lens=np.zeros(len(lens), np.int32),
        begins=_offsets(lens),
        blocks=np.arange(count, dtype=np.int32),
        block_begins=_offsets(used),
        max_context_len=int(lens.max()),
        rows=_rows(view, taken),
        num_rows=int(lens.sum()),
        sequences=None,
    )
    return batch, count


def tree_bias(masks: Sequence[Bools | None], query_lens: I32, sequences: Indices | None) -> Tree:
    """Return the op's form of one mask [n, n] per sequence of the step; None: plainly causal.

    Args:
        masks: one per sequence of the step.
        query_lens: i32[S], new tokens of each.
        sequences: those that the op is given (None: all).

    Raises:
        MetadataError: a mask of the wrong shape, or one in which a token sees a later one, or not itself.
    """
    if len(masks) != len(query_lens):
        raise MetadataError(f"{len(masks)} tree masks were given, the batch has {len(query_lens)} sequences")
    parts = []
    for s, (mask, n) in enumerate(zip(masks, query_lens.tolist(), strict=True)):
        causal = np.tri(n, dtype=np.bool_)
        mask = causal if mask is None else np.asarray(mask)
        if mask.shape != (n, n) or mask.dtype != np.bool_:
            raise MetadataError(
                f"sequence {s}: its tree mask is {mask.dtype.name} {mask.shape}, needs bool ({n}, {n}): "
                "[i, j] says whether its new token i sees its new token j"
            )
        if (mask & ~causal).any() or not mask.diagonal().all():
            raise MetadataError(f"sequence {s}: in a tree mask a token sees itself, and no token that comes after it")
        parts.append(mask.astype(np.uint8).ravel())
    if sequences is not None:
        parts = [parts[s] for s in sequences]
    return Tree(np.concatenate([*parts, np.zeros(0, np.uint8)]), _offsets(np.array([part.size for part in parts])))


def _offsets(lens: Integers) -> I32:
    offsets = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=offsets[1:])
    return offsets


def _tails(keys: I32, rows: Integers, table: I32, block_size: int) -> tuple[Tails, Bools | None]:
    """Return what the op will clear, as (block, first offset) pairs, and which sequences must not let it.

    Where a sequence has several rows, the op fills the values in its last block that lie beyond its last key with
    zeros, in caches of the type that it computes in, even when it was told not to write. What was stored is put back
    afterwards; but if another sequence of the step reads those very slots (a prefix that is shared up to the middle of
    a block), that is too late: such a sequence is given row by row, which clears nothing.
    """
    used = -(-keys // np.int32(block_size))
    filled = keys - (used - 1) * np.int32(block_size)  # keys in the last block
    clears = (rows > 1) & (filled < block_size)
    if not clears.any():
        return (), None
    last = table[np.arange(len(keys)), used - 1]
    # For each block that is cleared from some offset on: the most keys that any sequence has in it.
    blocks, place = np.unique(last[clears], return_inverse=True)
    in_use = np.arange(table.shape[1], dtype=np.int32) < used[:, None]
    owner, at = np.nonzero(in_use & np.isin(table, blocks))
    most = np.zeros(len(blocks), np.int64)
    reach = np.minimum(keys[owner] - at * block_size, block_size)
    np.maximum.at(most, np.searchsorted(blocks, table[owner, at]), reach)
    in_danger = np.zeros(len(keys), np.bool_)
    in_danger[clears] = most[place] > filled[clears]
    cleared = clears & ~in_danger
    tails = dict(zip(last[cleared].tolist(), filled[cleared].tolist(), strict=True))
    return tuple(tails.items()), (in_danger if in_danger.any() else None)


def _rows(view: BatchView, taken: Bools) -> Rows | None:
    """Return which rows belong to the sequences that are taken (None: all, when only empty ones are left out)."""
    if not (view.query_lens[~taken] > 0).any():
        return None
    rows = np.flatnonzero(np.repeat(taken, view.query_lens))
    # Padding stands at the end of a batch: what is before it is a view.
    return slice(0, len(rows)) if len(rows) == rows[-1] + 1 else rows


def _batch(
    past: Integers, begins: I32, used: Integers, table: I32, rows: Rows | None, sequences: Indices | None, tails: Tails
) -> DeviceBatch:
    in_use = np.arange(table.shape[1], dtype=np.int32) < used[:, None]
    ids = table[in_use]
    blocks = np.zeros(_capacity(len(ids)), np.int32)
    blocks[: len(ids)] = ids
    return DeviceBatch(
        past_lens=past.astype(np.int32),
        begins=begins,
        blocks=blocks,
        block_begins=_offsets(used),
        max_context_len=int((past + np.diff(begins)).max()),
        rows=rows,
        num_rows=int(begins[-1]),
        sequences=sequences,
        tails=tails,
    )


def _capacity(count: int) -> int:
    """Return a size of at least `count`, out of eight per power of two."""
    step = max(16, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step
