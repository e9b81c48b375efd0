"""Arrays of the user's library: whose they are, what they hold, and the same memory as another library's array.

Nothing here imports torch or jax: whoever hands us one of their arrays has imported them already.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.dtypes import dtype_name, numpy_dtype
from attn_dispatch.errors import ArrayError

__all__ = [
    "Array",
    "as_library",
    "as_numpy",
    "device_of",
    "empty_like",
    "library_of",
    "permute",
]

Array = Any
"""A NumPy array, a torch tensor, a JAX array: whatever has a shape and a dtype. Checked by `library_of`."""

LIBRARIES = ("numpy", "torch", "jax")

_library_of_type: dict[type, str] = {}

_WITHOUT_MEMORY = {"torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor", "numpy.matrixlib.defmatrix"}
"""Modules of array types that stand for arrays (or index otherwise): not what a kernel can be given."""

# Types that NumPy has by extension only travel between libraries as plain integers of the same width.
_CARRIER: dict[str, type[np.generic]] = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}


def library_of(array: Array) -> str:
    """Return "numpy", "torch" or "jax".

    Raises:
        ArrayError: it is none of these.
    """
    kind = type(array)
    library = _library_of_type.get(kind)
    if library is None:
        # A subclass (torch.nn.Parameter, a user's own) belongs where its base does.
        roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
        names = ["jax" if root in ("jax", "jaxlib") else root for root in roots]
        library = next((name for name in names if name in LIBRARIES), None)
        if library is None or not hasattr(array, "dtype"):
            raise ArrayError(f"{kind.__module__}.{kind.__name__} is not an array of {', '.join(LIBRARIES)}")
        # What has no plain memory of its own: a kernel would compute with whatever lies at its address.
        if issubclass(kind, np.ma.MaskedArray) or any(base.__module__ in _WITHOUT_MEMORY for base in kind.__mro__):
            raise ArrayError(f"{kind.__module__}.{kind.__name__} is no plain array in memory: give a plain one")
        _library_of_type[kind] = library
    return library


def device_of(array: Array) -> str:
    """Return the device as text: "cpu", "cuda:0", "tpu:0"."""
    library = library_of(array)
    if library == "torch":
        return str(array.device)
    if library == "jax":
        devices = {f"{d.platform}:{d.id}" for d in array.devices()}
        return "cpu" if all(name.startswith("cpu") for name in devices) else ",".join(sorted(devices))
    return "cpu"


def as_numpy(array: Array) -> npt.NDArray[Any]:
    """Return the same memory as a NumPy array (bfloat16 and fp8 as `ml_dtypes`); JAX's is read-only.

    Raises:
        ArrayError: the array is on a device, or needs a gradient.
    """
    library = library_of(array)
    if library == "numpy":
        return array  # type: ignore[no-any-return]
    if device_of(array) != "cpu":
        raise ArrayError(f"an array on {device_of(array)} cannot be read as host memory; move it to the CPU first")
    if library == "jax":
        return np.asarray(array)
    name = dtype_name(array.dtype)
    tensor = array.detach() if array.requires_grad else array
    if name in _CARRIER:
        torch = sys.modules["torch"]
        carrier = torch.int16 if _CARRIER[name] is np.int16 else torch.uint8
        return tensor.view(carrier).numpy().view(numpy_dtype(name))  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def as_library(array: Array, library: str) -> Array:
    """Return the same memory as an array of `library` ("numpy", "torch", "jax"), without a copy where DLPack has none.

    The one exception is a JAX array as the target: JAX may copy what is not aligned to 64 bytes.
    """
    source = library_of(array)
    if source == library:
        return array
    if library == "numpy":
        return as_numpy(array)
    if library == "torch":
        torch = sys.modules.get("torch")
        if torch is None:
            raise ArrayError("a torch tensor is wanted, but torch has not been imported in this process")
        if source == "jax" and device_of(array) != "cpu":
            return torch.from_dlpack(array)
        host = as_numpy(array)
        name = dtype_name(host.dtype) if host.dtype.kind not in "biu" else ""
        plain = host.view(_CARRIER[name]) if name in _CARRIER else host
        tensor = _torch_from_numpy(torch, plain)
        return tensor.view(getattr(torch, name)) if name in _CARRIER else tensor
    if library == "jax":
        jax = sys.modules.get("jax")
        if jax is None:
            raise ArrayError("a JAX array is wanted, but jax has not been imported in this process")
        if source == "torch":
            return jax.dlpack.from_dlpack(array.detach().contiguous())
        return jax.numpy.asarray(array)
    raise ArrayError(f"library={library!r} is not one of {', '.join(LIBRARIES)}")


def _torch_from_numpy(torch: Any, array: npt.NDArray[Any]) -> Any:
    if array.flags.writeable:
        return torch.from_numpy(array)
    # torch has no read-only tensors and warns of each. Queries, new keys and new values are only ever read here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def empty_like(array: Array, shape: Sequence[int]) -> Array:
    """Return an array of another shape beside one: of its library, type and device. What it holds is undefined."""
    library = library_of(array)
    if library == "torch":
        return array.new_empty(tuple(shape))
    return (np if library == "numpy" else sys.modules["jax.numpy"]).empty(tuple(shape), array.dtype)


def permute(array: Array, axes: Sequence[int]) -> Array:
    """Return a view with its axes in this order, in any library."""
    return array.permute(*axes) if library_of(array) == "torch" else array.transpose(*axes)
