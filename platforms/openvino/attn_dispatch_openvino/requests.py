"""Requests with their tensors bound: one per layer over one cache. Imports OpenVINO.

Binding a tensor costs 1.3 us and making one as much, so that a naive call spends more on its arguments than on
attention. A `Frame` is a set of small tensors that stays: a step's numbers are copied into it (a `Step` once for all
layers; queries, keys and values when they are small or were nowhere before: `places`), and a request that is bound to
it already has nothing to set.
"""

from __future__ import annotations

import threading
from ctypes import memmove
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch.contract import Array, KVCache, LayerParameters
from attn_dispatch.contract.arrays import as_library, as_numpy
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import CacheError

from .frames import Frame
from .layouts import PackedLayout
from .model import Model, scalar
from .places import Place, array_tensor
from .steps import Step

__all__ = ["Binding", "BoundRequest", "cache_tensors"]

Arrays = npt.NDArray[Any]


def cache_tensors(cache: KVCache) -> tuple[Any, Any]:
    """Return the tensors over a cache's memory.

    Raises:
        CacheError: an array is not what the cache says, or cannot be bound as it is.
    """
    tensors = []
    shapes = cache.layout.shapes(cache.geometry, cache.num_blocks)
    for name, size in (("key", cache.geometry.head_size), ("value", cache.geometry.value_head_size)):
        array = cache.arrays_as("numpy")[name]
        if array.shape != shapes[name] or array.dtype != numpy_dtype(cache.geometry.dtype):
            raise CacheError(
                f"the cache's {name} array is {array.dtype.name} {array.shape}, but as {cache!r} says it must be "
                f"{cache.geometry.dtype} {shapes[name]}: the op would read and write outside of it"
            )
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise CacheError(
                f"OpenVINO binds a cache's memory as it is: its {name} array must be contiguous and writeable"
            )
        packed = isinstance(cache.layout, PackedLayout)
        shape = (*array.shape[:3], cache.layout.row_elements(size)) if packed else array.shape  # type: ignore[attr-defined]
        tensors.append(array_tensor(array, ov.Shape(shape), cache.geometry.dtype))
    return tensors[0], tensors[1]


