"""A cache's memory as torch's tensors, and the one way of writing keys and values to it."""

from __future__ import annotations

import torch

from attn_dispatch.adapters.torch.device_batch import DeviceWrites
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
from attn_dispatch.contract import KVCache
from attn_dispatch.contract.dtypes import FINITE_MAX, dtype_name
from attn_dispatch.errors import CacheError

__all__ = ["FP8", "CacheTensors", "as_bytes", "round_to"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def as_bytes(array: torch.Tensor) -> torch.Tensor:
    """Return fp8 as its bytes, which every device can index and assign; others as they are."""
    return array.view(torch.uint8) if array.dtype in FP8 else array


def round_to(new: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """Return what a cache of a type stores for new keys or values: the one rounding rule (clause 12).

    That is round(x / scale), to nearest and to even, saturated at the type's largest value; of a type that is not
    quantised, the value itself.

    Args:
        new: of the layer's type.
        dtype: of the cache.
        scale: f32[] on the same device, or None for 1. Not a number: a device divides by a number as a product with
            its reciprocal, which rounds otherwise.
    """
    limit = FINITE_MAX.get(dtype_name(dtype))
    if new.dtype == dtype or limit is None:
        return new.to(dtype)
    wide = new.float()
    if scale is not None:
        wide = wide / scale
    wide = wide.clamp(-limit, limit)
    return (wide.round_() if dtype == torch.int8 else wide).to(dtype)


class CacheTensors:
    """A cache's two arrays, whatever their layout, and both as tokens [N, B, K, D] that can be written.

    Attributes:
        key, value: the arrays in their layout.
        device: where they are.
        dtype: what they store.
    """

    __slots__ = ("_tokens", "device", "dtype", "key", "value")

    def __init__(self, cache: KVCache) -> None:
        arrays = cache.arrays_as("torch")
        if set(arrays) != {"key", "value"}:
            raise CacheError(f"layout {cache.layout.name} has the arrays {', '.join(arrays)}, expected key and value")
        for name, array in arrays.items():
            if not array.is_contiguous():
                raise CacheError(f"the cache's {name} array has strides {array.stride()}: kernels need it contiguous")
        self.key, self.value = arrays["key"], arrays["value"]
        self.device: torch.device = self.key.device
        self.dtype: torch.dtype = self.key.dtype
        self._tokens = tuple(as_bytes(arrays[name]).movedim(cache.layout.slot_axes(name), (0, 1)) for name in arrays)

    @classmethod
    def of(cls, cache: KVCache) -> CacheTensors:
        """Return a cache's tensors, bound once."""
        tensors = cache.backend_state.get(__name__)
        if tensors is None:
            tensors = cache.backend_state[__name__] = cls(cache)
        assert isinstance(tensors, CacheTensors)
        return tensors

    def write(self, writes: DeviceWrites, k: torch.Tensor, v: torch.Tensor, layer: LayerTensors) -> None:
        """Store rows of k [rows, K, D] and v [rows, K, Dv] in their slots."""
        slots = (writes.block, writes.offset)
        scales = (None if layer.k_scale == 1 else layer.k_scale_dev, None if layer.v_scale == 1 else layer.v_scale_dev)
        for tokens, new, scale in zip(self._tokens, (k, v), scales, strict=True):
            rows = new if writes.rows is None else new.index_select(0, writes.rows)
            stored = as_bytes(round_to(rows, self.dtype, scale))
            if writes.any_row is not None:
                stored = torch.where(writes.any_row, stored, tokens[slots])
            tokens.index_put_(slots, stored)
