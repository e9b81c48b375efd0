"""`JointPages`: the cache layout of kernels that want keys and values side by side, padded to a hardware's tiles.

A page is `[B, 2 * K', lanes]`: rows K0, V0, K1, V1... of one token are neighbours, so that one transfer brings both.
`K'` and the last axis are the spec's heads and head size rounded up to what a kernel can address. What is added is
zero, is never read back, and adds nothing to a score or an output: padding is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from attn_dispatch.contract import CacheLayout
from attn_dispatch.contract.arrays import permute
from attn_dispatch.contract.spec import CacheGeometry

__all__ = ["PAGES", "JointPages", "joint_pages"]

PAGES = "pages"
"""The name of the one array."""


@dataclass(frozen=True)
class JointPages(CacheLayout):
    """Joint pages of padded heads. In memory they are `[N, B, K', 2, lanes]`, whatever axes the array has.

    Attributes:
        heads: the cache's key/value heads, K.
        key_size: D.
        value_size: Dv.
        padded_heads: K', at least K.
        lanes: elements of a padded head, at least D and Dv.
        tail: the axes after blocks and tokens as the kernel wants them, `2 * K' * lanes` elements in all.
    """

    heads: int = 0
    key_size: int = 0
    value_size: int = 0
    padded_heads: int = 0
    lanes: int = 128
    tail: tuple[int, ...] = ()

    def shapes(self, geometry: CacheGeometry, num_blocks: int) -> Mapping[str, tuple[int, ...]]:
        """Return the physical shape, [N, B, *tail]."""
        return MappingProxyType({PAGES: (num_blocks, geometry.block_size, *self.tail)})

    def block_axis(self, name: str) -> int:
        """Blocks are counted first."""
        return 0

    def slot_axes(self, name: str) -> tuple[int, int]:
        """Blocks, then tokens."""
        return 0, 1

    def to_logical(self, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return (key [N, K, B, D], value [N, K, B, Dv]) without the padding."""
        pages = self._heads_of(arrays[PAGES])
        key = pages[:, :, : self.heads, 0, : self.key_size]
        value = pages[:, :, : self.heads, 1, : self.value_size]
        return permute(key, (0, 2, 1, 3)), permute(value, (0, 2, 1, 3))

    def put_logical(self, arrays: Mapping[str, Any], key: Any, value: Any) -> None:
        """Write logical keys and values into host pages; the padding stays as it is."""
        pages = self._heads_of(arrays[PAGES])  # a view: pages are contiguous
        pages[:, :, : self.heads, 0, : self.key_size] = permute(key, (0, 2, 1, 3))
        pages[:, :, : self.heads, 1, : self.value_size] = permute(value, (0, 2, 1, 3))

    def _heads_of(self, pages: Any) -> Any:
        return pages.reshape(*pages.shape[:2], self.padded_heads, 2, self.lanes)


def joint_pages(geometry: CacheGeometry, padded_heads: int, lanes: int, tail: tuple[int, ...]) -> JointPages:
    """Return the layout for caches of this geometry; its name says every number, so that names stay unique."""
    sizes = f"{geometry.head_size}"
    if geometry.value_head_size != geometry.head_size:
        sizes += f"+{geometry.value_head_size}"
    return JointPages(
        name=f"joint-{geometry.num_kv_heads}x{sizes}-in-{'x'.join(map(str, tail))}",
        arrays=((PAGES, "N B K 2 D"),),
        heads=geometry.num_kv_heads,
        key_size=geometry.head_size,
        value_size=geometry.value_head_size,
        padded_heads=padded_heads,
        lanes=lanes,
        tail=tail,
    )
