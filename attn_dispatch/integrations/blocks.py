"""`GrowingPool`: the cache manager's pool, for a client that does not know beforehand how many blocks it will want."""

from __future__ import annotations

from attn_dispatch.cache import BlockPool
from attn_dispatch.errors import CacheError

__all__ = ["GrowingPool"]


class GrowingPool(BlockPool):
    """A block pool that makes more blocks when none is free (a cache of `num_blocks` has to follow), if it may.

    Attributes:
        grows: whether it may.
    """

    def __init__(self, num_blocks: int, *, grows: bool = False) -> None:
        super().__init__(num_blocks)
        if num_blocks < 1:
            raise CacheError(f"num_blocks={num_blocks} must be 1 or more")
        self.grows = grows

    @property
    def in_use(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[int]:
        """Return `count` free blocks, each with one holder.

        Raises:
            CacheError: there are not as many, and the pool may not grow. None has been taken.
        """
        if count > self.num_free:
            if not self.grows:
                raise CacheError(
                    f"{count} blocks are needed and {self.num_free} of {self.num_blocks} are free: give the cache more "
                    "with num_blocks=, or run fewer or shorter sequences at once"
                )
            self._grow(max(self.num_blocks, count))
        return super().take(count)

    def _grow(self, more: int) -> None:
        self._free[:0] = range(self.num_blocks + more - 1, self.num_blocks - 1, -1)
        self.holders += [0] * more
        self.kept += bytes(more)
        self.num_blocks += more
