"""Arrays of the user's library, to JAX and back: DLPack where they are on one device, without a copy where it can be.

Imports JAX. NumPy's and torch's arrays on the CPU are handed over when the simulator runs; to a TPU they are moved.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_dispatch.contract.arrays import as_library, device_of, library_of
from attn_dispatch.errors import ArrayError

__all__ = ["check_out", "is_traced", "to_jax", "to_library", "with_rows"]

Array = Any


def check_out(out: Array | None) -> None:
    """Refuse an output that cannot be written to.

    Raises:
        ArrayError: it is a JAX array.
    """
    if out is not None and library_of(out) == "jax":
        raise ArrayError("out= is a JAX array, which nobody can write to: leave it out and use what run returns")


def is_traced(array: Array) -> bool:
    """Whether the array stands for one that does not exist yet (inside `jax.jit`)."""
    return isinstance(array, jax.core.Tracer)


def to_jax(name: str, array: Array) -> jax.Array:
    """Return the array as JAX's: the same memory, or, of a host array beside a TPU, a copy on the TPU.

    Raises:
        ArrayError: a torch tensor on a device that JAX does not share.
    """
    library = library_of(array)
    if library == "jax":
        return array
    if library == "torch" and device_of(array) != "cpu":
        raise ArrayError(
            f"{name} is a torch tensor on {array.device}; this cache's pages are JAX's. Allocate the cache with "
            f"device='torch:{array.device.type}', or move the tensor to the CPU"
        )
    moved = as_library(array, "jax")
    if jax.default_backend() == "tpu":
        moved = jax.device_put(moved, jax.devices()[0])
    return moved


def with_rows(array: Array, rows: int) -> Array:
    """Return the array with zeros below, up to a number of rows."""
    missing = rows - array.shape[0]
    if not missing:
        return array
    if library_of(array) == "numpy":
        return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
    if library_of(array) == "torch":
        return sys.modules["torch"].nn.functional.pad(array, (0, 0, 0, 0, 0, missing))
    return jnp.pad(array, ((0, missing), (0, 0), (0, 0)))


def to_library(array: jax.Array, library: str, out: Array | None) -> Array:
    """Return a result as an array of the user's library, in `out` if that was given."""
    if library == "jax":
        return array
    if jax.default_backend() == "tpu":
        array = jax.device_put(array, jax.devices("cpu")[0])
    if out is None:
        return np.array(array) if library == "numpy" else as_library(array, library)
    if library == "numpy":
        out[...] = np.asarray(array)
    else:
        out.copy_(as_library(array, "torch"))
    return out
