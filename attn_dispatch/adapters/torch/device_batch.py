"""A batch on a device, brought over in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.adapters.batch import HostBatch, slot_writes
from attn_dispatch.contract import AttentionSpec, BatchView

__all__ = ["Arrays", "DeviceBatch", "DeviceBuffer", "DeviceWrites", "PreparedBatch", "on_device", "planning_on"]

Arrays = dict[str, npt.NDArray[Any]]

_ALIGNMENT_BYTES = 16
"""What vendors' kernels load at once."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, if it is not: kernels are launched on the current stream of the current device."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    runtime = getattr(torch, device.type)
    if device.index == runtime.current_device():
        return nullcontext()
    context: AbstractContextManager[Any] = runtime.device(device)
    return context


@contextmanager
def planning_on(device: torch.device) -> Iterator[None]:
    """Make a device the current one, outside of inference mode and of the user's default device.

    What is made in an inference_mode block cannot be changed outside of it, and plans outlive the block; vendors make
    host buffers without naming a device.
    """
    default = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), default, on_device(device):
        yield


class DeviceBuffer:
    """Host arrays in one buffer of a device.

    Every copy has pinned memory of its own, which torch's allocator hands out again only when the copy has ended: a
    host that is steps ahead of the device overwrites nothing that is still to be read.

    Attributes:
        tensors: the arrays on the device, as views whose addresses stay.
    """

    __slots__ = ("_buffer", "_ranges", "tensors")

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> None:
        self._ranges: dict[str, tuple[int, int]] = {}
        size = 0
        for name, array in arrays.items():
            self._ranges[name] = (size, array.nbytes)
            size += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        with torch.inference_mode(False):
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self.tensors: Mapping[str, torch.Tensor] = {
                name: self._buffer[start : start + nbytes].view(_torch_dtype(arrays[name])).view(arrays[name].shape)
                for name, (start, nbytes) in self._ranges.items()
            }
        self.renew(arrays)

    def renew(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Bring contents of the same names and sizes into the buffer, in one copy that is not waited for.

        Raises:
            ValueError: a name or a size differs. Nothing has been changed.
        """
        sizes = {name: nbytes for name, (_, nbytes) in self._ranges.items()}
        if sizes != (found := {name: array.nbytes for name, array in arrays.items()}):
            raise ValueError(f"the buffer was made for arrays of {sizes} bytes, these have {found}")
        device = self._buffer.device
        with torch.inference_mode(False):
            # The device is named: with torch.set_default_device this would not be host memory.
            host = torch.empty(
                self._buffer.shape, dtype=torch.uint8, device="cpu", pin_memory=device.type in ("cuda", "xpu")
            )
            memory = host.numpy()
            for name, array in arrays.items():
                start, nbytes = self._ranges[name]
                memory[start : start + nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._buffer.copy_(host, non_blocking=True)


def _torch_dtype(array: npt.NDArray[Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    return dtype


@dataclass(frozen=True, eq=False, slots=True)
class DeviceWrites:
    """Which rows of k and v are written, and where, on a device; see `adapters.batch.SlotWrites`.

    Attributes:
        rows: i64[n] (None: all, in order).
        block, offset: i64[n].
        any_row: bool[1] of a fixed plan, else None.
    """

    rows: torch.Tensor | None
    block: torch.Tensor
    offset: torch.Tensor
    any_row: torch.Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class PreparedBatch:
    """A batch on the host, ready to be brought over."""

    host: HostBatch
    arrays: Arrays


class DeviceBatch:
    """A batch on one device, for every layer of a spec. Backends add what their kernels want by `extra_arrays`.

    Attributes:
        spec: the layers.
        device: where the tensors are.
        paged: keys are in a cache.
        max_seq_len: of a fixed plan: shapes and addresses stay, `renew` changes contents.
        host: the same batch on the host.
        tensors: everything on the device, by name.
        arrays: the same on the host.
        writes: what is written (None: nothing).
        idle: bool[T, 1], rows that attend to nothing (None: there are none).
        query_start: i32[s + 1].
        key_start: i32[s + 1], sums of the lengths.
        lens: i32[s].
        tables: i32[s, W].
    """

    def __init__(
        self,
        spec: AttentionSpec,
        view: BatchView,
        device: torch.device,
        *,
        paged: bool,
        max_seq_len: int | None = None,
        tile: int = 1,
    ) -> None:
        self.spec, self.device, self.paged, self.max_seq_len = spec, device, paged, max_seq_len
        self._tile = tile
        prepared = self.prepare(view)
        self.host, self.arrays = prepared.host, prepared.arrays
        self._buffer = DeviceBuffer(prepared.arrays, device)
        self.tensors = tensors = self._buffer.tensors
        self.query_start, self.key_start = tensors["query_start"], tensors["key_start"]
        self.lens, self.tables = tensors["lens"], tensors["tables"]
        self.idle = tensors["idle"].view(-1, 1) if "idle" in tensors else None
        self.writes: DeviceWrites | None = None
        if "write_block" in tensors:
            rows, any_row = tensors.get("write_rows"), tensors.get("write_any_row")
            self.writes = DeviceWrites(rows, tensors["write_block"], tensors["write_offset"], any_row)

    @property
    def fixed(self) -> bool:
        """Whether shapes and addresses stay, so that a captured graph can be replayed."""
        return self.max_seq_len is not None

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return what else a backend wants on the device, in the same copy (in a fixed plan of fixed shapes)."""
        return {}

    def prepare(self, view: BatchView) -> PreparedBatch:
        """Return a batch on the host, in this one's shapes if they are fixed; changes nothing."""
        spec = self.spec
        host = HostBatch.of(view, spec, paged=self.paged, tile=self._tile)
        if self.max_seq_len is not None:
            host = host.fixed(self.max_seq_len, spec.block_size, self._tile)
        arrays: Arrays = {
            "query_start": host.query_start,
            "key_start": host.key_start,
            "lens": host.lens,
            "tables": host.tables,
        }
        if host.idle is not None:
            arrays["idle"] = host.idle
        if self.paged and spec.writes_kv:
            writes = slot_writes(view.side.slots, spec.block_size, fixed=self.fixed)
            if writes is not None:
                named = {f"write_{name}": getattr(writes, name) for name in ("rows", "block", "offset", "any_row")}
                arrays |= {name: array for name, array in named.items() if array is not None}
        return PreparedBatch(host, arrays | self.extra_arrays(host, view))

    def renew(self, prepared: PreparedBatch) -> None:
        """Bring another batch into this one's buffers."""
        self._buffer.renew(prepared.arrays)
        self.host, self.arrays = prepared.host, prepared.arrays
