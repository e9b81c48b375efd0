"""`KVCache`: the paged key/value store of one layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.arrays import Array, as_library, library_of
from attn_dispatch.contract.dtypes import dtype_name, numpy_dtype
from attn_dispatch.contract.layout import CacheLayout, layout_named
from attn_dispatch.contract.spec import CacheGeometry
from attn_dispatch.errors import CacheError

__all__ = ["CacheOwner", "KVCache"]

Ids = Sequence[int] | npt.NDArray[np.integer]


class CacheOwner(Protocol):
    """What a cache asks of the backend that allocated it."""

    @property
    def name(self) -> str:
        """The backend's name."""

    def gather(self, cache: KVCache, blocks: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """See `KVCache.gather`."""

    def copy_blocks(self, cache: KVCache, src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64]) -> None:
        """See `KVCache.copy_blocks`."""

    def copy_slots(self, cache: KVCache, src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64]) -> None:
        """See `KVCache.copy_slots`."""

    def swap_blocks(
        self, cache: KVCache, other: KVCache, src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64]
    ) -> None:
        """See `KVCache.swap_blocks`."""

    def to_layout(self, cache: KVCache, layout: CacheLayout) -> KVCache:
        """See `KVCache.to_layout`."""


class KVCache:
    """One layer's keys and values, in blocks.

    Attributes:
        owner: the backend that allocated it, which copies and converts it.
        geometry: heads, head sizes, block size and stored type.
        layout: the physical order of `arrays`. Backends that declare an equal layout can share the cache.
        num_blocks: N.
        arrays: the physical arrays by the layout's names ("key", "value"...), of the owner's library.
        device: where they lie ("cpu", "cuda:0").
    """

    __slots__ = (
        "__weakref__",
        "_views",
        "arrays",
        "backend_state",
        "device",
        "geometry",
        "layout",
        "num_blocks",
        "owner",
    )

    def __init__(
        self,
        owner: CacheOwner,
        geometry: CacheGeometry,
        layout: CacheLayout,
        num_blocks: int,
        arrays: Mapping[str, Array],
        device: str = "cpu",
    ) -> None:
        self.owner = owner
        self.geometry = geometry
        self.layout = layout
        self.num_blocks = num_blocks
        self.arrays = dict(arrays)
        self._check()
        self.device = device
        self.backend_state: dict[str, object] = {}
        """What a backend keeps beside this cache (views of its arrays, say), by the backend's name."""
        self._views: dict[str, Mapping[str, Array]] = {}

    def _check(self) -> None:
        """Refuse arrays that are not what the layout says: a kernel would read or write past them.

        Raises:
            CacheError: naming the array, and what it should be.
        """
        shapes = self.layout.shapes(self.geometry, self.num_blocks)
        if not self.arrays.keys() <= shapes.keys():
            raise CacheError(
                f"a cache in layout {self.layout.name} consists of {', '.join(shapes)}; found {', '.join(self.arrays)}"
            )
        for name, array in self.arrays.items():
            shape = shapes[name]
            dtype = numpy_dtype("float32" if name.endswith("_scale") else self.geometry.dtype)
            if tuple(array.shape) != shape or numpy_dtype(dtype_name(array.dtype)) != dtype:
                raise CacheError(
                    f"the cache's {name} array is {dtype_name(array.dtype)} {tuple(array.shape)}; layout "
                    f"{self.layout.name} with {self.num_blocks} blocks of {self.geometry} needs {dtype.name} {shape}"
                )
        self.check_writable()

    def check_writable(self) -> None:
        """Refuse arrays that cannot be written: an engine may have locked them since.

        Raises:
            CacheError: naming the array.
        """
        for name, array in self.arrays.items():
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                raise CacheError(f"the cache's {name} array is read-only: new keys and values are written into it")

    @property
    def key(self) -> Array:
        """The physical array of keys (of a layout that has one)."""
        return self._array("key")

    @property
    def value(self) -> Array:
        """The physical array of values (of a layout that has one)."""
        return self._array("value")

    def _array(self, name: str) -> Array:
        if name not in self.arrays:
            raise CacheError(
                f"layout {self.layout.name} has no array {name!r}, but {', '.join(self.arrays)}; see gather()"
            )
        return self.arrays[name]

    def arrays_as(self, library: str) -> Mapping[str, Array]:
        """Return the same memory as arrays of another library (made once)."""
        if library not in self._views:
            own = {library_of(array) for array in self.arrays.values()} == {library}
            self._views[library] = (
                self.arrays if own else {name: as_library(array, library) for name, array in self.arrays.items()}
            )
        return self._views[library]

    def gather(self, block_ids: Ids) -> tuple[Array, Array]:
        """Return a copy of these blocks in logical order: key [n, K, B, D], value [n, K, B, Dv].

        Elements are as stored; a layer's per-tensor scale is not applied. A layout with scales of its own gives the
        values that they stand for, in float32.
        """
        return self.owner.gather(self, self._ids("block", block_ids, self.num_blocks))

    def copy_blocks(self, src: Ids, dst: Ids) -> None:
        """Copy whole blocks, `src[i]` to `dst[i]`, as if all were read before any is written.

        Raises:
            CacheError: a block outside the cache, or the same target twice. Nothing has been written.
        """
        pairs = self._pairs("block", src, dst, self.num_blocks, self.num_blocks)
        if len(pairs[0]):
            self.owner.copy_blocks(self, *pairs)

    def copy_slots(self, src: Ids, dst: Ids) -> None:
        """Copy single tokens, slot `src[i]` to slot `dst[i]` (a slot is `block * block_size + offset`).

        Raises:
            CacheError: a slot outside the cache, or the same target twice. Nothing has been written.
        """
        slots = self.num_blocks * self.geometry.block_size
        pairs = self._pairs("slot", src, dst, slots, slots)
        if len(pairs[0]):
            self.owner.copy_slots(self, *pairs)

    def swap_blocks(self, other: KVCache, pairs: Iterable[tuple[int, int]] | Mapping[int, int]) -> None:
        """Copy blocks out of this cache into another, which may be on another device: (own block, other's block) pairs.

        Raises:
            CacheError: the caches differ in shape or layout, or an id is out of range. Nothing has been written.
        """
        if other.geometry != self.geometry or other.layout != self.layout:
            raise CacheError(
                f"blocks move between caches that are alike: {self.layout.name} {self.geometry} is not "
                f"{other.layout.name} {other.geometry}; use to_layout() first"
            )
        listed = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
        src, dst = [pair[0] for pair in listed], [pair[1] for pair in listed]
        checked = self._pairs("block", src, dst, self.num_blocks, other.num_blocks)
        if listed:
            self.owner.swap_blocks(self, other, *checked)

    def to_layout(self, layout: str | CacheLayout) -> KVCache:
        """Return a new cache with the same contents in another layout: always a copy.

        Raises:
            CacheError: no such layout, or it cannot hold this cache's shape.
        """
        target = layout_named(layout) if isinstance(layout, str) else layout
        return self.owner.to_layout(self, target)

    def _ids(self, what: str, ids: Ids, limit: int) -> npt.NDArray[np.int64]:
        array = np.asarray(ids)
        if array.size == 0:
            return np.zeros(0, dtype=np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise CacheError(f"{what} ids must be whole numbers in one row, found {array.dtype.name} {array.shape}")
        if array.min() < 0 or array.max() >= limit:
            bad = int(array[(array < 0) | (array >= limit)][0])
            raise CacheError(f"{what} {bad} is outside the cache, which has {limit} ({what}s 0..{limit - 1})")
        return array.astype(np.int64)

    def _pairs(
        self, what: str, src: Ids, dst: Ids, src_limit: int, dst_limit: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        pairs = self._ids(what, src, src_limit), self._ids(what, dst, dst_limit)
        if len(pairs[0]) != len(pairs[1]):
            raise CacheError(f"{len(pairs[0])} source {what}s, {len(pairs[1])} targets: they go in pairs")
        ids, counts = np.unique(pairs[1], return_counts=True)
        if (counts > 1).any():
            raise CacheError(f"{what} {int(ids[counts > 1][0])} is the target of two copies at once")
        return pairs

    def __repr__(self) -> str:
        g = self.geometry
        return (
            f"KVCache({self.owner.name}, {self.layout.name}, {self.num_blocks} blocks of {g.block_size} tokens, "
            f"{g.num_kv_heads} heads of {g.head_size}/{g.value_head_size}, {g.dtype}, {self.device})"
        )
