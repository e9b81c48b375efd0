"""Physical caches that only OpenVINO has: integers with a scale per token and head, and the GPU plug-in's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch import CacheLayout
from attn_dispatch.contract import Array
from attn_dispatch.contract.spec import CacheGeometry

__all__ = ["GPU", "U4", "U8", "PackedLayout", "layout_for"]

_HEADER_BYTES = 8  # f32 scale, f32 zero point
_FLAT_SCALE = 1e-4  # what the op stores as the scale of a row whose elements are all equal
_AXES = (("key", "N K B D"), ("value", "N K B D"))


@dataclass(frozen=True)
class PackedLayout(CacheLayout):
    """Rows of bytes `[N, K, B, row]`; a row is one token of one head: f32 scale, f32 zero point, then the integers.

    An element stands for `(integer - zero point) * scale`. Four-bit integers lie two in a byte, the first one in the
    high half. Rows are independent of each other, so that copies of blocks and of single tokens are exact.

    Attributes:
        bits: 8 or 4, of an integer.
    """

    bits: int = 8

    @property
    def levels(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    def row_bytes(self, head_size: int) -> int:
        """Return the bytes of one token of one head."""
        return _HEADER_BYTES + head_size * self.bits // 8

    def row_elements(self, head_size: int) -> int:
        """Return the same as OpenVINO counts it, in elements of the cache's type."""
        return _HEADER_BYTES * 8 // self.bits + head_size

    def shapes(self, geometry: CacheGeometry, num_blocks: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the byte arrays."""
        rows = (num_blocks, geometry.num_kv_heads, geometry.block_size)
        return MappingProxyType(
            {
                "key": (*rows, self.row_bytes(geometry.head_size)),
                "value": (*rows, self.row_bytes(geometry.value_head_size)),
            }
        )

    def to_logical(self, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return what the stored integers stand for, in float32: a copy."""
        return self.decode(arrays["key"]), self.decode(arrays["value"])

    def put_logical(self, arrays: Mapping[str, Array], key: Array, value: Array) -> None:
        """Quantise keys and values [N, K, B, D] into the byte arrays."""
        arrays["key"][...] = self.encode(key)
        arrays["value"][...] = self.encode(value)

    def decode(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return float32 [..., D] of rows of bytes [..., row]."""
        header = np.ascontiguousarray(rows[..., :_HEADER_BYTES]).view(np.float32)
        stored = rows[..., _HEADER_BYTES:]
        if self.bits == 4:
            stored = np.stack([stored >> 4, stored & 15], axis=-1).reshape(*stored.shape[:-1], -1)
        decoded: npt.NDArray[np.float32] = (stored.astype(np.float32) - header[..., 1:]) * header[..., :1]
        return decoded

    def encode(self, x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return rows of bytes [..., row] of numbers [..., D]: bit for bit what the op itself writes."""
        wide = x.astype(np.float32)
        low, high = wide.min(axis=-1, keepdims=True), wide.max(axis=-1, keepdims=True)
        scale = (high - low) / np.float32(self.levels)
        scale = np.where(scale == 0, np.float32(_FLAT_SCALE), scale)
        zero = -low / scale
        stored = np.clip(np.rint(wide / scale + zero), 0, self.levels).astype(np.uint8)
        if self.bits == 4:
            stored = (stored[..., ::2] << 4) | stored[..., 1::2]
        header = np.concatenate([scale, zero], axis=-1).astype(np.float32).view(np.uint8)
        return np.concatenate([header, stored], axis=-1)


U8 = PackedLayout("OPENVINO_U8", _AXES, bits=8)
"""Keys and values with a scale and a zero point per token and head. (OpenVINO's own default for keys has them per
channel and block: that is wrong in silence for D > Dv, and a copied token would carry its block's scale along.)"""

U4 = PackedLayout("OPENVINO_U4", _AXES, bits=4)
"""Likewise with four-bit integers; D and Dv are even."""

GPU = CacheLayout("OPENVINO_GPU", (("key", "N K D B"), ("value", "N K B D")))
"""The order of the GPU plug-in, whose blocks have 16 tokens."""

_PACKED = {"uint8": U8, "uint4": U4}


def layout_for(kv_cache_dtype: str) -> PackedLayout | None:
    """Return the packed layout of a cache type, or None for a type that is stored as it is."""
    return _PACKED.get(kv_cache_dtype)
