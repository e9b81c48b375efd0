"""Numbers that an engine gives for a batch, as arrays of our own: whole, in range, of the width that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.errors import MetadataError

__all__ = ["I32", "I64", "INT32_MAX", "as_lengths", "as_slots", "as_table", "exact", "start_loc_of"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

INT32_MAX = 2**31 - 1


def start_loc_of(lens: I32) -> I32:
    """Return the sums of lengths, i32[S + 1].

    Raises:
        MetadataError: there are more tokens than int32 counts.
    """
    start = np.zeros(len(lens) + 1, np.int64)
    np.cumsum(lens, out=start[1:])
    if start[-1] > INT32_MAX:
        raise MetadataError(f"the batch has {int(start[-1])} tokens, at most {INT32_MAX} can be counted")
    return start.astype(np.int32)


def _whole(name: str, array: npt.NDArray[Any], ndim: int) -> npt.NDArray[Any]:
    if type(array) is not np.ndarray:
        raise MetadataError(f"{name} is a {type(array).__module__}.{type(array).__name__}: needs a plain numpy array")
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        raise MetadataError(
            f"{name} must be whole numbers with {ndim} axes, found {array.dtype.name} of shape {array.shape}"
        )
    return array


def _as_array(name: str, values: object) -> npt.NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise MetadataError(
            f"{name} must be a list or a numpy array on the host, not {type(values).__module__}.{type(values).__name__}"
        )
    return np.asarray(values)


def as_lengths(name: str, values: Sequence[int] | npt.NDArray[np.integer]) -> I32:
    """Return per-sequence counts as an i32[S] of our own, refusing what is not a whole number from 0 to 2^31 - 1."""
    array = _as_array(name, values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int32)
    array = _whole(name, array, 1)
    if array.min() < 0 or array.max() > INT32_MAX:
        s = int(np.argmax((array < 0) | (array > INT32_MAX)))
        raise MetadataError(f"sequence {s}: {name}={int(array[s])} is outside 0..{INT32_MAX}")
    return array.astype(np.int32)


def as_slots(name: str, values: Sequence[int] | I64) -> I64:
    """Return slots as an i64[rows] of our own, refusing what is not a whole number."""
    array = _as_array(name, values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    return _whole(name, array, 1).astype(np.int64)


def as_table(
    name: str, tables: Sequence[Sequence[int]] | npt.NDArray[np.integer] | None, lens: I32, block_size: int
) -> I32:
    """Return block tables as i32[S, M], short rows filled up with -1; refuse a row that is too short to be used."""
    num_seqs = len(lens)
    if tables is None:
        return np.zeros((num_seqs, 0), dtype=np.int32)
    if len(tables) != num_seqs:
        raise MetadataError(f"{name} has length {len(tables)}, expected {num_seqs}: one for each sequence")
    if isinstance(tables, np.ndarray):
        wide = _whole(name, tables, 2)
    else:
        rows = [_as_array(name, row) for row in tables]
        wide = np.full((num_seqs, max((row.size for row in rows), default=0)), -1, dtype=np.int64)
        for s, row in enumerate(rows):
            if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
                raise MetadataError(
                    f"sequence {s}: {name} must be a list of block ids, found {row.dtype.name} {row.shape}"
                )
            if row.size * block_size < lens[s]:
                raise MetadataError(
                    f"sequence {s}: {int(lens[s])} tokens need {-(-int(lens[s]) // block_size)} blocks of "
                    f"{block_size}, {name} has {row.size}"
                )
            wide[s, : row.size] = row
    if wide.dtype == np.int32:
        return wide
    # What lies beyond the last used block may be anything: only what int32 cannot hold is turned into what it can.
    if wide.dtype.kind == "u":
        return np.where(wide > INT32_MAX, -1, wide.astype(np.int64)).astype(np.int32)
    return np.where(wide > INT32_MAX, -1, np.maximum(wide.astype(np.int64), -INT32_MAX)).astype(np.int32)


def exact(name: str, array: object, dtype: type[np.generic], ndim: int) -> npt.NDArray[Any]:
    """Refuse what is not a plain host array of this type and rank; return it."""
    if type(array) is not np.ndarray:
        raise MetadataError(
            f"{name} must be a plain numpy array on the host, not {type(array).__module__}.{type(array).__name__}"
        )
    # (A type of the other byte order is not equal to the native one.)
    if array.dtype != dtype or array.ndim != ndim:
        raise MetadataError(
            f"{name} must be {np.dtype(dtype).name} with {ndim} axes, found {array.dtype} of shape {array.shape}"
        )
    return array
