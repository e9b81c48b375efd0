"""`SharingMap`: layers that read another layer's cache and never write (Brandon et al., cross-layer attention, CLA).

sharing = SharingMap(specs, {1: 0, 3: 2})          # layer 1 reads layer 0's keys and values, 3 reads 2's
layers = [ad.attention(spec) for spec in sharing.specs]
caches = sharing.caches(lambda layer: layers[layer].allocate(1024))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import SpecError

__all__ = ["SharingMap"]

T = TypeVar("T")


class SharingMap:
    """Which layer's cache each layer of a model uses, checked once for the whole model.

    Attributes:
        specs: one per layer; of a layer that reads another's cache with `writes_kv=False`.
        sources: the layer whose cache each layer uses: its own number, or that of an earlier layer that writes.
    """

    def __init__(self, specs: Sequence[AttentionSpec], reads: Mapping[int, int]) -> None:
        """Check and resolve a map.

        Args:
            specs: one per layer, in the order in which they run.
            reads: layer -> the layer whose cache it reads; that one may read a third one's. Others have their own.

        Raises:
            SpecError: a layer that does not exist, a circle, a cache of another shape, or one that is written later.
        """
        count = len(specs)
        for layer, source in reads.items():
            for number in (layer, source):
                if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
                    raise SpecError(f"layer {layer} reads layer {source}: there are layers 0..{count - 1}")
        self.sources = tuple(self._source(layer, reads) for layer in range(count))
        for layer, source in enumerate(self.sources):
            if source > layer:
                raise SpecError(
                    f"layer {layer} reads the cache of layer {source}, which runs later: in this step it holds nothing "
                    "new. Let the earlier layer write"
                )
            mine, other = specs[layer], specs[source]
            if mine.geometry != other.geometry:
                raise SpecError(
                    f"layer {layer} needs a cache of {mine.geometry}, but layer {source}, whose cache it reads, has "
                    f"{other.geometry}"
                )
            if (mine.kind == "cross") != (other.kind == "cross"):
                raise SpecError(f"layer {layer} is {mine.kind}, layer {source} is {other.kind}: their tokens differ")
            if source == layer and not mine.writes_kv:
                raise SpecError(f"layer {layer} says writes_kv=False, but reads no other layer's cache")
        self.specs = tuple(
            spec if self.sources[layer] == layer else replace(spec, writes_kv=False) for layer, spec in enumerate(specs)
        )

    @staticmethod
    def _source(layer: int, reads: Mapping[int, int]) -> int:
        seen = [layer]
        while seen[-1] in reads:
            following = reads[seen[-1]]
            if following in seen:
                circle = " -> ".join(map(str, [*seen[seen.index(following) :], following]))
                raise SpecError(f"layers read each other's caches in a circle: {circle}")
            seen.append(following)
        return seen[-1]

    @classmethod
    def every(cls, specs: Sequence[AttentionSpec], factor: int) -> SharingMap:
        """Return a map in which runs of `factor` neighbouring layers share the first one's cache (CLA2, CLA3...)."""
        if factor < 1:
            raise SpecError(f"factor={factor} must be 1 or more")
        return cls(specs, {layer: layer - layer % factor for layer in range(len(specs)) if layer % factor})

    def owns(self, layer: int) -> bool:
        """Tell whether a layer has a cache of its own."""
        return self.sources[layer] == layer

    @property
    def num_caches(self) -> int:
        """Caches of the whole model."""
        return len(set(self.sources))

    def caches(self, make: Callable[[int], T]) -> list[T]:
        """Return one cache per layer: made, by number, for those that own one; the same object for who reads it."""
        own = {layer: make(layer) for layer in sorted(set(self.sources))}
        return [own[source] for source in self.sources]
