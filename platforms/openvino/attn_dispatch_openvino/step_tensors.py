"""`StepTensors`: the tensors of a step, which stay bound while it runs through the layers. Imports OpenVINO.

Copying a decode step's rows costs as much as all the rest of a call; making an OpenVINO tensor over the caller's memory
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
from attn_dispatch.contract.dtypes import numpy_dtype

from .device_batch import DeviceBatch, Tree
from .program import ELEMENT, ProgramKey

__all__ = ["RowBuffer", "StepTensors", "array_tensor"]

_SMALL_BYTES = 16 << 10
_LARGE_BYTES = 64 << 10
_MOST_ADDRESSES = 1024  # tensors over callers' memory, a few hundred bytes each

Arrays = npt.NDArray[Any]


def array_tensor(array: Arrays, shape: Any, dtype: str) -> Any:
    """Return a tensor over the memory of a contiguous array; bfloat16 through a view, which OpenVINO's own lacks."""
    return ov.Tensor(array.view(np.int16) if dtype == "bfloat16" else array, shape, ELEMENT[dtype])


class RowBuffer:
    """Memory for one argument of a step (q, k, v or the output), and tensors over callers' memory of the same size.

    Attributes:
        array: [rows, heads, size].
        address: where the array lies.
        tensor: OpenVINO's, over the array.
        small: copying a NumPy array costs no more than asking it where it lies.
        large: copying costs more than making a tensor. Such an array is never touched, and so takes no memory.
    """

    __slots__ = ("_dtype", "_over", "_shape", "_torch_array", "address", "array", "large", "small", "tensor")

    def __init__(self, rows: int, heads: int, size: int, dtype: str) -> None:
        self.array = np.zeros((rows, heads, size), numpy_dtype(dtype))
        self.address = self.array.ctypes.data
        self._shape, self._dtype = ov.Shape([rows, heads * size]), dtype
        self.tensor = array_tensor(self.array, self._shape, dtype)
        self.small, self.large = self.array.nbytes <= _SMALL_BYTES, self.array.nbytes > _LARGE_BYTES
        self._over: dict[int, Any] = {}
        self._torch_array: Any = None

    def new(self, *, numpy: bool) -> Any:
        """Return a new array of this size, of NumPy or of torch."""
        if numpy:
            return np.empty(self.array.shape, self.array.dtype)
        if self._torch_array is None:
            self._torch_array = as_library(self.array, "torch")
        return sys.modules["torch"].empty_like(self._torch_array)  # half of what asking with a shape costs

    def over(self, address: int) -> Any:
        """Return a tensor over the memory at an address, or None when copying is better: it is met for the first time.

        The tensor owns nothing and may outlive the memory: it is for calls during which a caller's array of this size
        lies there.
        """
        return self._over.get(address) or self._meet(address)

    def _meet(self, address: int) -> Any:
        if address not in self._over:
            if len(self._over) >= _MOST_ADDRESSES:
                self._over.clear()
            if not self.large:
                # Worth a tensor when it comes back. An allocator that never repeats itself pays for a look-up.
                self._over[address] = None
                return None
        memory = memoryview((c_char * self.array.nbytes).from_address(address))
        array = np.frombuffer(memory, self.array.dtype)
        tensor = self._over[address] = array_tensor(array, self._shape, self._dtype)
        return tensor


class StepTensors:
    """Tensors for steps of one size, of one thread: a step's numbers are copied into them once for all its layers.

    Attributes:
        batch: whose numbers are in them.
        tensors: by input name.
        rows: buffers of q, k, v and the output.
    """

    __slots__ = ("_arrays", "_max_context_len", "batch", "rows", "tensors")

    def __init__(self, key: ProgramKey, num_seqs: int, num_blocks: int, num_rows: int, tree: Tree | None) -> None:
        self.batch: DeviceBatch | None = None
        names = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
        self._arrays = [np.zeros(size, np.int32) for size in (num_seqs, num_seqs + 1, num_blocks, num_seqs + 1)]
        self._max_context_len = np.zeros((), np.int32)
        shared = dict(zip(names, self._arrays, strict=True)) | {"max_context_len": self._max_context_len}
        self.tensors = {name: ov.Tensor(array, shared_memory=True) for name, array in shared.items()}
        if key.token_types:
            self.tensors["token_type_ids"] = ov.Tensor(np.ones(num_rows, np.int32))
        if tree is not None:
            self.tensors |= {"qq_bias": ov.Tensor(tree.bias), "qq_bias_begins": ov.Tensor(tree.begins)}
        self.rows = [
            RowBuffer(num_rows, heads, size, key.dtype)
            for heads, size in (
                (key.num_heads, key.head_size),
                (key.num_kv_heads, key.head_size),
                (key.num_kv_heads, key.value_head_size),
                (key.num_heads, key.value_head_size),
            )
        ]
        self.tensors |= {name: buffer.tensor for name, buffer in zip("qkv", self.rows, strict=False)}

    def load(self, batch: DeviceBatch) -> None:
        """Copy a step's numbers into the tensors."""
        lists = (batch.past_lens, batch.begins, batch.blocks, batch.block_begins)
        for array, numbers in zip(self._arrays, lists, strict=True):
            array[...] = numbers
        self._max_context_len[...] = batch.max_context_len
        self.batch = batch
