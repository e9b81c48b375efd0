"""`LayerRequest`: an infer request with a layer's tensors bound, one per program and cache. Imports OpenVINO.

Binding a tensor costs 1.3 us and making one as much, so that a naive call spends more on its arguments than on
attention: what is bound already is not bound again.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import memmove
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch.contract import Array, KVCache, LayerParameters
from attn_dispatch.contract.arrays import as_library, as_numpy
from attn_dispatch.errors import CacheError

from .device_batch import DeviceBatch
from .fork_safety import fork_safe_lock
from .layouts import PackedLayout
from .program import Program
from .step_tensors import RowBuffer, StepTensors, array_tensor

__all__ = ["BoundCache", "LayerRequest", "cache_tensors"]

_MOST_REQUESTS = 8
_OUT = 3  # behind q, k and v in the buffers of a step

Arrays = npt.NDArray[Any]


def cache_tensors(cache: KVCache) -> tuple[Any, Any]:
    """Return the tensors over a cache's keys and values.

    Raises:
        CacheError: an array is not dense.
    """
    tensors = []
    for name, size in (("key", cache.geometry.head_size), ("value", cache.geometry.value_head_size)):
        array = cache.arrays_as("numpy")[name]
        if not array.flags.c_contiguous:
            raise CacheError(
                f"OpenVINO binds a cache's memory as it is: its {name} array must be contiguous, found strides "
                f"{array.strides} of shape {array.shape}"
            )
        shape = array.shape
        if isinstance(cache.layout, PackedLayout):
            shape = (*shape[:3], cache.layout.row_elements(size))
        tensors.append(array_tensor(array, ov.Shape(shape), cache.geometry.dtype))
    return tensors[0], tensors[1]


class BoundCache:
    """What a cache keeps for this backend.

    Attributes:
        lock: held while a request is bound and runs. One for all requests of the cache: the op touches more of a
            cache than it says (`device_batch._tails`), if only for a while.
        request: returns the request of a program; the few that were used last are kept.

    Args:
        tensors: its keys and values, as OpenVINO sees them.
        cleared: the arrays whose tails the op clears.
    """

    __slots__ = ("lock", "request")

    def __init__(self, tensors: tuple[Any, Any], cleared: tuple[Arrays, ...]) -> None:
        self.lock = fork_safe_lock()
        self.request: Callable[[Program], LayerRequest] = lru_cache(_MOST_REQUESTS)(
            partial(LayerRequest, tensors, cleared)
        )


class LayerRequest:
    """An infer request over one cache, with one layer's tensors: one caller at a time, who holds the cache's lock.

    Attributes:
        infer: OpenVINO's `infer(None, share_inputs, share_outputs)`.
    """

    __slots__ = ("_bound", "_cleared", "_inputs", "_layer", "_request", "_tensors", "infer")

    def __init__(self, tensors: tuple[Any, Any], cleared: tuple[Arrays, ...], program: Program) -> None:
        self._cleared, self._inputs = cleared, program.inputs
        self._request = program.new_request()
        self.infer = self._request.infer
        self._tensors: StepTensors | None = None
        self._bound = [0, 0, 0, 0]  # addresses of the caller's q, k, v and output that are bound; 0: the step's buffer
        # Devices that want a layer's numbers in the model have a program per layer.
        self._layer: Any = (None, None, None, None) if program.key.constants is None else None
        self._bind_input("key_cache", tensors[0])
        self._bind_input("value_cache", tensors[1])

    def _bind_input(self, name: str, tensor: Any) -> None:
        self._request.set_input_tensor(self._inputs[name], tensor)

    def bind_layer(self, scale: float, window: int, layer: LayerParameters) -> None:
        """Bind a layer's numbers, unless they are bound; `window`: tokens that a query sees, 0: all."""
        bound = self._layer
        if bound is None:
            return
        slopes, sinks = layer.alibi_slopes, layer.sinks
        if bound[0] == scale and bound[1] == window and bound[2] is slopes and bound[3] is sinks:
            return
        self._layer = (None, None, None, None)
        self._bind_input("scale", ov.Tensor(np.array(scale, np.float32)))
        self._bind_input("sliding_window", ov.Tensor(np.array(window, np.int32)))
        if slopes is not None:
            self._bind_input("alibi_slopes", ov.Tensor(slopes))
        if sinks is not None:
            self._bind_input("sinks", ov.Tensor(sinks.reshape(1, -1, 1, 1)))
        self._layer = (scale, window, slopes, sinks)

    def _bind_step(self, tensors: StepTensors) -> None:
        self._tensors = None
        for name, tensor in tensors.tensors.items():
            self._bind_input(name, tensor)
        self._request.set_output_tensor(0, tensors.rows[_OUT].tensor)
        self._bound = [0, 0, 0, 0]
        self._tensors = tensors

    def infer_rows(
        self, tensors: StepTensors, batch: DeviceBatch, q: Array, k: Array | None, v: Array | None, out: Array | None
    ) -> Array:
        """Run on a caller's arrays: where they are, or copied.

        Returns:
            `out`, or a new array of q's library.

        Raises:
            ArrayError: an array is not in host memory.
        """
        if self._tensors is not tensors:
            self._bind_step(tensors)
        buffers = tensors.rows
        alive = [self._bind_argument(0, buffers[0], q)]
        if k is not None:
            alive += self._bind_argument(1, buffers[1], k), self._bind_argument(2, buffers[2], v)
        else:
            # A program that does not write still counts their rows.
            self._bind_rows(1, 0, buffers[1].tensor)
            self._bind_rows(2, 0, buffers[2].tensor)
        buffer = buffers[_OUT]
        numpy = isinstance(q, np.ndarray)
        if not buffer.large and (out is not None or (numpy and buffer.small)):
            # A caller's `out` may be its q, which the op still reads while it writes.
            self._bind_rows(_OUT, 0, buffer.tensor)
            self._infer_batch(batch)
            return buffer.array.copy() if out is None else _copy_into(out, buffer.array)
        result = out if out is not None and self._is_separate(tensors, out) else buffer.new(numpy=numpy)
        address = _address(result)
        if address != self._bound[_OUT]:
            tensor = buffer.over(address)
            self._bind_rows(_OUT, 0 if tensor is None else address, tensor or buffer.tensor)
        self._infer_batch(batch)
        del alive  # what was copied to be contiguous
        if not self._bound[_OUT]:
            memmove(address, buffer.address, buffer.array.nbytes)
        return result if out is None or result is out else _copy_into(out, result)

    def _bind_argument(self, which: int, buffer: RowBuffer, array: Any) -> Any:
        """Bind q, k or v; return what must live while the request runs."""
        numpy = isinstance(array, np.ndarray)
        if numpy and buffer.small:
            buffer.array[...] = array
            self._bind_rows(which, 0, buffer.tensor)
            return None
        if not (array.flags.c_contiguous if numpy else array.is_cpu and array.is_contiguous()):
            array = as_numpy(array)
            if not buffer.large:
                buffer.array[...] = array
                self._bind_rows(which, 0, buffer.tensor)
                return None
            array = np.ascontiguousarray(array)
        address = _address(array)
        if address == self._bound[which]:
            return array
        tensor = buffer.over(address)
        if tensor is not None:
            self._bind_rows(which, address, tensor)
        else:
            # Half of what torch's own copy costs: no dispatch, no gradient, and bfloat16 is bytes like any other.
            memmove(buffer.address, address, buffer.array.nbytes)
            self._bind_rows(which, 0, buffer.tensor)
        return array

    def _is_separate(self, tensors: StepTensors, out: Any) -> bool:
        """Whether an output is contiguous, and shares no memory with what the op reads while it writes."""
        if not (out.flags.c_contiguous if isinstance(out, np.ndarray) else out.is_contiguous()):
            return False
        begin = _address(out)
        end = begin + tensors.rows[_OUT].array.nbytes
        inputs = zip(self._bound, tensors.rows[:_OUT], strict=False)
        return all(at + buffer.array.nbytes <= begin or end <= at for at, buffer in inputs)

    def _bind_rows(self, which: int, address: int, tensor: Any) -> None:
        if address == self._bound[which]:
            return
        if which == _OUT:
            self._request.set_output_tensor(0, tensor)
        else:
            self._bind_input("qkv"[which], tensor)
        self._bound[which] = address

    def _infer_batch(self, batch: DeviceBatch) -> None:
        """Run on what is bound, and put back what the op clears."""
        if not batch.tails:
            self.infer(None, False, True)
            return
        tails = [array[block, :, offset:] for array in self._cleared for block, offset in batch.tails]
        saved = [tail.copy() for tail in tails]
        try:
            self.infer(None, False, True)
        finally:
            for tail, rows in zip(tails, saved, strict=True):
                tail[...] = rows


def _address(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0]  # type: ignore[no-any-return]
    return array.data_ptr()  # type: ignore[no-any-return]


def _copy_into(out: Any, rows: Any) -> Array:
    if isinstance(out, np.ndarray):
        out[...] = rows
    else:
        out.copy_(as_library(rows, "torch"))
    return out
