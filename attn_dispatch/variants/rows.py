"""Rows of arrays of the user's library: picked, put back, made. Nothing here imports torch or jax."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.arrays import Array, library_of
from attn_dispatch.contract.dtypes import numpy_dtype

__all__ = ["Rows", "concatenate", "new", "put", "take"]

Rows = slice | npt.NDArray[np.int64] | None
"""Which rows: None for all of them."""


def module_of(array: Array) -> Any:
    """Return the library's own module, which whoever made the array has imported."""
    library = library_of(array)
    return np if library == "numpy" else sys.modules["torch" if library == "torch" else "jax.numpy"]


def take(array: Array, rows: Rows) -> Array:
    """Return some rows: a view for a slice."""
    return array if rows is None else array[rows]


def put(target: Array, rows: Rows, values: Array) -> Array:
    """Return the target with these rows set: itself, unless its library's arrays never change."""
    if library_of(target) == "jax":
        return target.at[slice(None) if rows is None else rows].set(values)
    target[slice(None) if rows is None else rows] = values
    return target


def new(like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
    """Return an array of zeros beside another one: same library, same device; `dtype` by canonical name, or its own."""
    if library_of(like) == "torch":
        kind = like.dtype if dtype is None else getattr(module_of(like), dtype)
        return like.new_zeros(shape, dtype=kind)
    return module_of(like).zeros(shape, like.dtype if dtype is None else numpy_dtype(dtype))


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """Return arrays of one library joined along an axis."""
    return module_of(arrays[0]).concatenate(arrays, axis)
