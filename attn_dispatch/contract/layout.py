"""`CacheLayout`: the physical order of a cache's arrays, declared in one line of text per array.

The logical axes are key `[N, K, B, D]` and value `[N, K, B, Dv]` (clause 1). A layout says in which order, and split
how, they lie in memory:

    HND   key "N K B D"          value "N K B D"
    NHD   key "N B K D"          value "N B K D"
    ROCm  key "N K D/8 B D%8"    value "N K D B"       (element d of a head lies at [d // 8, ..., d % 8])
    TPU   pages "N B K 2 D"      (2: key, then value, side by side)

Two backends whose layouts compare equal can share a cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from attn_dispatch.contract.arrays import Array, permute
from attn_dispatch.contract.spec import CacheGeometry
from attn_dispatch.errors import CacheError, nearest

__all__ = ["HND", "NHD", "CacheLayout", "layout_named", "register_layout"]


@dataclass(frozen=True)
class CacheLayout:
    """The arrays that a cache consists of, and the order of their axes.

    Attributes:
        name: unique; what `to_layout` takes.
        arrays: (array's name, its axes) pairs. Either "key" and "value", or one array with a `2` among its axes. Axes
            are `N`, `K`, `B`, `D`; a split one is written `D/8` (which group of 8) and `D%8` (where in the group).
        per_token_scales: the backend keeps f32 scales [N, K, B] beside the elements, "key_scale" and "value_scale":
            a stored element times its scale is the value (clause 12's finer scales).
    """

    name: str
    arrays: tuple[tuple[str, str], ...]
    per_token_scales: bool = False

    def __post_init__(self) -> None:
        for name, axes in self.arrays:
            letters = [axis[0] for axis in axes.split()]
            whole = {letter: letters.count(letter) for letter in letters}
            splits = {a[0] for a in axes.split() if "/" in a} & {a[0] for a in axes.split() if "%" in a}
            expected = {"N", "K", "B", "D"} | (set() if name in ("key", "value") else {"2"})
            halves = {a[0] for a in axes.split() if "/" in a or "%" in a} - splits
            if halves or set(whole) != expected or any(n != (2 if i in splits else 1) for i, n in whole.items()):
                raise CacheError(
                    f"layout {self.name}: array {name!r} has axes {axes!r}; each of N K B D must occur once"
                )

    @property
    def is_joint(self) -> bool:
        """Whether keys and values lie in one array."""
        return len(self.arrays) == 1

    def shapes(self, geometry: CacheGeometry, num_blocks: int) -> Mapping[str, tuple[int, ...]]:
        """Return the physical shape of every array.

        Raises:
            CacheError: a split axis is not a multiple of its group, or a joint array would need D == Dv.
        """
        if self.is_joint and geometry.head_size != geometry.value_head_size:
            raise CacheError(
                f"layout {self.name} keeps keys and values in one array: head_size={geometry.head_size} and "
                f"value_head_size={geometry.value_head_size} must be equal"
            )
        shapes = {}
        for name, axes in self.arrays:
            sizes = {"N": num_blocks, "K": geometry.num_kv_heads, "B": geometry.block_size, "2": 2}
            sizes["D"] = geometry.value_head_size if name == "value" else geometry.head_size
            shapes[name] = tuple(_extent(self.name, axis, sizes) for axis in axes.split())
        if self.per_token_scales:
            rows = (num_blocks, geometry.num_kv_heads, geometry.block_size)
            shapes |= {"key_scale": rows, "value_scale": rows}
        return MappingProxyType(shapes)

    def block_axis(self, name: str) -> int:
        """Return which axis of the array counts blocks."""
        return dict(self.arrays).get(name, "N").split().index("N")

    def slot_axes(self, name: str) -> tuple[int, int]:
        """Return the axes that count blocks and tokens in a block, of an array whose block axis is not split."""
        axes = dict(self.arrays).get(name, "N K B").split()
        if "B" not in axes:
            raise CacheError(f"layout {self.name} splits blocks: its tokens are copied through to_layout('HND')")
        return axes.index("N"), axes.index("B")

    def to_logical(self, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return (key [N, K, B, D], value [N, K, B, Dv]) of physical arrays, as views where the order allows."""
        if self.is_joint:
            ((name, axes),) = self.arrays
            at = axes.split().index("2")
            rest = " ".join(axis for axis in axes.split() if axis != "2")
            halves = [arrays[name][(slice(None),) * at + (side,)] for side in (0, 1)]
            return _merge(halves[0], rest), _merge(halves[1], rest)
        axes_of = dict(self.arrays)
        return _merge(arrays["key"], axes_of["key"]), _merge(arrays["value"], axes_of["value"])

    def put_logical(self, arrays: Mapping[str, Array], key: Array, value: Array) -> None:
        """Write logical keys and values into physical arrays of a mutable library (NumPy, torch), in place."""
        if self.is_joint:
            ((name, axes),) = self.arrays
            at = axes.split().index("2")
            rest = " ".join(axis for axis in axes.split() if axis != "2")
            for side, logical in enumerate((key, value)):
                target = arrays[name][(slice(None),) * at + (side,)]
                target[...] = _divide(logical, rest)
            return
        for name, axes in self.arrays:
            arrays[name][...] = _divide(key if name == "key" else value, axes)


def _extent(layout: str, axis: str, sizes: Mapping[str, int]) -> int:
    size = sizes[axis[0]]
    if len(axis) == 1:
        return size
    group = int(axis[2:])
    if size % group:
        raise CacheError(f"layout {layout} splits {axis[0]} into groups of {group}: {size} is not a multiple of it")
    return size // group if axis[1] == "/" else group


def _logical_order(axes: str) -> tuple[list[str], list[int]]:
    """Return the axes in logical order, outer part of a split one before its inner part, and where each is."""
    tokens = axes.split()
    order = sorted(range(len(tokens)), key=lambda i: ("NKBD".index(tokens[i][0]), "%" in tokens[i]))
    return [tokens[i] for i in order], order


def _merge(array: Array, axes: str) -> Array:
    tokens, order = _logical_order(axes)
    moved = permute(array, order)
    shape = [
        math.prod(n for n, token in zip(moved.shape, tokens, strict=True) if token[0] == letter) for letter in "NKBD"
    ]
    return moved.reshape(*shape) if len(tokens) > 4 else moved


def _divide(array: Array, axes: str) -> Array:
    tokens, order = _logical_order(axes)
    shape: list[int] = []
    for letter, size in zip("NKBD", array.shape, strict=True):
        split = next((int(token[2:]) for token in tokens if token[0] == letter and len(token) > 1), None)
        shape += [size] if split is None else [size // split, split]
    back = [order.index(i) for i in range(len(order))]
    return permute(array.reshape(*shape), back)


HND = CacheLayout("HND", (("key", "N K B D"), ("value", "N K B D")))
"""A head's tokens of a block lie together: the order of OpenVINO, IPEX and `cpu/numba`."""

NHD = CacheLayout("NHD", (("key", "N B K D"), ("value", "N B K D")))
"""A token's heads lie together: the order of FlashAttention."""

_known: dict[str, CacheLayout] = {}


def register_layout(layout: CacheLayout) -> CacheLayout:
    """Make a vendor's layout known by its name; return it.

    Raises:
        CacheError: the name is taken by a different layout.
    """
    other = _known.setdefault(layout.name, layout)
    if other != layout:
        raise CacheError(f"layout {layout.name!r} is registered already, as {other.arrays}")
    return layout


def layout_named(name: str) -> CacheLayout:
    """Return a known layout.

    Raises:
        CacheError: no layout has that name.
    """
    if name not in _known:
        raise CacheError(f"layout {name!r} is not known.{nearest(name, _known)} Known: {', '.join(sorted(_known))}")
    return _known[name]


for _layout in (HND, NHD):
    register_layout(_layout)
