"""A step as the op wants to see it: sequences with past lengths, and their blocks in one row. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import BatchView
from attn_dispatch.errors import MetadataError

__all__ = ["Step", "own_pages_step", "paged_step", "tree_bias"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Tails = tuple[tuple[int, int], ...]
Rows = slice | npt.NDArray[np.intp]


@dataclass(slots=True, eq=False, kw_only=True)
class Step:
    """One batch of the op: `s` sequences, which need not be the batch's own (see `paged_step`).

    Attributes:
        past_lens: i32[s], keys of each before its rows.
        begins: i32[s + 1], its rows.
        blocks: i32[capacity], the blocks of all, zeros at the end. The capacity grows in leaps, so that steps that
            follow each other have arrays of one size.
        block_begins: i32[s + 1], where each one's blocks begin.
        longest: the exact largest number of keys. Less corrupts memory, more costs a hundredfold.
        rows: which rows of q these are; None: all of them, in order.
        num_rows: how many.
        sequences: i64[s], whose blocks they are (indices into the batch); None: the batch's own.
        tails: (block, first offset) of what the op clears and is to be put back; see `_tails`.
        parted: a sequence of the batch is several of the op's: its new keys are written before, not by the op.
    """

    past_lens: I32
    begins: I32
    blocks: I32
    block_begins: I32
    longest: int
    rows: Rows | None
    num_rows: int
    sequences: npt.NDArray[np.intp] | None
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


def paged_step(
    view: BatchView, *, causal: bool = True, rows_at_once: int | None = None, clears_tails: bool = False
) -> Step | None:
    """Return what the op is given for a batch that reads pages, or None when no row attends to anything.

    Sequences without rows or without keys are left out: their rows are 0 by the contract, and the op is never asked.

    Args:
        view: the batch as the layer sees it.
        causal: a row sees what is before it and itself; else every row sees every key of its sequence.
        rows_at_once: rows that may share a sequence of the op (None: all). The op takes a sequence's rows for its
            last tokens, in order, so that no more than it has keys can share it; 1 makes every row the last token.
        clears_tails: see `_tails`.
    """
    block_size, side = view.side.block_size, view.side
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
        return _step(keys - n, begins, -(-keys // block_size), table, rows, None if whole else sequences, tails)
    parts = -(-n // limit)
    owners = np.repeat(np.arange(len(sequences)), parts)
    first = (np.arange(len(owners)) - np.repeat(np.cumsum(parts) - parts, parts)) * limit[owners]
    lens = np.minimum(limit[owners], n[owners] - first)
    seen = keys[owners] - (n[owners] - first - lens) if causal else keys[owners]
    table = side.table[sequences[owners]]
    step = _step(seen - lens, _offsets(lens), -(-seen // block_size), table, rows, sequences[owners], tails)
    step.parted = True
    return step


def _offsets(lens: npt.NDArray[np.integer]) -> I32:
    offsets = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=offsets[1:])
    return offsets


def _tails(
    keys: I32, rows: npt.NDArray[np.integer], table: I32, block_size: int
) -> tuple[Tails, npt.NDArray[np.bool_] | None]:
    """Return what the op will clear, as (block, first offset) pairs, and which sequences must not let it.

    Where a sequence has several rows, the op fills the values in its last block that lie beyond its last key with
    zeros, in caches of the type that it computes in, even when it was told not to write. What was there is put back
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


def _rows(view: BatchView, taken: npt.NDArray[np.bool_]) -> Rows | None:
    """Return which rows belong to the sequences that are taken (None: all, when only empty ones are left out)."""
    if not (view.query_lens[~taken] > 0).any():
        return None
    rows = np.flatnonzero(np.repeat(taken, view.query_lens))
    # Padding stands at the end of a batch: what is before it is a view.
    return slice(0, len(rows)) if len(rows) == rows[-1] + 1 else rows


def _step(
    past: npt.NDArray[np.integer],
    begins: I32,
    used: npt.NDArray[np.integer],
    table: I32,
    rows: Rows | None,
    sequences: npt.NDArray[np.intp] | None,
    tails: Tails,
) -> Step:
    in_use = np.arange(table.shape[1], dtype=np.int32) < used[:, None]
    ids = table[in_use]
    blocks = np.zeros(_capacity(len(ids)), np.int32)
    blocks[: len(ids)] = ids
    return Step(
        past_lens=past.astype(np.int32),
        begins=begins,
        blocks=blocks,
        block_begins=_offsets(used),
        longest=int((past + np.diff(begins)).max()),
        rows=rows,
        num_rows=int(begins[-1]),
        sequences=sequences,
        tails=tails,
    )


def _capacity(count: int) -> int:
    """Return a size of at least `count`, out of eight per power of two."""
    step = max(16, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


def own_pages_step(view: BatchView, block_size: int) -> tuple[Step | None, int]:
    """Return a batch without a cache as one over pages of its own, numbered in order, and how many those are."""
    taken = (view.query_lens > 0) & (view.kv_lens > 0)
    lens = view.kv_lens[taken]
    if not len(lens):
        return None, 0
    used = -(-lens // np.int32(block_size))
    count = int(used.sum())
    step = Step(
        past_lens=np.zeros(len(lens), np.int32),
        begins=_offsets(lens),
        blocks=np.arange(count, dtype=np.int32),
        block_begins=_offsets(used),
        longest=int(lens.max()),
        rows=_rows(view, taken),
        num_rows=int(lens.sum()),
        sequences=None,
    )
    return step, count


def tree_bias(
    masks: Sequence[npt.NDArray[np.bool_] | None], query_lens: I32, taken: npt.NDArray[np.intp] | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Return the op's (bias, where each sequence's begins) of one mask [n, n] per sequence; None: plainly causal.

    `taken` are the sequences that the op is given (None: all).

    Raises:
        MetadataError: a mask of the wrong shape, or one in which a token sees a later one, or not itself.
    """
    if len(masks) != len(query_lens):
        raise MetadataError(f"{len(masks)} tree masks were given, the batch has {len(query_lens)} sequences")
    parts = []
    for s, (mask, n) in enumerate(zip(masks, query_lens.tolist(), strict=True)):
        plain = np.tri(n, dtype=np.bool_)
        given = plain if mask is None else np.asarray(mask)
        if given.shape != (n, n) or given.dtype != np.bool_:
            raise MetadataError(
                f"sequence {s}: its tree mask is {given.dtype.name} {given.shape}, needs bool ({n}, {n}): "
                "[i, j] says whether its new token i sees its new token j"
            )
        if (given & ~plain).any() or not given.diagonal().all():
            raise MetadataError(f"sequence {s}: in a tree mask a token sees itself, and no token that comes after it")
        parts.append(given.astype(np.uint8).ravel())
    if taken is not None:
        parts = [parts[s] for s in taken]
    begins = _offsets(np.array([part.size for part in parts]))
    return np.concatenate([*parts, np.zeros(0, np.uint8)]), begins
