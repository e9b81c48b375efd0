"""`Pages`: where a batch's keys and values lie in the cache, and the checks that keep kernels inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from attn_dispatch.errors import CacheError, MetadataError

__all__ = ["I32", "I64", "Pages", "as_lengths", "as_table", "check_array", "table_slots"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages:
    """The blocks that a batch reads and the slots that it writes: consistent, and inside one known bound.

    Attributes:
        block_size: B.
        block_table: i32[S, M], 0 beyond each sequence's last used block.
        used_blocks: i32[S], blocks that each sequence uses.
        slot_mapping: i64[rows of k and v], -1 for rows that are not written.
        writes: rows that are written.
        highest_block: the highest block id in use, so that a cache's size is checked in O(1) (-1: none).
    """

    block_size: int
    block_table: I32
    used_blocks: I32
    slot_mapping: I64
    writes: int
    highest_block: int

    @cached_property
    def writes_all(self) -> bool:
        """Whether every row of k and v is written: what a runtime without a slot mapping can do by itself."""
        return self.writes == len(self.slot_mapping)

    @property
    def exist(self) -> bool:
        """Whether the batch has blocks at all (an encoder's batch need not)."""
        return bool(self.block_table.shape[1])

    def check_fits(self, num_blocks: int) -> None:
        """Refuse a cache that lacks a block in use. O(1) unless it does.

        Raises:
            CacheError: naming the sequence, the block and the limit.
        """
        if self.highest_block < num_blocks:
            return
        beyond = np.argwhere(self.block_table >= num_blocks)
        s, at = (int(i) for i in beyond[0])
        raise CacheError(
            f"sequence {s}: block {int(self.block_table[s, at])} (entry {at} of its block table) is outside the cache, "
            f"which has {num_blocks} blocks (0..{num_blocks - 1}); nothing was written"
        )

    @classmethod
    def checked(
        cls,
        prefix: str,
        block_size: int,
        kv_lens: object,
        block_table: object,
        slot_mapping: object,
        start_loc: I32,
        new_lens: I32,
    ) -> Self:
        """Check one side of a batch (its own tokens, or an encoder's) and return it with unused entries zeroed.

        Args:
            prefix: "" or "encoder_", for messages.
            block_size: B.
            kv_lens: i32[S].
            block_table: i32[S, M].
            slot_mapping: i64[rows].
            start_loc: i32[S + 1], rows of each sequence.
            new_lens: i32[S], the same as lengths.
        """
        lens = check_array(f"{prefix}seq_lens", kv_lens, np.int32, 1)
        table = check_array(f"{prefix}block_table", block_table, np.int32, 2)
        slots = check_array(f"{prefix}slot_mapping", slot_mapping, np.int64, 1)
        num_seqs, rows = len(new_lens), int(start_loc[-1])
        for name, found in ((f"{prefix}seq_lens", len(lens)), (f"{prefix}block_table", len(table))):
            if found != num_seqs:
                raise MetadataError(f"{name} has {found} rows, the batch {num_seqs} sequences")
        if len(slots) != rows:
            raise MetadataError(f"{prefix}slot_mapping has {len(slots)} entries, the batch {rows} new tokens")
        if num_seqs and lens.min() < 0:
            s = int(np.argmax(lens < 0))
            raise MetadataError(f"sequence {s}: {prefix}seq_lens={int(lens[s])} is negative")
        written = slots >= 0
        num_written = int(np.count_nonzero(written))
        short = lens < new_lens
        if short.any():
            _refuse_short(prefix, lens, new_lens, short, start_loc, written)
        used = -(-lens // np.int32(block_size))
        if table.shape[1] == 0 and not num_written:
            return cls(
                block_size=block_size,
                block_table=table,
                used_blocks=np.zeros_like(used),
                slot_mapping=slots,
                writes=0,
                highest_block=-1,
            )
        if num_seqs and used.max() > table.shape[1]:
            s = int(np.argmax(used > table.shape[1]))
            raise MetadataError(
                f"sequence {s}: {int(lens[s])} tokens need {int(used[s])} blocks of {block_size}, "
                f"its {prefix}block_table has room for {table.shape[1]}"
            )
        in_use = np.arange(table.shape[1], dtype=np.int32) < used[:, None]
        table = np.where(in_use, table, np.int32(0))
        if table.min(initial=0) < 0:
            s, at = (int(i) for i in np.argwhere(table < 0)[0])
            raise MetadataError(
                f"sequence {s}: entry {at} of its {prefix}block_table is {int(table[s, at])}, but its "
                f"{int(lens[s])} tokens use {int(used[s])} blocks: a used entry must be a block id, 0 or more"
            )
        if num_written:
            expected = table_slots(prefix, block_size, start_loc, new_lens, lens, table)
            _check_slots(prefix, slots, expected, written, num_written == rows, start_loc, block_size)
        table.flags.writeable = False
        highest = int(table.max(initial=-1, where=in_use))
        return cls(
            block_size=block_size,
            block_table=table,
            used_blocks=used,
            slot_mapping=slots,
            writes=num_written,
            highest_block=highest,
        )


def _refuse_short(prefix: str, lens: I32, new: I32, short: npt.NDArray[np.bool_], start: I32, written: Any) -> None:
    for s in np.flatnonzero(short):
        # Padding: a sequence of no length whose tokens go nowhere.
        if lens[s] == 0 and not written[start[s] : start[s + 1]].any():
            continue
        raise MetadataError(
            f"sequence {s}: {prefix}seq_lens={int(lens[s])} counts the tokens after this step, and so cannot be less "
            f"than its {int(new[s])} new ones (padding has length 0 and slots of -1)"
        )


def _check_slots(
    prefix: str,
    slots: I64,
    expected: I64,
    written: npt.NDArray[np.bool_],
    all_written: bool,
    start: I32,
    block_size: int,
) -> None:
    wrong = slots != expected if all_written else written & (slots != expected)
    if wrong.any():
        t = int(np.argmax(wrong))
        s = int(np.searchsorted(start, t, side="right")) - 1
        raise MetadataError(
            f"sequence {s}: {prefix}slot_mapping[{t}]={int(slots[t])}, but by its block table that token belongs into "
            f"slot {int(expected[t])} (block {int(expected[t]) // block_size}); use that, or -1 to not write it"
        )
    ordered = np.sort(slots if all_written else slots[written])
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        slot = int(ordered[1:][twice][0])
        owners = [int(np.searchsorted(start, t, side="right")) - 1 for t in np.flatnonzero(slots == slot)[:2]]
        raise MetadataError(
            f"slot {slot} (block {slot // block_size}) is written twice in one step, by sequences {owners[0]} and "
            f"{owners[1]}: sequences may share blocks that they read, not the block that they write into"
        )


def table_slots(prefix: str, block_size: int, start: I32, new_lens: I32, kv_lens: I32, table: I32) -> I64:
    """Return the slot of every new token by the block tables, i64[rows]; -1 where a token has no position."""
    rows = int(start[-1])
    first = kv_lens - new_lens  # the position of each sequence's first new token
    if len(new_lens) == rows and rows and new_lens.min() == 1:  # all decode: the hot case
        sequence, position = np.arange(rows), first.astype(np.int64)
    else:
        sequence = np.repeat(np.arange(len(new_lens)), new_lens)
        position = np.arange(rows, dtype=np.int64) - np.repeat(start[:-1] - first, new_lens)
    if not rows or position.max() < 0:
        return np.full(rows, -1, dtype=np.int64)
    at = np.maximum(position, 0) // block_size
    if at.max() >= table.shape[1]:
        s = int(sequence[np.argmax(at)])
        raise MetadataError(
            f"sequence {s}: {int(kv_lens[s])} tokens need {-(-int(kv_lens[s]) // block_size)} blocks of {block_size}, "
            f"its {prefix}block_table has {table.shape[1]}"
        )
    slots = table[sequence, at].astype(np.int64) * block_size + position % block_size
    return np.where(position < 0, np.int64(-1), slots) if position.min() < 0 else slots


def check_array(name: str, array: object, dtype: type[np.generic], ndim: int) -> npt.NDArray[Any]:
    """Refuse what is not a host array of this type and rank; return it as one."""
    if not isinstance(array, np.ndarray):
        raise MetadataError(
            f"{name} must be a numpy array on the host, not {type(array).__module__}.{type(array).__name__}"
        )
    if array.dtype != dtype or array.ndim != ndim:
        raise MetadataError(
            f"{name} must be {np.dtype(dtype).name} with {ndim} axes, found {array.dtype.name} of shape {array.shape}"
        )
    return array


def as_lengths(name: str, values: Sequence[int] | I32) -> I32:
    """Return per-sequence counts as i32[S], refusing what is not a whole number from 0 to 2^31 - 1."""
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise MetadataError(f"{name} must be one whole number per sequence, found {array.dtype.name} {array.shape}")
    if array.min() < 0 or array.max() > _INT32_MAX:
        s = int(np.argmax((array < 0) | (array > _INT32_MAX)))
        raise MetadataError(f"sequence {s}: {name}={int(array[s])} is outside 0..{_INT32_MAX}")
    return array.astype(np.int32)


def as_table(name: str, tables: Sequence[Sequence[int]] | I32 | None, kv_lens: I32, block_size: int) -> I32:
    """Return block tables as i32[S, M], short rows filled up with -1; refuse a row that is too short to be used."""
    num_seqs = len(kv_lens)
    if tables is None:
        return np.zeros((num_seqs, 0), dtype=np.int32)
    if len(tables) != num_seqs:
        raise MetadataError(f"{name} speaks of {len(tables)} sequences, query_lens of {num_seqs}")
    if isinstance(tables, np.ndarray):
        if tables.ndim != 2 or tables.dtype.kind not in "iu":
            raise MetadataError(f"{name} must be whole numbers [S, M], found {tables.dtype.name} {tables.shape}")
        wide = tables
    else:
        rows = [np.asarray(row) for row in tables]
        wide = np.full((num_seqs, max((row.size for row in rows), default=0)), -1, dtype=np.int64)
        for s, row in enumerate(rows):
            if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
                raise MetadataError(
                    f"sequence {s}: {name} must be a list of block ids, found {row.dtype.name} {row.shape}"
                )
            if row.size * block_size < kv_lens[s]:
                raise MetadataError(
                    f"sequence {s}: {int(kv_lens[s])} tokens need {-(-int(kv_lens[s]) // block_size)} blocks of "
                    f"{block_size}, {name} gives it {row.size}"
                )
            wide[s, : row.size] = row
    if wide.dtype == np.int32:
        return wide
    # What lies beyond the last used block may be anything: only what int32 cannot hold is turned into what it can.
    return np.where(wide > _INT32_MAX, np.int64(-1), np.maximum(wide, -_INT32_MAX)).astype(np.int32)
