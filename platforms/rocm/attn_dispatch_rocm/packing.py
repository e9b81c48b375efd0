"""Several host arrays on a device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["packed"]

_ALIGNMENT = 16
"""Bytes: what vendors' kernels load at once."""


def packed(arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arrays as views of one buffer on a device.

    The host's side is pinned, so that the copy is asynchronous; torch's allocator gives such memory to nobody else
    until the copy has ended.
    """
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for name, array in arrays.items():
        places[name] = (at, array.nbytes)
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    with torch.inference_mode(False):
        host = torch.empty(at, dtype=torch.uint8, pin_memory=device.type == "cuda")
        memory = host.numpy()
        for name, array in arrays.items():
            start, size = places[name]
            memory[start : start + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = host.to(device, non_blocking=True)
        return {
            name: there[start : start + size].view(getattr(torch, arrays[name].dtype.name)).view(arrays[name].shape)
            for name, (start, size) in places.items()
        }
