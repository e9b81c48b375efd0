"""`BlockPool`: who holds each block. Blocks are ids; what they hold is of no concern here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from attn_dispatch.errors import CacheError

__all__ = ["BlockPool", "Scrub"]

Scrub = Callable[[list[int]], None]
"""Called with the ids of blocks that have just become free, before anybody else can get them."""


class BlockPool:
    """A free list with reference counts.

    A block is free, or held by sequences, or kept by the prefix cache, or both. One that is kept and held by nobody is
    idle: it stays as it is until room is needed, and the one that has been idle longest goes first.

    Attributes:
        num_blocks: N.
        holders: sequences that hold each block.
        kept: 1 for each block that the prefix cache keeps.
        idle: blocks that are kept and not held, the longest idle first. (An ordered dictionary as a linked list: any
            block leaves in O(1).)
        shared: blocks with more than one holder.
    """

    def __init__(self, num_blocks: int, scrub: Scrub | None = None) -> None:
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 0:
            raise CacheError(f"num_blocks={num_blocks!r} must be a whole number, 0 or more")
        self.num_blocks = num_blocks
        self.holders = [0] * num_blocks
        self.kept = bytearray(num_blocks)
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.shared = 0
        self._scrub = scrub
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: low ids first

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free ones, and idle ones once they are evicted."""
        return len(self._free) + len(self.idle)

    @property
    def in_use(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def take(self, count: int) -> list[int]:
        """Return `count` free blocks with one holder each.

        Raises:
            CacheError: fewer are free; the caller evicts first. None has been taken.
        """
        if count > len(self._free):
            raise CacheError(f"{count} blocks are to be taken, {len(self._free)} are free")
        if not count:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for block in taken:
            self.holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks, which are held or kept already."""
        holders = self.holders
        for block in blocks:
            count = holders[block]
            if count == 0:
                if not self.kept[block]:
                    raise CacheError(f"block {block} is free: it is taken, not held")
                del self.idle[block]
            elif count == 1:
                self.shared += 1
            holders[block] = count + 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take a holder from each of these blocks, in this order.

        A prefix's blocks are released from its end to its beginning: the order in which idle ones are evicted.

        Raises:
            CacheError: a block has no holder.
        """
        freed = []
        holders = self.holders
        for block in blocks:
            count = holders[block] - 1
            if count < 0:
                raise CacheError(f"block {block} is released, but nobody holds it")
            holders[block] = count
            if count == 1:
                self.shared -= 1
            elif count == 0:
                if self.kept[block]:
                    self.idle[block] = None
                else:
                    freed.append(block)
        self._give_back(freed)

    def keep(self, block: int) -> None:
        """Let the prefix cache keep a block that a sequence holds."""
        if not self.holders[block] or self.kept[block]:
            raise CacheError(f"block {block} cannot be kept: it is {'kept already' if self.kept[block] else 'free'}")
        self.kept[block] = 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Let the prefix cache give up blocks; those that nobody holds are free."""
        freed = []
        for block in blocks:
            if not self.kept[block]:
                raise CacheError(f"block {block} is dropped, but not kept")
            self.kept[block] = 0
            if not self.holders[block]:
                del self.idle[block]
                freed.append(block)
        self._give_back(freed)

    def grow(self, num_blocks: int) -> None:
        """Add free blocks, up to this many in all: the new ones are taken last.

        Raises:
            CacheError: there are more already.
        """
        more = num_blocks - self.num_blocks
        if more < 0:
            raise CacheError(f"a pool of {self.num_blocks} blocks cannot become one of {num_blocks}")
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
        self.holders += [0] * more
        self.kept += bytes(more)
        self.num_blocks = num_blocks

    def _give_back(self, freed: list[int]) -> None:
        if freed:
            if self._scrub is not None:
                self._scrub(freed)
            self._free.extend(reversed(freed))
