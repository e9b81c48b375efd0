"""Caches whose arrays are views of one array: whether a backend can read and write them.

No capability says so, and wrong strides may go unnoticed. So it is tried, once for each backend and spec: a few tokens
are computed over such a cache and over an ordinary one, and must agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from attn_dispatch.attention import Attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.arrays import as_library, as_numpy, library_of
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.contract.kv_cache import Ids
from attn_dispatch.errors import CacheError

__all__ = ["OneArrayCache", "key_and_value", "why_not"]

_reasons: dict[tuple[Backend, AttentionSpec], str] = {}


class OneArrayCache(KVCache):
    """A cache whose value array is a view of its key array: what is copied is copied once."""

    __slots__ = ()

    def _keys(self) -> KVCache:
        # Arrays that never change in place are not views of each other: each is copied by itself.
        arrays = self.arrays if library_of(self.key) == "jax" else {"key": self.key}
        return KVCache(self.owner, self.geometry, self.layout, self.num_blocks, arrays, self.device)

    def _moved(self, keys: KVCache) -> None:
        self.arrays.update(keys.arrays)

    def copy_blocks(self, src: Ids, dst: Ids) -> None:
        """See `KVCache.copy_blocks`."""
        keys = self._keys()
        keys.copy_blocks(src, dst)
        self._moved(keys)

    def copy_slots(self, src: Ids, dst: Ids) -> None:
        """See `KVCache.copy_slots`."""
        keys = self._keys()
        keys.copy_slots(src, dst)
        self._moved(keys)

    def swap_blocks(self, other: KVCache, pairs: Iterable[tuple[int, int]] | Mapping[int, int]) -> None:
        """See `KVCache.swap_blocks`; the other cache is of the same kind."""
        if not isinstance(other, OneArrayCache):
            raise CacheError(f"blocks move between caches that are alike: {other!r} keeps its values apart")
        keys = other._keys()
        self._keys().swap_blocks(keys, pairs)
        other._moved(keys)


def key_and_value(cache: KVCache) -> tuple[Array, Array] | None:
    """Return a cache's two arrays if a head's numbers lie side by side in each, so that a part of them is a view."""
    axes = dict(cache.layout.arrays)
    if set(cache.arrays) != {"key", "value"} or any(not order.endswith(" D") for order in axes.values()):
        return None
    return cache.arrays["key"], cache.arrays["value"]


def why_not(attn: Attention, viewed: Callable[[int], KVCache | None]) -> str:
    """Return why a backend cannot run a layer over such a cache; nothing if it can.

    Args:
        attn: the layer.
        viewed: makes a zeroed cache of so many blocks out of views (None: its layout has none).
    """
    key = (attn.backend, attn.spec)
    if key not in _reasons:
        _reasons[key] = _try(attn, viewed)
    return _reasons[key]


def _try(attn: Attention, viewed: Callable[[int], KVCache | None]) -> str:
    spec = attn.spec
    rng = np.random.default_rng(0)
    tokens = spec.block_size + 1
    batch = AttentionMetadata.build([tokens], [tokens], [[2, 0]], spec.block_size)
    shapes = [(tokens, spec.num_heads, spec.head_size)]
    shapes += [(tokens, spec.num_kv_heads, size) for size in (spec.head_size, spec.value_head_size)]
    q, k, v = (rng.standard_normal(shape).astype(numpy_dtype(spec.dtype)) for shape in shapes)
    if attn.spec.head_size >= spec.value_head_size and spec.num_kv_heads == 1:
        v = np.ascontiguousarray(k[:, :, : spec.value_head_size])  # the views may overlap: values that are keys
    results = []
    try:
        for cache in (attn.allocate(3), viewed(3)):
            if cache is None:
                return f"layout {attn.backend.layout(spec).name} does not keep keys and values apart, each in one piece"
            library = attn.backend.capabilities.libraries[0]
            rows = [as_library(x, library) for x in (q, k, v)]
            out = attn.run(attn.plan(batch), rows[0], rows[1], rows[2], cache)
            stored = cache.gather([0, 2])
            results.append([np.asarray(as_numpy(x), np.float64) for x in (out, *stored)])
    except Exception as error:  # somebody else's code: whatever it raises is the reason, and is kept
        return f"{type(error).__name__}: {error}"
    if not all(np.array_equal(a, b) for a, b in zip(*results, strict=True)):
        return "its result differs when a cache's arrays are views"
    return ""
