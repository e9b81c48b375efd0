"""`PairCache`: two caches that go together: of the first and the second head of every pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attn_dispatch.contract import KVCache
from attn_dispatch.contract.kv_cache import Ids
from attn_dispatch.errors import CacheError

__all__ = ["PairCache"]


class PairCache:
    """The caches of a pair's two maps. Whatever moves blocks moves those of both.

    Attributes:
        caches: (of the first heads, of the second heads).
    """

    __slots__ = ("_crossed", "caches")

    def __init__(self, first: KVCache, second: KVCache) -> None:
        if first.num_blocks != second.num_blocks:
            raise CacheError(f"a pair's caches have {first.num_blocks} and {second.num_blocks} blocks")
        self.caches = (first, second)
        self._crossed: tuple[KVCache, KVCache] | None = None

    @property
    def num_blocks(self) -> int:
        """N."""
        return self.caches[0].num_blocks

    def copy_blocks(self, src: Ids, dst: Ids) -> None:
        """See `KVCache.copy_blocks`."""
        for cache in self.caches:
            cache.copy_blocks(src, dst)

    def copy_slots(self, src: Ids, dst: Ids) -> None:
        """See `KVCache.copy_slots`."""
        for cache in self.caches:
            cache.copy_slots(src, dst)

    def swap_blocks(self, other: PairCache, pairs: Iterable[tuple[int, int]] | Mapping[int, int]) -> None:
        """See `KVCache.swap_blocks`."""
        listed = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.swap_blocks(theirs, listed)

    def crossed(self) -> tuple[KVCache, KVCache]:
        """Return (first keys, second values) and (second keys, first values): views, made anew when arrays change."""
        first, second = self.caches
        arrays = (first.arrays, second.arrays)
        if self._crossed is None or not all(
            self._crossed[i].arrays[name] is arrays[i if name.startswith("key") else 1 - i][name]
            for i in (0, 1)
            for name in arrays[i]
        ):
            self._crossed = (self._cross(first, second), self._cross(second, first))
        return self._crossed

    @staticmethod
    def _cross(keys: KVCache, values: KVCache) -> KVCache:
        if any(not name.startswith(("key", "value")) for name in keys.arrays):
            raise CacheError(f"layout {keys.layout.name} keeps keys and values in one array: it cannot be taken apart")
        arrays = {name: (keys if name.startswith("key") else values).arrays[name] for name in keys.arrays}
        return KVCache(keys.owner, keys.geometry, keys.layout, keys.num_blocks, arrays, keys.device)
