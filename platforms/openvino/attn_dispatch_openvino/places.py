"""Where the arrays of a call lie: in room of our own, or where the caller's lay before. Imports OpenVINO.

Copying a decode step's rows costs as much as all the rest of a call; making OpenVINO a tensor over the caller's memory
costs more than that. But a model gets the same memory from its allocator, layer after layer and step after step, so a
tensor over it is kept, and binding it again costs little; binding what is bound already costs nothing.
"""

from __future__ import annotations

import sys
from ctypes import c_char
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch.contract.arrays import as_library

from .model import ELEMENT

__all__ = ["Place", "array_tensor"]

_SMALL_BYTES = 16 << 10
_LARGE_BYTES = 64 << 10
_KEPT = 1024  # tensors over callers' memory, a few hundred bytes each

Arrays = npt.NDArray[Any]


def array_tensor(array: Arrays, shape: Any, dtype: str) -> Any:
    """Return a tensor over the memory of a contiguous array; bfloat16 through a view, which OpenVINO's own lacks."""
    return ov.Tensor(array.view(np.int16) if dtype == "bfloat16" else array, shape, ELEMENT[dtype])


class Place:
    """One argument of a frame.

    Attributes:
        array: room of our own, [rows, heads, size].
        address: where that is.
        tensor: OpenVINO's, over it.
        small: copying a NumPy array costs no more than asking it where it lies.
        large: copying costs more than making a tensor. The room of such a place is never touched, and so costs nothing.
    """

    __slots__ = ("_dtype", "_known", "_like", "_shape", "address", "array", "large", "small", "tensor")

    def __init__(self, array: Arrays, shape: Any, dtype: str) -> None:
        self.array, self.address = array, array.ctypes.data
        self.tensor = array_tensor(array, shape, dtype)
        self.small, self.large = array.nbytes <= _SMALL_BYTES, array.nbytes > _LARGE_BYTES
        self._shape, self._dtype = shape, dtype
        self._known: dict[int, Any] = {}
        self._like: Any = None

    def new(self, *, numpy: bool) -> Any:
        """Return a new array of this size, of NumPy or of torch."""
        if numpy:
            return np.empty(self.array.shape, self.array.dtype)
        if self._like is None:
            self._like = as_library(self.array, "torch")
        return sys.modules["torch"].empty_like(self._like)  # half of what asking with a shape costs

    def over(self, address: int) -> Any:
        """Return a tensor over the memory at an address, or None when it is better copied: it was not met before.

        The tensor owns nothing and may outlive the memory: it is for calls during which a caller's array of this size
        lies there.
        """
        return self._known.get(address) or self._meet(address)

    def _meet(self, address: int) -> Any:
        if address not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            if not self.large:
                # Worth a tensor when it comes back. An allocator that never repeats itself pays for a look-up.
                self._known[address] = None
                return None
        memory = memoryview((c_char * self.array.nbytes).from_address(address))
        array = np.frombuffer(memory, self.array.dtype)
        found = self._known[address] = array_tensor(array, self._shape, self._dtype)
        return found
