"""A cache's memory as tokens that can be written."""

from __future__ import annotations

import torch

from attn_dispatch.contract import NHD, KVCache
from attn_dispatch.contract.dtypes import FINITE_MAX
from attn_dispatch.errors import CacheError

__all__ = ["Store"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Store:
    """A cache, bound: its two arrays [N, B, K, D], and the same with fp8 as bytes."""

    __slots__ = ("_tokens", "device", "dtype", "key", "value")

    def __init__(self, cache: KVCache) -> None:
        if cache.layout != NHD:
            raise CacheError(
                f"a cache of layout {cache.layout.name} is read as NHD here: cache.to_layout('NHD') copies it"
            )
        arrays = cache.arrays_as("torch")
        self.key, self.value = arrays["key"], arrays["value"]
        for name, array in (("key", self.key), ("value", self.value)):
            if not array.is_contiguous():
                raise CacheError(f"the cache's {name} array has strides {array.stride()}: kernels need it contiguous")
        self.device = self.key.device
        self.dtype: torch.dtype = self.key.dtype
        self._tokens = tuple(a.view(torch.uint8) if a.dtype in _FP8 else a for a in (self.key, self.value))

    def write(
        self,
        at: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        """Store rows of k and v [rows, K, D] where they belong: round(x / scale), saturated, where quantised.

        Args:
            at: i64[n] blocks and i64[n] places in them.
            rows: i64[n], which rows (None: all).
            k: keys, v: values.
            v: see k.
            k_scale: f32[], None for 1.
            v_scale: f32[], None for 1.
        """
        for tokens, new, scale in zip(self._tokens, (k, v), (k_scale, v_scale), strict=True):
            picked = new if rows is None else new.index_select(0, rows)
            tokens.index_put_(at, self._narrowed(picked, scale))

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
        return wide.clamp(-limit, limit).to(self.dtype).view(torch.uint8)
