"""Caches whose arrays are views of one array: whether a backend can read and write them.

No capability says so, and wrong strides may go unnoticed. So it is tried, once for each backend and spec: a few tokens
are computed over such a cache and over an ordinary one, and must agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attn_dispatch.attention import Attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.arrays import as_library, as_numpy
from attn_dispatch.contract.dtypes import numpy_dtype

__all__ = ["key_and_value", "why_not"]

_found: dict[tuple[Backend, AttentionSpec], str] = {}


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
    tried = (attn.backend, attn.spec)
    if tried not in _found:
        _found[tried] = _try(attn, viewed)
    return _found[tried]


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
    found = []
    try:
        for cache in (attn.allocate(3), viewed(3)):
            if cache is None:
                return f"layout {attn.backend.layout(spec).name} does not keep keys and values apart, each in one piece"
            library = attn.backend.capabilities.libraries[0]
            rows = [as_library(x, library) for x in (q, k, v)]
            out = attn.run(attn.plan(batch), rows[0], rows[1], rows[2], cache)
            stored = cache.gather([0, 2])
            found.append([np.asarray(as_numpy(x), np.float64) for x in (out, *stored)])
    except Exception as error:  # somebody else's code: whatever it raises is the reason, and is kept
        return f"{type(error).__name__}: {error}"
    if not all(np.array_equal(a, b) for a, b in zip(*found, strict=True)):
        return "its result differs when a cache's arrays are views"
    return ""
