"""Checks of a step's arrays before a kernel sees them: views that hold other numbers, outputs that share memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attn_dispatch.contract.arrays import Array
from attn_dispatch.errors import ArrayError

__all__ = ["check_out", "check_plain"]

_NO_ADDRESSES = ("meta", "xla")
"""Devices of torch whose tensors have no memory of their own that could be compared."""


def check_plain(name: str, array: Array) -> None:
    """Refuse a torch view whose memory holds other numbers than it shows.

    Raises:
        ArrayError: it is a negative or conjugate view that was not resolved.
    """
    if array.is_neg() or array.is_conj():
        raise ArrayError(f"{name} is a lazily negated or conjugated view: give {name}.resolve_neg().resolve_conj()")


def check_out(out: Array, others: Sequence[tuple[str, Array]], library: str) -> None:
    """Refuse an output that cannot be written, or that shares memory with itself or with what is read.

    Args:
        out: [T, H, Dv].
        others: names and arrays that are read while it is written.
        library: of all of them.

    Raises:
        ArrayError: naming what it overlaps.
    """
    if library == "jax":
        return  # the backends that take these say what they do with an output
    if library == "numpy":
        if not out.flags.writeable:
            raise ArrayError("out is read-only: give an array that can be written, or none")
        sizes, strides = out.shape, out.strides
        dense = out.flags.c_contiguous
    else:
        sizes, strides, dense = out.shape, out.stride(), out.is_contiguous()
    if not dense and _overlaps_itself(sizes, strides):
        raise ArrayError(
            f"out of shape {tuple(sizes)} with strides {tuple(strides)} overlaps itself: rows share memory"
        )
    for name, array in others:
        if array is not None and _share_memory(out, array, library):
            raise ArrayError(f"out and {name} overlap in memory: {name} is read while out is written")


def _overlaps_itself(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether two elements lie at one address, or axes are interleaved in a way that is not worth telling."""
    if 0 in sizes:
        return False
    reach = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(sizes, strides, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _share_memory(a: Array, b: Array, library: str) -> bool:
    if library == "numpy":
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=-1)
    if a.device != b.device or a.device.type in _NO_ADDRESSES or not a.numel() or not b.numel():
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    ranges = []
    for x in (a, b):
        first = x.storage_offset() * x.element_size()
        reach = sum(stride * (size - 1) for size, stride in zip(x.shape, x.stride(), strict=True))
        ranges.append((first, first + (reach + 1) * x.element_size()))
    return bool(ranges[0][0] < ranges[1][1] and ranges[1][0] < ranges[0][1])
