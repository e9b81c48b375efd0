"""`BlockPool`: reference counts of blocks. Blocks are ids; what is stored in them is of no concern here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from attn_dispatch.errors import CacheError

__all__ = ["BlockPool", "Scrub"]

Scrub = Callable[[list[int]], None]
"""Overwrites blocks that have become free, before another sequence can get them."""


class BlockPool:
    """A free list with reference counts.

    A block is free, or referenced by sequences, or cached (it stores a prefix), or both of the latter. A cached block
    that no sequence references is evictable: it stays as it is until room is needed, least recently used first.

    A block that becomes free is scrubbed at the end of the manager's call (`scrub_freed`), or, when its contents are
    still to be copied elsewhere, just before it is allocated again. If scrubbing raises, the block stays free and
    is scrubbed again before anybody gets it.

    Attributes:
        num_blocks: N.
        ref_counts: references of sequences to each block.
        cached: 1 for each block in the prefix cache.
        evictable: blocks that are cached and not referenced, least recently used first. (An ordered dictionary as a
            linked list: any block leaves in O(1).)
        num_shared: blocks with more than one reference.
    """

    def __init__(self, num_blocks: int, scrub: Scrub | None = None) -> None:
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 0:
            raise CacheError(f"num_blocks={num_blocks!r} must be a whole number, 0 or more")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.cached = bytearray(num_blocks)
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.num_shared = 0
        self._scrub = scrub
        self._freed: dict[int, None] = {}  # free, to be scrubbed at the end of this call
        self._copied_later: set[int] = set()  # free, to be scrubbed when they are allocated
        self._free = list(range(num_blocks - 1, -1, -1))  # allocated from the end: low ids first

    @property
    def num_free(self) -> int:
        """Blocks that store nothing."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that could be allocated: free ones, and evictable ones."""
        return len(self._free) + len(self.evictable)

    @property
    def in_use(self) -> int:
        """Blocks that sequences reference."""
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks with one reference each.

        Raises:
            CacheError: fewer are free; the caller evicts first. None has been allocated (nor if scrubbing raises).
        """
        if count > len(self._free):
            raise CacheError(f"{count} blocks are to be allocated, {len(self._free)} are free")
        if not count:
            return []
        blocks = self._free[-count:][::-1]
        self._run_scrub([block for block in blocks if block in self._freed or block in self._copied_later])
        del self._free[-count:]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these blocks, which are referenced or cached already."""
        counts = self.ref_counts
        for block in blocks:
            count = counts[block]
            if count == 0:
                if not self.cached[block]:
                    raise CacheError(f"block {block} is free: allocate it before it is shared")
                del self.evictable[block]
            elif count == 1:
                self.num_shared += 1
            counts[block] = count + 1

    def release(self, blocks: Iterable[int], *, copied_later: bool = False) -> None:
        """Remove a reference from each of these blocks, in this order.

        A prefix's blocks are released from its end to its beginning: the order in which they are evicted.

        Args:
            blocks: their ids.
            copied_later: the caller still has to copy their contents (swapping): they are scrubbed when they are
                allocated again.

        Raises:
            CacheError: a block has no reference.
        """
        freed = []
        counts = self.ref_counts
        for block in blocks:
            count = counts[block] - 1
            if count < 0:
                raise CacheError(f"block {block} is released, but no sequence references it")
            counts[block] = count
            if count == 1:
                self.num_shared -= 1
            elif count == 0:
                if self.cached[block]:
                    self.evictable[block] = None
                else:
                    freed.append(block)
        self._add_free(freed, copied_later)

    def mark_cached(self, block: int) -> None:
        """Put a block that a sequence references into the prefix cache."""
        if not self.ref_counts[block] or self.cached[block]:
            state = "cached already" if self.cached[block] else "free"
            raise CacheError(f"block {block} cannot be cached: it is {state}")
        self.cached[block] = 1

    def evict(self, blocks: Iterable[int]) -> None:
        """Remove blocks from the prefix cache; those without a reference are free."""
        freed = []
        for block in blocks:
            if not self.cached[block]:
                raise CacheError(f"block {block} is evicted, but not cached")
            self.cached[block] = 0
            if not self.ref_counts[block]:
                del self.evictable[block]
                freed.append(block)
        self._add_free(freed, copied_later=False)

    def grow(self, num_blocks: int) -> None:
        """Add free blocks, up to this many in all: the new ones are allocated last.

        Raises:
            CacheError: there are more already.
        """
        more = num_blocks - self.num_blocks
        if more < 0:
            raise CacheError(f"a pool of {self.num_blocks} blocks cannot become one of {num_blocks}")
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
        self.ref_counts += [0] * more
        self.cached += bytes(more)
        self.num_blocks = num_blocks

    def scrub_freed(self) -> None:
        """Scrub the blocks that this call of the manager has freed; its state is consistent by now."""
        if self._freed:
            self._run_scrub(list(self._freed))

    def _add_free(self, freed: list[int], copied_later: bool) -> None:
        self._free.extend(reversed(freed))
        if self._scrub is not None:
            if copied_later:
                self._copied_later.update(freed)
            else:
                self._freed.update(dict.fromkeys(freed))

    def _run_scrub(self, blocks: list[int]) -> None:
        if blocks and self._scrub is not None:
            self._scrub(list(blocks))
            for block in blocks:
                self._freed.pop(block, None)
                self._copied_later.discard(block)
