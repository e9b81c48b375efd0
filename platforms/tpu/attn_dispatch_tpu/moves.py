"""Copies within and between functional caches: each makes the next version of the arrays. Imports JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

__all__ = ["copied", "received"]

Array = Any
Ids = npt.NDArray[np.int64]


def copied(array: Array, axes: tuple[int, ...], src: tuple[Ids, ...], dst: tuple[Ids, ...]) -> Array:
    """Return an array with what lies at `src` also at `dst` (ids along each axis); the argument is donated."""
    return _copied(array, _whole(src), _whole(dst), axes=axes)


def received(array: Array, axes: tuple[int, ...], dst: tuple[Ids, ...], rows: Array) -> Array:
    """Return an array with `rows` (which come from elsewhere) at `dst`; the argument is donated."""
    return _received(array, _whole(dst), rows, axes=axes)


def _whole(ids: tuple[Ids, ...]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(each, jnp.int32) for each in ids)


def _at(axes: tuple[int, ...], ids: tuple[Array, ...], ndim: int) -> tuple[Any, ...]:
    at: list[Any] = [slice(None)] * ndim
    for axis, each in zip(axes, ids, strict=True):
        at[axis] = each
    return tuple(at)


@partial(jax.jit, static_argnames=("axes",), donate_argnums=(0,))
def _copied(array: Array, src: tuple[Array, ...], dst: tuple[Array, ...], *, axes: tuple[int, ...]) -> Array:
    # All sources are read before any target is written: the gather is an operand of the scatter.
    return array.at[_at(axes, dst, array.ndim)].set(array[_at(axes, src, array.ndim)])


@partial(jax.jit, static_argnames=("axes",), donate_argnums=(0,))
def _received(array: Array, dst: tuple[Array, ...], rows: Array, *, axes: tuple[int, ...]) -> Array:
    return array.at[_at(axes, dst, array.ndim)].set(rows)
