"""`Sequences`: the lengths and block tables of the sequences in one paged cache, and the batch of each step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attn_dispatch.cache import BlockPool
from attn_dispatch.contract import AttentionMetadata
from attn_dispatch.contract.side import I32
from attn_dispatch.errors import CacheError

__all__ = ["Rows", "Sequences", "StepBatch"]

Rows = npt.NDArray[np.intp]
"""Which sequences, by row."""


class StepBatch(NamedTuple):
    """One step: the batch, and the blocks that each layer's cache has to copy before it writes."""

    metadata: AttentionMetadata
    copy_from: list[int]
    copy_to: list[int]


class Sequences:
    """What is in a paged cache: one row per sequence. Host bookkeeping; all the layers of a model share it.

    Attributes:
        block_size: B.
        pool: whose blocks are used.
        grows: whether the pool gets more blocks when none is free (caches of as many have to follow).
        lens: i32[rows], tokens in the cache.
    """

    def __init__(self, block_size: int, pool: BlockPool, *, grows: bool = False) -> None:
        self.block_size = block_size
        self.pool = pool
        self.grows = grows
        self._begin()

    def _begin(self) -> None:
        self.lens: I32 = np.zeros(0, np.int32)
        self._used: I32 = np.zeros(0, np.int32)  # blocks of each row
        self._table: I32 = np.zeros((0, 0), np.int32)  # i32[rows, M], meaningful up to _used
        self._vacant: list[int] = []  # rows that have ended: length 0, no blocks

    @property
    def count(self) -> int:
        """Sequences that are alive."""
        return len(self.lens) - len(self._vacant)

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache, all sequences together."""
        return int(self.lens.sum())

    def add(self, count: int) -> Rows:
        """Begin sequences of no length and return their rows."""
        reused = [self._vacant.pop() for _ in range(min(count, len(self._vacant)))]
        first, more = len(self.lens), count - len(reused)
        if more:
            self.lens = np.concatenate([self.lens, np.zeros(more, np.int32)])
            self._used = np.concatenate([self._used, np.zeros(more, np.int32)])
            self._table = np.pad(self._table, ((0, more), (0, 0)))
        return np.array([*reused, *range(first, first + more)], np.intp)

    def extend(self, rows: Rows, new: I32) -> StepBatch:
        """Give each of these sequences room for its new tokens and return the step's batch, in the order of `rows`.

        A block that others hold too is replaced by a copy before it is written into (copy-on-write).

        Raises:
            CacheError: the pool has too few free blocks and may not grow. Nothing has been changed.
        """
        before = self.lens[rows]
        after = before + new
        wanted = -(-after // np.int32(self.block_size))
        missing = wanted - self._used[rows]
        shared = self._written_and_shared(rows, before, new) if self.pool.num_shared else []
        fresh = self._take(int(missing.sum()) + len(shared))
        copy_from, copy_to = [], []
        for row, at in shared:
            copy_from.append(int(self._table[row, at]))
            copy_to.append(fresh.pop())
            self._table[row, at] = copy_to[-1]
        self.pool.release(copy_from)
        width = int(wanted.max(initial=0))
        if width > self._table.shape[1]:
            more = max(width, 2 * self._table.shape[1]) - self._table.shape[1]
            self._table = np.pad(self._table, ((0, 0), (0, more)))
        begin = 0
        for i in np.flatnonzero(missing):
            row, end = rows[i], begin + int(missing[i])
            self._table[row, self._used[row] : wanted[i]] = fresh[begin:end]
            begin = end
        self._used[rows], self.lens[rows] = wanted, after
        metadata = AttentionMetadata.build(
            query_lens=new,
            seq_lens=after,
            block_tables=self._table[rows, : max(width, 1)],
            block_size=self.block_size,
        )
        return StepBatch(metadata, copy_from, copy_to)

    def _take(self, count: int) -> list[int]:
        pool = self.pool
        if count > pool.num_free:
            if not self.grows:
                raise CacheError(
                    f"{count} blocks are needed and {pool.num_free} of {pool.num_blocks} are free: give the cache more "
                    "with num_blocks=, or run fewer or shorter sequences at once"
                )
            pool.grow(pool.num_blocks + max(pool.num_blocks, count))
        return pool.allocate(count)

    def _written_and_shared(self, rows: Rows, before: I32, new: I32) -> list[tuple[int, int]]:
        """Return (row, entry of its table) of the blocks that this step writes into while somebody else holds them."""
        found = []
        left: dict[int, int] = {}
        for row, length, more in zip(rows.tolist(), before.tolist(), new.tolist(), strict=True):
            if not more or not length % self.block_size:
                continue
            at = length // self.block_size
            block = int(self._table[row, at])
            holders = left.setdefault(block, self.pool.ref_counts[block])
            if holders > 1:  # the last one to ask may keep it
                left[block] = holders - 1
                found.append((row, at))
        return found

    def truncate(self, rows: Rows, count: int) -> None:
        """Forget the last `count` tokens of each of these sequences.

        Raises:
            CacheError: a sequence has fewer. Nothing has been changed.
        """
        left = self.lens[rows] - count
        if (left < 0).any():
            row = int(rows[np.argmax(left < 0)])
            raise CacheError(f"sequence {row}: {count} tokens are to be removed, it has {int(self.lens[row])}")
        self._keep(rows, left)

    def remove(self, rows: Rows) -> None:
        """End these sequences: their blocks are free for others, their rows for new sequences."""
        self._keep(rows, np.zeros(len(rows), np.int32))
        self._vacant.extend(rows[::-1].tolist())

    def _keep(self, rows: Rows, lens: I32) -> None:
        needed = -(-lens // np.int32(self.block_size))
        for row, keep in zip(rows, needed, strict=True):
            self.pool.release(self._table[row, keep : self._used[row]].tolist())
        self.lens[rows], self._used[rows] = lens, needed

    def select(self, order: Rows) -> None:
        """Make row i what row `order[i]` was: sequences named twice share their blocks, ones not named end.

        Raises:
            CacheError: a row does not exist. Nothing has been changed.
        """
        if self._vacant or (len(order) and (order.min() < 0 or order.max() >= len(self.lens))):
            raise CacheError(f"rows {order.tolist()} are to be kept of a batch of {self.count} sequences")
        blocks = [self._table[row, : self._used[row]].tolist() for row in range(len(self.lens))]
        for row in order:
            self.pool.acquire(blocks[row])
        for held in blocks:
            self.pool.release(held)
        self.lens, self._used, self._table = self.lens[order], self._used[order], self._table[order]

    def clear(self) -> None:
        """End all sequences."""
        self._keep(np.arange(len(self.lens)), np.zeros(len(self.lens), np.int32))
        self._begin()