@dataclass(slots=True, eq=False)
class Binding:
    """What a cache keeps for this backend.

    Attributes:
        tensors: its keys and values, as OpenVINO sees them.
        cleared: the arrays whose tails the op clears (`steps._tails`).
        lock: held while a request is bound and runs. One for all requests of the cache: the op touches more of a
            cache than it says (`steps._tails`), if only for a while.
        requests: one per kind of step and layer.
    """

    tensors: tuple[Any, Any]
    cleared: tuple[Arrays, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: dict[tuple[object, LayerParameters], BoundRequest] = field(default_factory=dict)


class BoundRequest:
    """An infer request of one layer over one cache: one caller at a time, who holds `lock`.

    Attributes:
        lock: the binding's.
        frame: what is bound.
        infer: OpenVINO's `infer(None, share_inputs, share_outputs)`.
    """

    __slots__ = ("_at", "_cleared", "_inputs", "_k", "_q", "_request", "_v", "frame", "infer", "lock")

    def __init__(self, model: Model, binding: Binding, scale: float, window: int, layer: LayerParameters) -> None:
        self.lock = binding.lock
        self._cleared = binding.cleared
        self._inputs = model.inputs
        self._q, self._k, self._v = (self._inputs[name] for name in "qkv")
        self._request = model.new_request()
        self.infer = self._request.infer
        self.frame: Frame | None = None
        self._at = [0, 0, 0, 0]  # which caller's q, k, v and output are bound, by address; 0: the frame's
        self._set("key_cache", binding.tensors[0])
        self._set("value_cache", binding.tensors[1])
        if model.program.constants is None:
            self._set("scale", scalar(scale, np.float32))
            self._set("sliding_window", scalar(window, np.int32))
            if layer.alibi_slopes is not None:
                self._set("alibi_slopes", ov.Tensor(layer.alibi_slopes))
            if layer.sinks is not None:
                self._set("sinks", ov.Tensor(layer.sinks.reshape(1, -1, 1, 1)))

    def _set(self, name: str, tensor: Any) -> None:
        self._request.set_input_tensor(self._inputs[name], tensor)

    def attach(self, frame: Frame) -> None:
        """Bind a frame, unless it is bound."""
        if self.frame is frame:
            return
        self.frame = None
        for name, tensor in frame.tensors.items():
            self._set(name, tensor)
        self._request.set_output_tensor(0, frame.places[3].tensor)
        self._at = [0, 0, 0, 0]
        self.frame = frame

    def infer_rows(
        self, frame: Frame, step: Step, q: Array, k: Array | None, v: Array | None, out: Array | None
    ) -> Array:
        """Run on a caller's arrays: where they are, or copied.

        Returns:
            `out`, or a new array of q's library.

        Raises:
            ArrayError: an array is not in host memory.
        """
        if self.frame is not frame:
            self.attach(frame)
        places = frame.places
        held = [self._take(0, places[0], q)]
        if k is not None:
            held += self._take(1, places[1], k), self._take(2, places[2], v)
        else:
            # A model that does not write still counts their rows.
            self._bind(1, 0, places[1].tensor)
            self._bind(2, 0, places[2].tensor)
        place = places[3]
        numpy = isinstance(q, np.ndarray)
        if not place.large and (out is not None or (numpy and place.small)):
            # A caller's `out` may be its q, which the op still reads while it writes.
            self._bind(3, 0, place.tensor)
            self.infer_step(step)
            return place.array.copy() if out is None else _put(out, place.array)
        made = out if out is not None and self._apart(frame, out) else place.new(numpy=numpy)
        address = _address(made)
        if address != self._at[3]:
            tensor = place.over(address)
            self._bind(3, 0 if tensor is None else address, tensor or place.tensor)
        self.infer_step(step)
        del held  # what was made contiguous for the op
        if not self._at[3]:
            memmove(address, place.address, place.array.nbytes)
        return made if out is None or made is out else _put(out, made)

    def _take(self, which: int, place: Place, given: Any) -> Any:
        """Bind an argument; return what must live while the request runs."""
        numpy = isinstance(given, np.ndarray)
        if numpy and place.small:
            place.array[...] = given
            self._bind(which, 0, place.tensor)
            return None
        if not (given.flags.c_contiguous if numpy else given.is_cpu and given.is_contiguous()):
            given = as_numpy(given)
            if not place.large:
                place.array[...] = given
                self._bind(which, 0, place.tensor)
                return None
            given = np.ascontiguousarray(given)
        address = _address(given)
        if address == self._at[which]:
            return given
        tensor = place.over(address)
        if tensor is not None:
            self._bind(which, address, tensor)
        else:
            # Half of what torch's own copy costs: no dispatch, no gradient, and bfloat16 is bytes like any other.
            memmove(place.address, address, place.array.nbytes)
            self._bind(which, 0, place.tensor)
        return given

    def _apart(self, frame: Frame, out: Any) -> bool:
        """Whether an output is contiguous, and shares no memory with what the op reads while it writes."""
        if not (out.flags.c_contiguous if isinstance(out, np.ndarray) else out.is_contiguous()):
            return False
        begin = _address(out)
        end = begin + frame.places[3].array.nbytes
        inputs = zip(self._at, frame.places[:3], strict=False)
        return all(at + place.array.nbytes <= begin or end <= at for at, place in inputs)

    def _bind(self, which: int, address: int, tensor: Any) -> None:
        if address == self._at[which]:
            return
        if which == 3:
            self._request.set_output_tensor(0, tensor)
        else:
            self._request.set_input_tensor((self._q, self._k, self._v)[which], tensor)
        self._at[which] = address

    def infer_step(self, step: Step) -> None:
        """Run on what is bound, and put back what the op clears."""
        if not step.tails:
            self.infer(None, False, True)
            return
        tails = [array[block, :, offset:] for array in self._cleared for block, offset in step.tails]
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


def _put(out: Any, found: Any) -> Array:
    """Copy a result into the caller's output."""
    if isinstance(out, np.ndarray):
        out[...] = found
    else:
        out.copy_(as_library(found, "torch"))
    return out
