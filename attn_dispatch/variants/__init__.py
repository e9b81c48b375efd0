"""Variants: attention that others write kernels for, as page tables and passes over the contract."""

from attn_dispatch.variants.block_mask import BlockMask, LocalStride, Pattern
from attn_dispatch.variants.block_sparse import BlockSparse
from attn_dispatch.variants.cascade import Cascade
from attn_dispatch.variants.differential import DIFFERENTIAL, Differential, reference_cache
from attn_dispatch.variants.dual_chunk import DualChunk
from attn_dispatch.variants.latent import Latent
from attn_dispatch.variants.longformer import Longformer
from attn_dispatch.variants.pair_cache import PairCache
from attn_dispatch.variants.sharing import SharingMap
from attn_dispatch.variants.split_kv import SplitKV
from attn_dispatch.variants.variant import Variant, VariantPlan

__all__ = [
    "DIFFERENTIAL",
    "BlockMask",
    "BlockSparse",
    "Cascade",
    "Differential",
    "DualChunk",
    "Latent",
    "LocalStride",
    "Longformer",
    "PairCache",
    "Pattern",
    "SharingMap",
    "SplitKV",
    "Variant",
    "VariantPlan",
    "reference_cache",
]
