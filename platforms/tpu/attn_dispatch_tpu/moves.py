"""Copies within and between functional caches: each makes the next version of the arrays. Imports JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import CacheLayout, KVCache
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import CacheError

from .cache import FunctionalCache
from .exchange import device_named

__all__ = ["copy_blocks", "copy_slots", "gather", "swap_blocks", "to_layout"]

Array = Any
Ids = npt.NDArray[np.int64]


def gather(cache: KVCache, blocks: Ids) -> tuple[Array, Array]:
    """Return a copy of blocks in logical order, by way of NumPy: for a cache on the CPU."""
    axis_of = cache.layout.block_axis
    picked = {name: np.take(np.asarray(array), blocks, axis_of(name)) for name, array in _live(cache).items()}
    key, value = cache.layout.to_logical(picked)
    return jnp.array(key), jnp.array(value)


def copy_blocks(cache: KVCache, src: Ids, dst: Ids) -> None:
    """Copy blocks within a cache."""
    (cache,) = _functional(cache)
    for name in cache.arrays:
        cache.replace(name, _copied(cache.live(name), _ids(src), _ids(dst), axes=(cache.layout.block_axis(name),)))


def copy_slots(cache: KVCache, src: Ids, dst: Ids) -> None:
    """Copy tokens within a cache."""
    (cache,) = _functional(cache)
    size = cache.geometry.block_size
    for name in cache.arrays:
        places = _ids(*np.divmod(src, size)), _ids(*np.divmod(dst, size))
        cache.replace(name, _copied(cache.live(name), *places, axes=cache.layout.slot_axes(name)))


def swap_blocks(cache: KVCache, other: KVCache, src: Ids, dst: Ids) -> None:
    """Copy blocks into another cache, which may lie on another device.

    Raises:
        CacheError: its arrays are not JAX's.
    """
    cache, other = _functional(cache, other)
    for name in cache.arrays:
        axis, target = cache.layout.block_axis(name), other.live(name)
        rows = jax.device_put(cache.live(name)[(slice(None),) * axis + (src,)], next(iter(target.devices())))
        other.replace(name, _received(target, _ids(dst), rows, axes=(axis,)))


def to_layout(cache: KVCache, layout: CacheLayout) -> KVCache:
    """Return a copy of a cache in another layout, on the same device."""
    shapes = layout.shapes(cache.geometry, cache.num_blocks)
    arrays = {name: np.zeros(shape, numpy_dtype(cache.geometry.dtype)) for name, shape in shapes.items()}
    layout.put_logical(arrays, *cache.layout.to_logical({n: np.asarray(x) for n, x in _live(cache).items()}))
    device = device_named(cache.device, simulated=False)
    moved = {name: jax.device_put(array, device) for name, array in arrays.items()}
    return FunctionalCache(cache.owner, cache.geometry, layout, cache.num_blocks, moved, cache.device)


def _live(cache: KVCache) -> dict[str, Array]:
    """Return a cache's arrays, also of one that is a view of somebody's memory."""
    return {
        name: cache.live(name) if isinstance(cache, FunctionalCache) else cache.arrays[name] for name in cache.arrays
    }


def _functional(*caches: KVCache) -> list[FunctionalCache]:
    for cache in caches:
        if not isinstance(cache, FunctionalCache):
            raise CacheError(f"{cache!r} holds no arrays of JAX: blocks move between caches of one library's arrays")
    return list(caches)  # type: ignore[arg-type]


def _ids(*ids: Ids) -> tuple[Array, ...]:
    return tuple(jnp.asarray(each, jnp.int32) for each in ids)


def _at(axes: tuple[int, ...], ids: tuple[Array, ...], ndim: int) -> tuple[Any, ...]:
    index: list[Any] = [slice(None)] * ndim
    for axis, each in zip(axes, ids, strict=True):
        index[axis] = each
    return tuple(index)


@partial(jax.jit, static_argnames=("axes",), donate_argnums=(0,))
def _copied(array: Array, src: tuple[Array, ...], dst: tuple[Array, ...], *, axes: tuple[int, ...]) -> Array:
    # All sources are read before any target is written: the gather is an operand of the scatter.
    return array.at[_at(axes, dst, array.ndim)].set(array[_at(axes, src, array.ndim)])


@partial(jax.jit, static_argnames=("axes",), donate_argnums=(0,))
def _received(array: Array, dst: tuple[Array, ...], rows: Array, *, axes: tuple[int, ...]) -> Array:
    return array.at[_at(axes, dst, array.ndim)].set(rows)
