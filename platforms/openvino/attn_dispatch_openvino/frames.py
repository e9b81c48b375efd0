"""The small tensors of a step, which stay bound while it runs through the layers. Imports OpenVINO."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch.contract.dtypes import numpy_dtype

from .model import Program
from .places import Place
from .steps import Step

__all__ = ["Frame", "Frames"]

_PER_THREAD = 16

Arrays = npt.NDArray[Any]


class Frame:
    """Tensors of one size of step, of one thread.

    Attributes:
        step: whose numbers are in it.
        tensors: by input name.
        places: of q, k, v and the output.
    """

    __slots__ = ("_longest", "lists", "places", "step", "tensors")

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
        self.places = [
            Place(np.zeros((rows, heads, size), dtype), ov.Shape([rows, heads * size]), p.dtype)
            for heads, size in sizes
        ]
        self.tensors |= {name: place.tensor for name, place in zip("qkv", self.places, strict=False)}

    def load(self, step: Step) -> None:
        """Put a step's numbers into the tensors."""
        for own, given in zip(self.lists, _lists(step), strict=True):
            own[...] = given
        self._longest[...] = step.longest
        self.step = step


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
            if len(self._known) > _PER_THREAD:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        if frame.step is not step:
            frame.load(step)
        return frame
