"""`Side`: one half of a batch, the sequences' own tokens or the encoder's, and the checks that keep kernels inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.host_arrays import I32, I64, INT32_MAX
from attn_dispatch.errors import CacheError, MetadataError

__all__ = ["I32", "I64", "Side"]

Bools = npt.NDArray[np.bool_]

_COUNTED_BLOCKS = 1 << 22
"""Up to this block id, how often a block is used is counted in an array; beyond it, by sorting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Tokens of a batch: the rows that are new in this step, the keys there are, and where they lie in the cache.

    Consistent, inside one known bound, and locked: kernels trust it.

    Attributes:
        start_loc: i32[S + 1], rows of k and v per sequence: its new tokens.
        lens: i32[S], keys of each sequence, the new ones included.
        table: i32[S, M], the blocks of each sequence in order; 0 beyond its last used block.
        slots: i64[rows], where each new token goes, `block * block_size + offset`; -1: not written.
        block_size: B.
        used_blocks: i32[S], blocks that each sequence uses.
        num_written: rows that are written.
        highest_block: the highest block id in use, so that a cache's size is checked in O(1) (-1: none).
        exclusive: every block that is written is in one place of one table, so that later tokens fit behind it too.
    """

    start_loc: I32
    lens: I32
    table: I32
    slots: I64
    block_size: int
    used_blocks: I32
    num_written: int
    highest_block: int
    exclusive: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of k and v."""
        return len(self.slots)

    @cached_property
    def new_lens(self) -> I32:
        """New tokens of each sequence, i32[S]."""
        return self.start_loc[1:] - self.start_loc[:-1]

    @cached_property
    def writes_all(self) -> bool:
        """Whether every row of k and v is written: what a runtime without a slot mapping can do by itself."""
        return self.num_written == len(self.slots)

    @property
    def has_blocks(self) -> bool:
        """Whether the batch has blocks at all (an encoder's batch need not)."""
        return bool(self.table.shape[1])

    def check_fits(self, num_blocks: int) -> None:
        """Refuse a cache that lacks a block in use. O(1) unless it does.

        Raises:
            CacheError: naming the sequence, the block and the limit.
        """
        if self.highest_block < num_blocks:
            return
        s, entry = (int(i) for i in np.argwhere(self.table >= num_blocks)[0])
        raise CacheError(
            f"sequence {s}: block {int(self.table[s, entry])} (entry {entry} of its block table) is outside the cache, "
            f"which has {num_blocks} blocks (0..{num_blocks - 1}); nothing was written"
        )

    @classmethod
    def of(
        cls,
        prefix: str,
        block_size: int,
        start_loc: I32,
        lens: I32,
        table: I32,
        slots: I64 | None,
        *,
        shared_writes: bool = False,
    ) -> Side:
        """Check one side of a batch and return it, with unused table entries zeroed and every array locked.

        Args:
            prefix: "" or "encoder_", for messages.
            block_size: B.
            start_loc: i32[S + 1], checked.
            lens: i32[S].
            table: i32[S, M].
            slots: i64[rows]; None: they follow from the tables.
            shared_writes: a sequence may write what another one reads in this step.

        Raises:
            MetadataError: naming the sequence, the value and the limit.
        """
        new_lens = start_loc[1:] - start_loc[:-1]
        num_seqs, rows = len(new_lens), int(start_loc[-1])
        for name, length in ((f"{prefix}seq_lens", len(lens)), (f"{prefix}block_table", len(table))):
            if length != num_seqs:
                raise MetadataError(f"{name} has length {length}, expected {num_seqs}: one for each sequence")
        if slots is not None and len(slots) != rows:
            raise MetadataError(
                f"{prefix}slot_mapping has length {len(slots)}, expected {rows}: one for each new token"
            )
        if num_seqs and lens.min() < 0:
            s = int(np.argmax(lens < 0))
            raise MetadataError(f"sequence {s}: {prefix}seq_lens={int(lens[s])} is negative")
        short = bool((lens < new_lens).any())
        used = -(-lens // np.int32(block_size))
        has_table = bool(table.shape[1])
        if not has_table:
            written, num_written = None, 0 if slots is None else int(np.count_nonzero(slots >= 0))
        elif slots is None:
            written, num_written = None, -1  # known once the slots are
        else:
            written = slots >= 0
            num_written = int(np.count_nonzero(written))
        if short:
            _refuse_short(prefix, lens, new_lens, start_loc, slots)
        if not has_table and not num_written:
            no_slots = np.full(rows, -1, np.int64) if slots is None else slots
            side = cls(
                start_loc=start_loc,
                lens=lens,
                table=np.zeros((num_seqs, 0), np.int32),
                slots=no_slots,
                block_size=block_size,
                used_blocks=np.zeros_like(used),
                num_written=0,
                highest_block=-1,
            )
            return side._lock()
        if num_seqs and used.max() > table.shape[1]:
            s = int(np.argmax(used > table.shape[1]))
            raise MetadataError(
                f"sequence {s}: {int(lens[s])} tokens need {int(used[s])} blocks of {block_size}, "
                f"its {prefix}block_table has {table.shape[1]}"
            )
        table = np.where(_columns(table.shape[1]) < used[:, None], table, _ZERO)
        # Read as unsigned, a negative id is larger than any that is allowed.
        highest = int(table.view(np.uint32).max(initial=0))
        if highest > INT32_MAX:
            s, entry = (int(i) for i in np.argwhere(table < 0)[0])
            raise MetadataError(
                f"sequence {s}: entry {entry} of its {prefix}block_table is {int(table[s, entry])}, but its "
                f"{int(lens[s])} tokens use {int(used[s])} blocks: a used entry must be a block id, 0 or more"
            )
        if not highest and not used.any():
            highest = -1
        expected = _slots_of(block_size, start_loc, new_lens, lens, table)
        if slots is None:
            slots, num_written = expected, int(np.count_nonzero(expected >= 0)) if short else rows
        elif num_written:
            assert written is not None
            _check_slots(prefix, slots, expected, written, num_written == rows, start_loc, block_size)
        exclusive = False
        if num_written:
            exclusive = _writes_alone(slots, num_written, table, used, highest, block_size)
        side = cls(
            start_loc=start_loc,
            lens=lens,
            table=table,
            slots=slots,
            block_size=block_size,
            used_blocks=used,
            num_written=num_written,
            highest_block=highest,
            exclusive=exclusive,
        )
        if num_written and not exclusive:
            side._check_written_once()
            if not shared_writes:
                side._check_shared_writes(prefix)
        return side._lock()

    def advance(self, prefix: str, new_blocks: Mapping[int, int]) -> Side:
        """Return the side one token further in every sequence; see `AttentionMetadata.advance`."""
        size = self.block_size
        full = np.flatnonzero(self.lens % size == 0)
        table = self._appended(prefix, full, new_blocks)
        if not self.exclusive or self.num_written != len(self.slots):  # padding, or blocks that others read: all checks
            lens = self.lens + (self.lens > 0).astype(np.int32)
            return Side.of(prefix, size, self.start_loc, lens, table, None)
        used, highest, slots = self.used_blocks, self.highest_block, self.slots + 1
        exclusive = True
        if new_blocks:
            used = used.copy()
            used[full] += 1
            blocks = table[full, used[full] - 1]
            slots[full] = blocks.astype(np.int64) * size
            highest = max(highest, int(blocks.max()))
            exclusive = _writes_alone(slots, len(slots), table, used, highest, size)
        side = Side(
            start_loc=self.start_loc,
            lens=self.lens + np.int32(1),
            table=table,
            slots=slots,
            block_size=size,
            used_blocks=used,
            num_written=self.num_written,
            highest_block=highest,
            exclusive=exclusive,
        )
        if not exclusive:
            side._check_shared_writes(prefix)
        return side._lock()

    def _appended(self, prefix: str, full: npt.NDArray[np.intp], new_blocks: Mapping[int, int]) -> I32:
        """Return a table with a further block for every sequence whose blocks are full, and for no other."""
        needed = {s for s in full.tolist() if self.lens[s]}
        if needed != new_blocks.keys():
            raise MetadataError(
                f"sequences {sorted(needed)} begin a new block with this token; {prefix}new_blocks has one for "
                f"{sorted(new_blocks)}"
            )
        if not needed:
            return self.table
        sequences = np.fromiter(new_blocks, np.int64, len(new_blocks))
        blocks = np.fromiter(new_blocks.values(), np.int64, len(new_blocks))
        if blocks.min() < 0 or blocks.max() > INT32_MAX:
            raise MetadataError(f"{prefix}new_blocks={dict(new_blocks)}: a block id is 0 or more")
        width = self.table.shape[1]
        entry = self.used_blocks[sequences]
        missing = int(entry.max()) + 1 - width
        # Room for several more, so that a table is not copied at every block.
        table = np.pad(self.table, ((0, 0), (0, missing + 7))) if missing > 0 else self.table.copy()
        table[sequences, entry] = blocks
        return table

    def _lock(self) -> Side:
        for array in (self.start_loc, self.lens, self.table, self.slots, self.used_blocks):
            array.setflags(write=False)
        return self

    def _check_written_once(self) -> None:
        slots = np.sort(self.slots[self.slots >= 0])
        twice = slots[1:] == slots[:-1]
        if twice.any():
            slot = int(slots[1:][twice][0])
            rows = np.flatnonzero(self.slots == slot)[:2]
            writers = [int(np.searchsorted(self.start_loc, t, side="right")) - 1 for t in rows]
            raise MetadataError(
                f"slot {slot} (block {slot // self.block_size}) is written twice in one step, by sequences "
                f"{writers[0]} and {writers[1]}: sequences may share blocks that they read, not the block that they "
                "write into"
            )

    def _check_shared_writes(self, prefix: str) -> None:
        """Refuse a token that is written below another use of its block: a copy-on-write that was forgotten."""
        size = self.block_size
        position = _positions(self.start_loc, self.new_lens, self.lens)
        sequence = np.repeat(np.arange(len(self.lens)), self.new_lens)
        for t in np.flatnonzero(self.slots >= 0):
            block, offset = divmod(int(self.slots[t]), size)
            own = int(sequence[t]), int(position[t]) // size
            for s, entry in np.argwhere(self.table == block):
                filled = int(self.lens[s]) - int(entry) * size
                if (int(s), int(entry)) != own and filled > offset:
                    raise MetadataError(
                        f"sequence {own[0]} writes slot {int(self.slots[t])} (block {block}, offset {offset}), which "
                        f"sequence {int(s)} reads as its token {int(entry) * size + offset} (entry {int(entry)} of its "
                        f"{prefix}block_table): copy the block first (cache.copy_blocks), or say shared_writes=True "
                        "if both are meant to have the same token there"
                    )


_ZERO, _ONE = np.int32(0), np.int32(1)


@lru_cache(maxsize=64)
def _columns(width: int) -> I32:
    """Return 0, 1, ... as i32[width]."""
    columns = np.arange(width, dtype=np.int32)
    columns.flags.writeable = False
    return columns


def _writes_alone(slots: I64, num_written: int, table: I32, used: I32, highest: int, block_size: int) -> bool:
    """Tell whether each block that is written stands once in all tables together."""
    blocks = (slots if num_written == len(slots) else slots[slots >= 0]) // block_size
    unused = table.size - int(used.sum())
    if highest < _COUNTED_BLOCKS:
        uses = np.bincount(table.ravel())
        uses[0] -= unused
        return int(uses[blocks].max()) == 1
    ids, uses = np.unique(table, return_counts=True)
    uses[0] -= unused if ids[0] == 0 else 0
    return int(uses[np.searchsorted(ids, blocks)].max()) == 1


def _refuse_short(prefix: str, lens: I32, new: I32, start: I32, slots: I64 | None) -> None:
    for s in np.flatnonzero(lens < new):
        # Padding: a sequence of no length whose tokens go nowhere.
        if lens[s] == 0 and (slots is None or not (slots[start[s] : start[s + 1]] >= 0).any()):
            continue
        raise MetadataError(
            f"sequence {s}: {prefix}seq_lens={int(lens[s])} counts the tokens after this step, and so cannot be less "
            f"than its {int(new[s])} new ones (padding has length 0 and slots of -1)"
        )


def _check_slots(
    prefix: str, slots: I64, expected: I64, written: Bools, all_written: bool, start: I32, block_size: int
) -> None:
    wrong = slots != expected if all_written else written & (slots != expected)
    if wrong.any():
        t = int(np.argmax(wrong))
        s = int(np.searchsorted(start, t, side="right")) - 1
        raise MetadataError(
            f"sequence {s}: {prefix}slot_mapping[{t}]={int(slots[t])}, but by its block table that token belongs into "
            f"slot {int(expected[t])} (block {int(expected[t]) // block_size}); use that, or -1 to not write it"
        )


def _positions(start: I32, new_lens: I32, lens: I32) -> I64:
    """Return the position of every new token in its sequence, i64[rows]; negative in padding."""
    first = (lens - new_lens).astype(np.int64)
    rows = int(start[-1])
    return np.arange(rows, dtype=np.int64) - np.repeat(start[:-1] - first, new_lens)


def _slots_of(block_size: int, start: I32, new_lens: I32, lens: I32, table: I32) -> I64:
    """Return the slot of every new token by the block tables, i64[rows]; -1 where a token has no position.

    The tables hold every position: `lens` was checked against them.
    """
    rows = int(start[-1])
    if not rows:
        return np.zeros(0, np.int64)
    if rows == len(new_lens) and bool((new_lens == 1).all()):  # all decode: the hot case
        sequence, position = _columns(rows), lens - _ONE
    else:
        sequence = np.repeat(_columns(len(new_lens)), new_lens)
        position = _positions(start, new_lens, lens)
    padding = position.min() < 0
    at = np.maximum(position, 0) if padding else position
    block = at // block_size
    slots: I64 = table[sequence, block].astype(np.int64)
    slots *= block_size
    slots += at - block * block_size
    return np.where(position < 0, np.int64(-1), slots) if padding else slots
