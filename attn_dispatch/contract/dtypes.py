"""Names of element types: one spelling for NumPy's, torch's and JAX's own objects.

The core talks of types by name ("bfloat16"), because the libraries that own the arrays need not be installed.
"""

from __future__ import annotations

from collections.abc import Hashable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from attn_dispatch.errors import SpecError

__all__ = ["CACHE_DTYPES", "COMPUTE_DTYPES", "FINITE_MAX", "dtype_name", "is_quantised", "itemsize", "numpy_dtype"]

COMPUTE_DTYPES = ("float32", "float16", "bfloat16", "float64")
"""What queries, new keys, new values and outputs can be."""

_NUMPY: dict[str, np.dtype[np.generic]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
    # Asymmetric integer caches (value = (stored - zero point) * scale) exist in vendors' packed layouts only.
    "uint8": np.dtype(np.uint8),
    "uint4": np.dtype(np.uint8),
}

CACHE_DTYPES = tuple(_NUMPY)
"""What a cache can store."""

FINITE_MAX: dict[str, float] = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
"""Largest magnitude that a quantised type stores; writing saturates there, on every backend alike."""

_ALIASES = {
    "fp64": "float64", "f64": "float64", "double": "float64",
    "fp32": "float32", "f32": "float32", "float": "float32",
    "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "float8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2", "e5m2": "float8_e5m2",
    "i8": "int8", "u8": "uint8", "u4": "uint4",
}  # fmt: skip

_seen: dict[Hashable, str] = {}


def dtype_name(dtype: object) -> str:
    """Return the canonical name of a type given as a name, an alias or any library's own type object.

    Args:
        dtype: "bf16", `numpy.dtype`, `torch.bfloat16`, `jax.numpy.bfloat16`...

    Raises:
        SpecError: the type is none of `CACHE_DTYPES`.
    """
    # `run` asks this for every array of every layer: one dictionary look-up after the first time.
    # (NumPy's types hash alike to their names, hence the class in the key.)
    key = (type(dtype), dtype)
    try:
        known = _seen.get(key)
    except TypeError:  # not hashable: no library's type object
        raise SpecError(f"dtype={dtype!r} is not a type. Known: {', '.join(CACHE_DTYPES)}") from None
    if known is None:
        known = _seen[key] = _canonical(dtype)
    return known


def _canonical(dtype: object) -> str:
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
    elif type(dtype).__module__.partition(".")[0] == "torch":
        name = str(dtype).removeprefix("torch.")
    else:
        try:
            plain = np.dtype(dtype)  # type: ignore[call-overload]
            if not plain.isnative:
                raise SpecError(f"dtype={dtype!r} has the other byte order: convert it to the machine's own")
            name = plain.name
        except TypeError:
            name = getattr(dtype, "__name__", repr(dtype))
    name = _ALIASES.get(name, name)
    if name not in _NUMPY:
        raise SpecError(f"dtype={dtype!r} is not known. Known: {', '.join(CACHE_DTYPES)}")
    return name


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """Return the NumPy type of a canonical name (`ml_dtypes` for bfloat16 and fp8)."""
    return _NUMPY[name]


def itemsize(name: str) -> float:
    """Return the bytes of one element (0.5 for uint4)."""
    return 0.5 if name == "uint4" else float(_NUMPY[name].itemsize)


def is_quantised(name: str) -> bool:
    """Tell whether a cache of this type stores `round(x / scale)` rather than `x`."""
    return name not in COMPUTE_DTYPES


def quantise(x: npt.NDArray[np.generic], name: str, scale: float) -> npt.NDArray[np.generic]:
    """Return what a cache of type `name` stores for `x`: `round(x / scale)`, saturated at the type's largest value.

    The one definition of clause 12's rounding (to nearest, ties to even); without a scale it is a plain cast.
    """
    if not is_quantised(name):
        return x.astype(_NUMPY[name])
    limit = FINITE_MAX[name]
    scaled = np.clip(x.astype(np.float32) / np.float32(scale), -limit, limit)
    stored: npt.NDArray[np.generic] = (np.rint(scaled) if name == "int8" else scaled).astype(_NUMPY[name])
    return stored
