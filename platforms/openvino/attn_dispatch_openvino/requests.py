"""Requests with their tensors bound: one per layer's cache, and frames that they share. Imports OpenVINO.

Binding a tensor costs 1.3 us and making one as much, so that a naive call spends more on its arguments than on
attention. A `Frame` is a set of small tensors that stays: a step's numbers are copied into it (a `Step` once for all
layers; queries, keys and values when they are small), and a request that is bound to it already has nothing to set.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch.contract import KVCache, LayerParameters
from attn_dispatch.contract.arrays import as_library
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import CacheError

from .layouts import PackedLayout
from .model import ELEMENT, Model, Program, scalar
from .steps import Step

__all__ = ["Binding", "BoundRequest", "Frame", "Frames", "array_tensor", "cache_tensors"]

_STAGED_BYTES = 64 << 10  # copying so much costs as much as making a tensor and binding it
_FRAMES_PER_THREAD = 16

Arrays = npt.NDArray[Any]


def array_tensor(array: Arrays, shape: Any, dtype: str) -> Any:
    """Return a tensor over the memory of a contiguous array; bfloat16 through a view, which OpenVINO's own lacks."""
    return ov.Tensor(array.view(np.int16) if dtype == "bfloat16" else array, shape, ELEMENT[dtype])


def cache_tensors(cache: KVCache) -> tuple[Any, Any]:
    """Return the tensors over a cache's memory.

    Raises:
        CacheError: an array is not contiguous.
    """
    tensors = []
    for name, size in (("key", cache.geometry.head_size), ("value", cache.geometry.value_head_size)):
        array = cache.arrays_as("numpy")[name]
        if not array.flags.c_contiguous:
            raise CacheError(f"OpenVINO binds a cache's memory as it is: its {name} array must be contiguous")
        packed = isinstance(cache.layout, PackedLayout)
        shape = (*array.shape[:3], cache.layout.row_elements(size)) if packed else array.shape  # type: ignore[attr-defined]
        tensors.append(array_tensor(array, ov.Shape(shape), cache.geometry.dtype))
    return tensors[0], tensors[1]


class Frame:
    """Tensors of one size of step, of one thread.

    Attributes:
        step: whose numbers are in it.
        staged: q, k, v and the output have room here ([rows, heads, size]); else they are bound at every call.
        shapes: OpenVINO's shapes of q, k, v and the output.
        tensors: by input name; of q, k, v only when staged.
        output: the staged output's tensor.
    """

    __slots__ = (
        "_longest", "_torch", "k", "lists", "nothing", "out", "output", "q", "shapes", "staged", "step", "tensors", "v",
    )  # fmt: skip

    def __init__(self, program: Program, step: Step, tree: tuple[Arrays, Arrays] | None) -> None:
        rows, p = step.num_rows, program
        dtype = numpy_dtype(p.dtype)
        self.step: Step | None = None
        self.lists = [np.empty_like(array) for array in _lists(step)]
        self._longest = np.zeros((), np.int32)
        names = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
        self.tensors = {
            name: ov.Tensor(array, shared_memory=True) for name, array in zip(names, self.lists, strict=True)
        }
        self.tensors["max_context_len"] = ov.Tensor(self._longest, shared_memory=True)
        if p.token_types:
            self.tensors["token_type_ids"] = ov.Tensor(np.ones(rows, np.int32))
        if tree is not None:
            self.tensors["qq_bias"], self.tensors["qq_bias_begins"] = (ov.Tensor(array) for array in tree)
        sizes = (
            (p.num_heads, p.head_size),
            (p.num_kv_heads, p.head_size),
            (p.num_kv_heads, p.value_head_size),
            (p.num_heads, p.value_head_size),
        )
        self.shapes = tuple(ov.Shape([rows, heads * size]) for heads, size in sizes)
        self.staged = max(rows * heads * size for heads, size in sizes) * dtype.itemsize <= _STAGED_BYTES
        self._torch: tuple[Any, ...] | None = None
        if self.staged:
            self.q, self.k, self.v, self.out = (np.zeros((rows, *size), dtype) for size in sizes)
            for name in ("q", "k", "v"):
                self.tensors[name] = array_tensor(getattr(self, name), self.shapes["qkv".index(name)], p.dtype)
            self.output = array_tensor(self.out, self.shapes[3], p.dtype)
        else:
            # What a request is bound to between calls, so that it does not keep a prefill's arrays alive.
            self.nothing = tuple(
                array_tensor(np.zeros((0, heads * size), dtype), ov.Shape([0, heads * size]), p.dtype)
                for heads, size in sizes
            )

    def load(self, step: Step) -> None:
        """Put a step's numbers into the tensors."""
        for own, given in zip(self.lists, _lists(step), strict=True):
            own[...] = given
        self._longest[...] = step.longest
        self.step = step

    def torch_views(self) -> tuple[Any, ...]:
        """Return the staged q, k, v and output as torch tensors over the same memory."""
        if self._torch is None:
            self._torch = tuple(as_library(array, "torch") for array in (self.q, self.k, self.v, self.out))
        return self._torch


