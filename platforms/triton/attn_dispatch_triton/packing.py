"""Arrays of a batch on a device, in one buffer that one copy fills."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Packed"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


class Packed:
    """Some int32 arrays, and slots, in one buffer on a device. Each begins at a multiple of 16 bytes.

    Attributes:
        arrays: what was brought last, on the host.
        tensors: the same on the device: views of the buffer, whose addresses stay.
        slots: i64[rows]; None if there were none.
    """

    __slots__ = ("_buffer", "_slot_words", "_starts", "arrays", "slots", "tensors")

    def __init__(self, arrays: list[I32], slots: I64 | None, device: torch.device) -> None:
        sizes = [-(-array.size // 4) * 4 for array in arrays]
        self._slot_words = 0 if slots is None else 2 * slots.size
        first = -(-self._slot_words // 4) * 4
        self._starts = [first + sum(sizes[:i]) for i in range(len(sizes))]
        self.arrays = arrays
        with torch.inference_mode(False):
            host = torch.empty(first + sum(sizes), dtype=torch.int32, pin_memory=device.type != "cpu")
            self._fill(host, arrays, slots)
            # On a device of its own: `renew` must not touch a copy that is still under way.
            self._buffer = host.to(device, non_blocking=True)
            starts = zip(self._starts, arrays, strict=True)
            self.tensors = [self._buffer[s : s + a.size].view(a.shape) for s, a in starts]
            self.slots = None if slots is None else self._buffer[: self._slot_words].view(torch.int64)

    def renew(self, arrays: list[I32], slots: I64 | None) -> None:
        """Bring other arrays, of the same shapes, into the same buffer; nothing is waited for."""
        with torch.inference_mode(False):
            # Memory of its own: what was pinned for the last copy may still be read.
            host = torch.empty_like(self._buffer, device="cpu", pin_memory=self._buffer.device.type != "cpu")
            self._fill(host, arrays, slots)
            self._buffer.copy_(host, non_blocking=True)
        self.arrays = arrays

    def _fill(self, host: torch.Tensor, arrays: list[I32], slots: I64 | None) -> None:
        flat: npt.NDArray[Any] = host.numpy()
        if slots is not None:
            flat[: self._slot_words].view(np.int64)[:] = slots
        for start, array in zip(self._starts, arrays, strict=True):
            flat[start : start + array.size] = array.reshape(-1)
