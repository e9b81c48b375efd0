"""`BlockPool`: which blocks are free, and how many sequences hold each of the others."""

from __future__ import annotations

import numpy as np

from attn_dispatch.contract.pages import I32
from attn_dispatch.errors import CacheError

__all__ = ["BlockPool"]


class BlockPool:
    """A free list with reference counts: host bookkeeping for as many caches as share its block ids.

    Attributes:
        num_blocks: N.
        grows: more blocks are made when none is free; a cache of `num_blocks` has to follow.
        holders: i32[N], sequences that hold each block.
        sharing: whether a block may have more than one holder (what is written has to be looked at first).
        peak: the most blocks that were in use at once.
    """

    def __init__(self, num_blocks: int, *, grows: bool = False) -> None:
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
            raise CacheError(f"num_blocks={num_blocks!r} must be a whole number, 1 or more")
        self.num_blocks = num_blocks
        self.grows = grows
        self.holders: I32 = np.zeros(num_blocks, np.int32)
        self.sharing = False
        self.peak = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: low ids first, neighbours together

    @property
    def in_use(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return `count` free blocks, each with one holder.

        Raises:
            CacheError: there are not as many. None has been taken.
        """
        if count > len(self._free):
            if not self.grows:
                raise CacheError(
                    f"{count} blocks are needed and {len(self._free)} of {self.num_blocks} are free: give the cache "
                    "more with num_blocks=, or run fewer or shorter sequences at once"
                )
            self._grow(max(2 * self.num_blocks, self.num_blocks + count))
        if not count:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        self.holders[taken] = 1
        self.peak = max(self.peak, self.in_use)
        return taken

    def _grow(self, num_blocks: int) -> None:
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
        self.holders = np.concatenate([self.holders, np.zeros(num_blocks - self.num_blocks, np.int32)])
        self.num_blocks = num_blocks

    def share(self, blocks: I32) -> None:
        """Add a holder to each of these blocks (one for every time that it is named)."""
        np.add.at(self.holders, blocks, 1)
        self.sharing = self.sharing or bool(len(blocks))

    def release(self, blocks: I32) -> None:
        """Take a holder from each of these blocks; one that has none left is free.

        Raises:
            CacheError: a block has no holder. Nothing has been changed.
        """
        named, times = np.unique(blocks, return_counts=True)
        left = self.holders[named] - times
        if (left < 0).any():
            raise CacheError(f"block {int(named[left < 0][0])} is released more often than it is held")
        self.holders[named] = left
        self._free.extend(named[left == 0][::-1].tolist())
        self.sharing = self.sharing and bool((self.holders > 1).any())
