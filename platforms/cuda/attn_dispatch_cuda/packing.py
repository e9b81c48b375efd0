"""Several host arrays on a device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Packed"]

_ALIGNMENT = 16
"""Bytes: what vendors' kernels load at once."""


class Packed:
    """Arrays in one buffer of a device; `tensors` are views of it.

    The host's side is pinned, so that the copy is asynchronous; torch's allocator gives such memory to nobody else
    until the copy has ended. New contents may be brought into the same buffer: a captured graph then reads those.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, array in arrays.items():
            self._places[name] = (at, array.nbytes)
            at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.size_bytes = at
        with torch.inference_mode(False):
            self.buffer = self._host(arrays, device).to(device, non_blocking=True)
            self.tensors = {
                name: self.buffer[start : start + size].view(_torch_type(arrays[name])).view(arrays[name].shape)
                for name, (start, size) in self._places.items()
            }

    def _host(self, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> torch.Tensor:
        host = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        memory = host.numpy()
        for name, array in arrays.items():
            start, size = self._places[name]
            memory[start : start + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return host

    def renew(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Bring new contents of the same names and sizes, in one copy."""
        for name, array in arrays.items():
            if self._places[name][1] != array.nbytes:
                raise ValueError(f"{name} has {array.nbytes} bytes, was made with {self._places[name][1]}")
        with torch.inference_mode(False):
            self.buffer.copy_(self._host(arrays, self.buffer.device), non_blocking=True)


def _torch_type(array: npt.NDArray[Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, array.dtype.name)
    return found
