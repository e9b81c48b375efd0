"""A cache's memory as tokens that can be written, whatever its layout."""

from __future__ import annotations

import torch

from attn_dispatch.contract import KVCache
from attn_dispatch.contract.dtypes import FINITE_MAX
from attn_dispatch.errors import CacheError

__all__ = ["Placed", "Store"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Placed:
    """Which rows of k and v go where, on a device; see `batch.Writes`."""

    __slots__ = ("any_row", "at", "rows")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.rows = tensors.get("rows")
        self.at = (tensors["block"], tensors["offset"])
        self.any_row = tensors.get("any_row")


class Store:
    """A cache, bound: its two arrays, and both seen as [N, B, K, D] with fp8 as bytes."""

    __slots__ = ("_tokens", "device", "dtype", "key", "layout", "value")

    def __init__(self, cache: KVCache) -> None:
        arrays = cache.arrays_as("torch")
        self.key, self.value = arrays["key"], arrays["value"]
        self.layout = cache.layout.name
        for name, array in (("key", self.key), ("value", self.value)):
            if not array.is_contiguous():
                raise CacheError(f"the cache's {name} array has strides {array.stride()}: kernels need it contiguous")
        self.device = self.key.device
        self.dtype: torch.dtype = self.key.dtype
        self._tokens = tuple(self._as_tokens(array) for array in (self.key, self.value))

    def _as_tokens(self, array: torch.Tensor) -> torch.Tensor:
        plain = array.view(torch.uint8) if array.dtype in _FP8 else array
        return plain if self.layout == "NHD" else plain.transpose(1, 2)

    def write(
        self,
        placed: Placed,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        """Store rows [rows, K, D] where they belong: round(x / scale), saturated, where the type is quantised."""
        for tokens, new, scale in zip(self._tokens, (k, v), (k_scale, v_scale), strict=True):
            picked = new if placed.rows is None else new.index_select(0, placed.rows)
            stored = self._narrowed(picked, scale)
            if placed.any_row is not None:
                stored = torch.where(placed.any_row, stored, tokens[placed.at])
            tokens.index_put_(placed.at, stored)

    def _narrowed(self, new: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if new.dtype == self.dtype:
            return new
        limit = FINITE_MAX.get(str(self.dtype).removeprefix("torch."))
        if limit is None:
            return new.to(self.dtype)
        wide = new.float()
        if scale is not None:
            # By a tensor: a device divides by a number as a product with its reciprocal, which rounds otherwise.
            wide = wide / scale
        stored = wide.clamp(-limit, limit).to(self.dtype)
        return stored.view(torch.uint8)