def _lists(step: Step) -> tuple[Arrays, ...]:
    return step.past_lens, step.begins, step.blocks, step.block_begins


class Frames(threading.local):
    """The frames of each thread, the least recently used dropped."""

    def __init__(self) -> None:
        self._known: OrderedDict[object, Frame] = OrderedDict()

    def get(self, key: object, program: Program, step: Step, tree: tuple[Arrays, Arrays] | None) -> Frame:
        """Return this thread's frame of a size, loaded with a step."""
        frame = self._known.get(key)
        if frame is None:
            frame = self._known[key] = Frame(program, step, tree)
            if len(self._known) > _FRAMES_PER_THREAD:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        if frame.step is not step:
            frame.load(step)
        return frame


@dataclass(slots=True, eq=False)
class Binding:
    """What a cache keeps for this backend.

    Attributes:
        tensors: its keys and values, as OpenVINO sees them.
        value: its values.
        lock: held while a request is bound and runs. One for all requests of the cache: the op touches more of a
            cache's values than it says (`steps._tails`), if only for a while.
        requests: one per kind of step and layer.
    """

    tensors: tuple[Any, Any]
    value: Arrays
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: dict[tuple[object, LayerParameters], BoundRequest] = field(default_factory=dict)


class BoundRequest:
    """An infer request of one layer over one cache: one caller at a time, who holds `lock`."""

    __slots__ = ("_dtype", "_frame", "_infer", "_inputs", "_request", "_value", "lock")

    def __init__(self, model: Model, binding: Binding, scale: float, window: int, layer: LayerParameters) -> None:
        self.lock = binding.lock
        self._value = binding.value
        self._dtype = model.program.dtype
        self._inputs = model.inputs
        self._request = model.new_request()
        self._infer = self._request.infer
        self._frame: Frame | None = None
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
        if self._frame is frame:
            return
        self._frame = None
        for name, tensor in frame.tensors.items():
            self._set(name, tensor)
        if frame.staged:
            self._request.set_output_tensor(0, frame.output)
        self._frame = frame

    def infer(self, step: Step) -> None:
        """Run on what is bound, and put back the values that the op clears."""
        if step.tails is None:
            self._infer(None, False, True)  # arguments None, outputs shared: nothing is looked at or copied
            return
        blocks, offsets = step.tails
        saved = self._value[blocks, :, offsets]
        try:
            self._infer(None, False, True)
        finally:
            self._value[blocks, :, offsets] = saved

    def infer_on(self, frame: Frame, step: Step, arrays: tuple[Arrays, Arrays, Arrays, Arrays]) -> None:
        """Run on q, k, v and into an output that are bound for this call alone: contiguous, in any shape."""
        made = [array_tensor(a, shape, self._dtype) for a, shape in zip(arrays, frame.shapes, strict=True)]
        try:
            self._bind(made)
            self.infer(step)
        finally:
            self._bind(frame.nothing)

    def _bind(self, tensors: Any) -> None:
        for name, tensor in zip("qkv", tensors, strict=False):
            self._request.set_input_tensor(self._inputs[name], tensor)
        self._request.set_output_tensor(0, tensors[3])
