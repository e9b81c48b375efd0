"""Devices by name, and arrays of the user's library to JAX and back. Imports JAX.

NumPy's and torch's arrays on the CPU are exchanged by DLPack, without a copy, when the simulator runs; to a TPU they
are moved.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attn_dispatch as ad
from attn_dispatch.contract.arrays import as_library, device_of, library_of
from attn_dispatch.errors import ArrayError, CacheError, MissingPackageError

__all__ = ["check_out", "device_named", "first_rows", "is_traced", "name_of", "to_jax", "to_library", "with_rows"]

Array = Any


def device_named(name: str | None, simulated: bool) -> Any:
    """Return a device of JAX ("tpu:0", "cpu"); None: the one that kernels run on.

    Raises:
        MissingPackageError: this machine's TPU is not JAX's.
        CacheError: JAX has no such device.
    """
    if name is None and simulated:
        return jax.devices("cpu")[0]
    if name is None:
        if jax.default_backend() != "tpu":
            raise MissingPackageError(
                f"this machine has a TPU ({ad.platform.description}), but JAX runs on {jax.default_backend()}: its "
                "libtpu is missing or another process holds the TPU. pip install 'jax[tpu]'"
            )
        return jax.devices()[0]
    kind, _, index = name.partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        devices = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
        raise CacheError(f"device={name!r}: JAX has {devices} ({error})") from error


def name_of(array: Array) -> str:
    """Return the name of the device that an array lies on."""
    device = next(iter(array.devices()))
    return "cpu" if device.platform == "cpu" else f"{device.platform}:{device.id}"


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
            f"{name} is a torch tensor on {array.device}; this cache's pages are JAX's: move it to the CPU, or give a "
            "JAX array"
        )
    moved = as_library(array, "jax")
    return jax.device_put(moved, jax.devices()[0]) if jax.default_backend() == "tpu" else moved


def with_rows(array: Array, rows: int) -> Array:
    """Return the array with zeros below, up to a number of rows."""
    missing = rows - array.shape[0]
    if not missing:
        return array
    padding = ((0, missing), (0, 0), (0, 0))
    # On a CPU a copy costs less than compiling one for each number of rows.
    return jnp.asarray(np.pad(np.asarray(array), padding)) if _on_host(array) else jnp.pad(array, padding)


def first_rows(array: Array, rows: int) -> Array:
    """Return the first rows of an array."""
    if array.shape[0] == rows:
        return array
    return jnp.asarray(np.asarray(array)[:rows]) if _on_host(array) else array[:rows]


def _on_host(array: Array) -> bool:
    return not is_traced(array) and next(iter(array.devices())).platform == "cpu"


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
