"""The contract: what a layer needs, what a batch looks like, where keys and values lie.

Shape legend, for every docstring of the library: `S` sequences, `T` query tokens of the whole batch (ragged,
concatenated), `N` blocks, `B` block size, `H` query heads, `K` key/value heads, `D` query/key head size, `Dv` value
head size, `M` blocks per sequence. `i32[S + 1]` is a host array unless said otherwise.
"""

from attn_dispatch.contract.arrays import Array
from attn_dispatch.contract.batch_view import BatchView
from attn_dispatch.contract.kv_cache import KVCache
from attn_dispatch.contract.layer import LayerParameters
from attn_dispatch.contract.layout import HND, NHD, CacheLayout, layout_named, register_layout
from attn_dispatch.contract.metadata import AttentionMetadata
from attn_dispatch.contract.side import Side
from attn_dispatch.contract.spec import AttentionSpec, CacheGeometry

CONTRACT_VERSION = 2
"""Raised when a change makes backends written before it wrong. A backend that speaks another one is refused."""

__all__ = [
    "CONTRACT_VERSION",
    "HND",
    "NHD",
    "Array",
    "AttentionMetadata",
    "AttentionSpec",
    "BatchView",
    "CacheGeometry",
    "CacheLayout",
    "KVCache",
    "LayerParameters",
    "Side",
    "layout_named",
    "register_layout",
]
