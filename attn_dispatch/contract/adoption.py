"""Memory that an engine owns, as a `KVCache`: checked, never copied, never zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.arrays import Array, device_of, library_of
from attn_dispatch.contract.kv_cache import CacheOwner, KVCache
from attn_dispatch.contract.layout import CacheLayout
from attn_dispatch.contract.spec import CacheGeometry
from attn_dispatch.errors import CacheError

__all__ = ["CacheViews", "adopt"]

CacheViews = Literal["strided", "blocks", "dense"]
"""What a backend reads and writes in place: any strides with a dense last axis; blocks that are dense inside and may
lie apart; contiguous arrays alone."""


def adopt(
    owner: CacheOwner, geometry: CacheGeometry, layout: CacheLayout, arrays: Mapping[str, Array], views: CacheViews
) -> KVCache:
    """Return a cache over an engine's arrays.

    Args:
        owner: the backend that will read and write them.
        geometry: heads, head sizes, block size and stored type.
        layout: the order of the arrays' axes.
        arrays: by the layout's names.
        views: what the backend can read and write in place.

    Raises:
        CacheError: shapes, types, devices or strides that would give wrong results or lose what is written.
    """
    libraries = {library_of(array) for array in arrays.values()}
    devices = {device_of(array) for array in arrays.values()}
    if len(libraries) > 1 or len(devices) > 1 or libraries == {"jax"}:
        raise CacheError(
            f"arrays of {', '.join(sorted(libraries))} on {', '.join(sorted(devices))}: a cache is one library's "
            "memory on one device, which can be written in place"
        )
    first = next(iter(arrays))
    axis = layout.block_axis(first)
    if len(arrays[first].shape) <= axis:
        raise CacheError(
            f"the cache's {first} array has shape {tuple(arrays[first].shape)}, which has no axis of blocks"
        )
    cache = KVCache(owner, geometry, layout, int(arrays[first].shape[axis]), arrays, devices.pop())
    if cache.arrays.keys() != layout.shapes(geometry, cache.num_blocks).keys():
        raise CacheError(f"layout {layout.name} consists of {', '.join(layout.shapes(geometry, 1))}")
    footprints = {name: _footprint(array) for name, array in arrays.items()}
    for name, memory in footprints.items():
        _check_strides(name, memory, layout.block_axis(name), views, owner.name)
    names = list(footprints)
    for i, name in enumerate(names):
        for other in names[:i]:
            if np.shares_memory(footprints[name], footprints[other]):
                raise CacheError(f"the cache's {name} and {other} arrays overlap: one would be written over the other")
    return cache


class _Memory:
    """Shape, strides and address of an array on any device, as NumPy describes memory; nothing is read."""

    def __init__(self, array: Any) -> None:
        size = array.element_size()
        self.__array_interface__ = {
            "data": (array.data_ptr(), False),
            "shape": tuple(array.shape),
            "strides": tuple(stride * size for stride in array.stride()),
            "typestr": f"|V{size}",
            "version": 3,
        }


def _footprint(array: Array) -> npt.NDArray[Any]:
    """Return an array of the same shape and strides at the same address, only to compute with these."""
    return array if isinstance(array, np.ndarray) else np.asarray(_Memory(array))


def _check_strides(name: str, memory: npt.NDArray[Any], axis: int, views: CacheViews, owner: str) -> None:
    sizes, strides, item = memory.shape, memory.strides, memory.itemsize
    what = f"the cache's {name} array {sizes} with strides {tuple(s // item for s in strides)} (in elements)"
    if sizes[-1] > 1 and strides[-1] != item:
        raise CacheError(f"{what}: the elements of a head must lie side by side")
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1):
        if stride <= reach:
            raise CacheError(f"{what} overlaps itself, or goes backwards: a token would be written over another")
        reach += stride * (size - 1)
    inside = memory[(slice(None),) * axis + (0,)] if sizes[axis] else memory
    if views == "dense" and not memory.flags.c_contiguous:
        raise CacheError(f"{what} is a view: {owner} reads and writes contiguous arrays alone")
    if views == "blocks" and not inside.flags.c_contiguous:
        raise CacheError(f"{what}: {owner} reads and writes blocks that are contiguous inside")
