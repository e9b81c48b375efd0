"""What fits the hardware: padded heads, block sizes for VMEM, page tables for SMEM. No vendor is imported here.

Two facts shape everything: the kernel reads a token's 2K rows as whole tiles, and what one grid step holds (two buffers
of pages, scores, accumulators) has to fit 16 MiB of VMEM, which every generation from v4 on has for one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import itemsize

__all__ = ["LANES", "SMEM_BYTES", "Padding", "Tiles", "bucket", "choose_tiles", "pad_heads", "page_bytes", "table_bytes"]

LANES = 128
"""Width of a vector register's row: the last axis of every operand."""

SMEM_BYTES = 1 << 20
"""Scalar memory of a core, v4 to 7x; the page table is copied into it whole."""

PAGE_BYTES_LIMIT = 4 << 20
"""What two buffered pages may take of VMEM: with more, the scores and accumulators no longer fit beside them."""

_SMEM_RESERVED = 24 << 10  # other scalars, and what the compiler keeps for itself
_SCORE_ROWS = 256  # query rows times group, per grid step: bounds scores and accumulators
_BLOCK_TOKENS = 512  # keys per grid step
_MAX_PAGES = 16  # each page of a block is a DMA of its own in the unrolled code; the kernel's authors stop at 16 too


@dataclass(frozen=True)
class Padding:
    """The heads that the kernel sees.

    Attributes:
        kv_heads: K', at least K: 2K' rows fill whole tiles of the cache's type.
        group: G', at least H / K: query heads per key/value head.
    """

    kv_heads: int
    group: int


@dataclass(frozen=True)
class Tiles:
    """What one grid step of the kernel works on."""

    pages: int
    queries: int


def packing(dtype: str) -> int:
    """Elements of this type in one 32-bit word."""
    return int(4 // itemsize(dtype))


def _whole_tiles(rows: int, packed: int) -> bool:
    words, rest = divmod(rows, packed)
    return not rest and (words in (1, 2, 4, 8) or words % 8 == 0)


def _kv_heads_per_step(kv_heads: int, dtype: str) -> int:
    """Key/value heads that one grid step takes: 8 words of rows where that divides them, else all."""
    rows = 8 * packing(dtype)
    return rows // 2 if 2 * kv_heads % rows == 0 else kv_heads


def pad_heads(spec: AttentionSpec) -> Padding:
    """Return the fewest heads, at least the spec's, that the kernel can address."""
    packed = packing(spec.kv_cache_dtype)
    kv_heads = spec.num_kv_heads
    while not _whole_tiles(2 * kv_heads, packed):
        kv_heads += 1
    group = spec.group_size
    # A step's query heads must be all of them, or a multiple of 8 (the last but one axis of a block is tiled by 8).
    # Where neither holds (float32, one query head for each of eight or more) a second, empty, query head is added.
    per_step = _kv_heads_per_step(kv_heads, spec.kv_cache_dtype)
    while per_step != kv_heads and _whole_tiles(per_step * group, packing(spec.dtype)) and per_step * group % 8:
        group += 1
    return Padding(kv_heads, group)


def page_bytes(spec: AttentionSpec) -> int:
    """Return the VMEM that the two buffers of one page take."""
    heads = _kv_heads_per_step(pad_heads(spec).kv_heads, spec.kv_cache_dtype)
    return int(2 * spec.block_size * 2 * heads * LANES * itemsize(spec.kv_cache_dtype))


def choose_tiles(spec: AttentionSpec, pages_per_seq: int, tokens: int) -> Tiles:
    """Return block sizes that fit VMEM on every generation (the compile cell holds that against the compiler).

    Args:
        spec: the layer.
        pages_per_seq: width of the page table.
        tokens: rows of q.
    """
    by_memory = PAGE_BYTES_LIMIT // page_bytes(spec)
    pages = max(1, min(pages_per_seq, _MAX_PAGES, _BLOCK_TOKENS // spec.block_size, by_memory))
    rows = _SCORE_ROWS // pad_heads(spec).group
    queries = 32
    while queries > max(rows, 1):
        queries //= 2
    return Tiles(pages, min(queries, tokens))


def table_bytes(sequences: int, pages_per_seq: int) -> int:
    """Return the SMEM that a page table and the lengths take; rows are padded to 128 words."""
    lengths = 2 * 4 * (-(-(sequences + 1) // 128) * 128)
    return sequences * (-(-pages_per_seq // 128) * 128) * 4 + lengths + _SMEM_RESERVED


def bucket(count: int, floor: int, step: int) -> int:
    """Return the size that a count is rounded up to, so that few programs are compiled: powers of two up to `step`,
    then multiples of it.
    """
    if count > step:
        return -(-count // step) * step
    size = floor
    while size < count:
        size *= 2
    return size
