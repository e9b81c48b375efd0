"""What fits the hardware: block sizes for VMEM, block tables for SMEM, sizes rounded up. No vendor is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.contract.dtypes import itemsize

__all__ = [
    "LANES",
    "SMEM_BYTES",
    "VMEM_BYTES",
    "GridStep",
    "Tiles",
    "align",
    "bucket",
    "choose_tiles",
    "packing",
    "table_bytes",
]

LANES = 128
"""Width of a vector register's row: the last axis of every operand."""

SMEM_BYTES = 1 << 20
"""Scalar memory of a core, v4 to 7x; the block table is copied into it whole."""

VMEM_BYTES = 14 << 20
"""What a grid step may take by our estimate: 16 MiB, which every generation has for one kernel, less what the compiler
needs for itself."""

_SMEM_RESERVED = 24 << 10  # other scalars, and what the compiler keeps for itself
_SCORE_ROWS = 256  # query rows times group, per grid step
_SCORE_COPIES = 8  # scores, weights, masks and positions that the compiler keeps at once, each float32
_BLOCK_TOKENS = 512  # keys per grid step
_MAX_PAGES = 16  # each page of a block is a DMA of its own in the unrolled code; the kernel's authors stop at 16 too


@dataclass(frozen=True)
class Tiles:
    """What one grid step works on: so many pages, against the queries of so many tokens."""

    pages: int
    queries: int


@dataclass(frozen=True)
class GridStep:
    """What a grid step's memory depends on.

    Attributes:
        kv_heads: key/value heads that it takes.
        group: query heads for each.
        lanes: elements of a head.
        block_size: B.
        dtype: of queries.
        cache_dtype: of pages.
    """

    kv_heads: int
    group: int
    lanes: int
    block_size: int
    dtype: str
    cache_dtype: str

    def vmem_bytes(self, tiles: Tiles) -> int:
        """Return our estimate of the VMEM that it takes."""
        keys, rows = tiles.pages * self.block_size, tiles.queries * self.group
        row_bytes = self.kv_heads * self.lanes
        buffers = 2 * keys * 2 * row_bytes * itemsize(self.cache_dtype)
        queries = 2 * 2 * rows * row_bytes * itemsize(self.dtype)  # in and out, two of each
        accumulators = rows * (row_bytes + 2 * self.kv_heads * LANES) * 4  # output; largest score and sum
        return int(buffers + queries + accumulators + _SCORE_COPIES * rows * keys * 4)

    @property
    def fits(self) -> bool:
        """Whether the smallest one, one page and one token's queries, fits VMEM."""
        return self.vmem_bytes(Tiles(1, 1)) <= VMEM_BYTES


def choose_tiles(step: GridStep, pages_per_seq: int, tokens: int) -> Tiles:
    """Return block sizes that fit VMEM on every generation (`evidence/compile_check.py` has the compiler confirm it).

    Args:
        step: one that `fits`.
        pages_per_seq: width of the block table.
        tokens: rows of q.
    """
    pages = max(1, min(pages_per_seq, _MAX_PAGES, _BLOCK_TOKENS // step.block_size))
    queries = min(32, tokens)
    while queries > 1 and queries * step.group > _SCORE_ROWS:
        queries //= 2
    # Fewer queries before fewer pages: a step's DMAs hide behind its arithmetic only if they are long.
    while step.vmem_bytes(Tiles(pages, queries)) > VMEM_BYTES and (pages > 1 or queries > 1):
        if queries > 8 or pages == 1:
            queries = max(1, queries // 2)
        else:
            pages //= 2
    return Tiles(pages, queries)


def packing(dtype: str) -> int:
    """Return how many elements of this type are in one 32-bit word."""
    return int(4 // itemsize(dtype))


def align(count: int, step: int) -> int:
    """Return the next multiple."""
    return -(-count // step) * step


def table_bytes(sequences: int, pages_per_seq: int) -> int:
    """Return the SMEM that a block table and the lengths take; the table's rows are padded to 128 words."""
    return sequences * align(pages_per_seq, 128) * 4 + 2 * 4 * align(sequences + 1, 128) + _SMEM_RESERVED


def bucket(count: int, floor: int, step: int) -> int:
    """Return what a count is rounded up to, so that few programs are compiled.

    Powers of two from `floor` to `step`, then multiples of `step`.
    """
    if count > step:
        return align(count, step)
    size = floor
    while size < count:
        size *= 2
    return size
