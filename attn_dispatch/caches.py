"""`Caches`: the caches of all layers of a model as one thing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Self

from attn_dispatch.attention import Attention
from attn_dispatch.cache import ScheduledStep, Swap
from attn_dispatch.contract import KVCache
from attn_dispatch.errors import CacheError

__all__ = ["Caches"]


class Caches:
    """One `KVCache` per layer, of as many blocks each, whose blocks are copied and moved together.

        caches = ad.Caches(layers, num_blocks=1024)     # or Caches.within(layers, memory_bytes)
        step = manager.step(sequences)
        caches.apply(step)
        for layer, cache in zip(layers, caches): layer.run(plan, q, k, v, cache)

    Attributes:
        num_blocks: N of each.
    """

    def __init__(
        self,
        layers: Iterable[Attention],
        num_blocks: int,
        device: str | None = None,
        *,
        shared: Mapping[int, int] | None = None,
    ) -> None:
        """Allocate.

        Args:
            layers: of the model, in order.
            num_blocks: N, 1 or more.
            device: see `Attention.allocate`.
            shared: layer -> the earlier layer whose cache it reads, for those that have none of their own.

        Raises:
            CacheError: a layer shares the cache of one that has none.
        """
        shared = shared or {}
        self.num_blocks = num_blocks
        self._caches: list[KVCache] = []
        for i, layer in enumerate(layers):
            owner = shared.get(i)
            if owner is None:
                self._caches.append(layer.allocate(num_blocks, device))
            elif 0 <= owner < i and owner not in shared:
                self._caches.append(self._caches[owner])
            else:
                raise CacheError(
                    f"layer {i} cannot share the cache of layer {owner}: it has to be an earlier one's own"
                )
        self._own = list(dict.fromkeys(self._caches))

    @classmethod
    def within(
        cls,
        layers: Iterable[Attention],
        memory_bytes: int,
        device: str | None = None,
        *,
        shared: Mapping[int, int] | None = None,
    ) -> Self:
        """Allocate as many blocks as fit into this much memory.

        Raises:
            CacheError: not one does.
        """
        layers = list(layers)
        block = cls(layers, 1, device, shared=shared).block_bytes
        if memory_bytes < block:
            raise CacheError(f"one block of all layers needs {block} bytes, {memory_bytes} were given")
        return cls(layers, memory_bytes // block, device, shared=shared)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers together."""
        return sum(int(a.nbytes) // cache.num_blocks for cache in self._own for a in cache.arrays.values())

    def apply(self, step: ScheduledStep) -> None:
        """Make a step's copies, in every layer, before it runs."""
        if step.copy_from:
            for cache in self._own:
                cache.copy_blocks(step.copy_from, step.copy_to)

    def swap_out(self, host: Caches, swap: Swap) -> None:
        """Copy what the manager's `swap_out` names into the caches of the swap space."""
        for cache, other in zip(self._own, host._own, strict=True):
            cache.swap_blocks(other, swap.pairs)

    def swap_in(self, host: Caches, swap: Swap) -> None:
        """Copy what the manager's `swap_in` names out of the caches of the swap space."""
        host.swap_out(self, swap)

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self._caches)

    def __getitem__(self, layer: int) -> KVCache:
        return self._caches[layer]

    def __repr__(self) -> str:
        return f"Caches({len(self)} layers, {self.num_blocks} blocks of {self.block_bytes} bytes)"
