"""How much of a batch one program of a kernel takes, by kind of GPU: as many rows as leave every register in place.

The numbers come from the compile check: the largest tiles of each kind of GPU that spilled nothing, or, for wide heads
on RDNA, the least. They fit the shared memory of the smallest GPU of their family.
"""

from __future__ import annotations

from dataclasses import dataclass

from .targets import INTERPRETER, Target

__all__ = ["SMALLEST", "Tiles", "decode_tiles", "padded", "prefill_tiles"]


@dataclass(frozen=True)
class Tiles:
    """How much one program of a kernel takes at a time.

    Attributes:
        rows: query rows (BLOCK_M).
        keys: keys of one step (BLOCK_N).
        warps: of one program.
        stages: steps whose keys are under way at once.
    """

    rows: int
    keys: int
    warps: int
    stages: int


SMALLEST = Tiles(16, 16, 8, 1)

# By family: the tiles of heads that are up to so many elements wide.
_PREFILL = {
    "hopper": {
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(128, 32, 8, 2),
        512: Tiles(32, 16, 8, 2),
        1024: SMALLEST,
    },
    "ampere": {
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 32, 8, 3),
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 16, 8, 2),
        1024: SMALLEST,
    },
    # Keys of two steps in LDS at once, where there are 160 KiB of it.
    "cdna4": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 32, 8, 2),
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 32, 8, 2),
        1024: SMALLEST,
    },
    "cdna": {
        64: Tiles(128, 64, 8, 1),
        128: Tiles(128, 32, 8, 1),
        256: Tiles(64, 32, 8, 1),
        512: Tiles(32, 16, 8, 1),
        1024: SMALLEST,
    },
    "rdna": {64: Tiles(128, 32, 8, 1), 128: Tiles(64, 32, 8, 1), 256: Tiles(32, 16, 8, 1), 1024: SMALLEST},
}
_CDNA_DECODE = {128: Tiles(64, 64, 4, 1), 256: Tiles(32, 32, 4, 1), 512: Tiles(16, 16, 4, 1), 1024: SMALLEST}
_NVIDIA_DECODE = {128: Tiles(64, 64, 4, 3), 256: Tiles(32, 32, 4, 2), 512: Tiles(16, 16, 4, 2), 1024: SMALLEST}
_DECODE = {
    "hopper": _NVIDIA_DECODE,
    "ampere": _NVIDIA_DECODE,
    "cdna4": _CDNA_DECODE,
    "cdna": _CDNA_DECODE,
    "rdna": {128: Tiles(64, 64, 4, 1), 1024: SMALLEST},
}
# float32 operands: twice the size, and no matrix instructions outside of CDNA.
_EXACT = {
    "hopper": {64: Tiles(32, 32, 8, 1), 512: SMALLEST},
    "ampere": {64: Tiles(32, 32, 8, 1), 512: SMALLEST},
    "cdna4": {128: Tiles(32, 32, 8, 1), 512: SMALLEST},
    "cdna": {128: Tiles(32, 32, 8, 1), 512: SMALLEST},
    "rdna": {512: SMALLEST},
}


def padded(size: int) -> int:
    """Return a head size as kernels compute it: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


def prefill_tiles(target: Target, head_size: int, value_size: int, compute_bytes: int, converted: bool) -> Tiles:
    """Return the tiles of prefill: many rows, so that each key that was read serves as many as possible.

    Args:
        target: the GPU.
        head_size: D.
        value_size: Dv.
        compute_bytes: of an operand of the matrix products.
        converted: the cache stores another type: its elements are widened in registers.
    """
    if target == INTERPRETER:
        return Tiles(128, 64, 1, 1)  # it takes as long for a large tile as for a small one
    tiles = _widest(_EXACT if compute_bytes == 4 else _PREFILL, target, head_size, value_size)
    if converted and target.family == "ampere" and tiles.rows * tiles.warps > 512:
        return Tiles(64, tiles.keys, 4, tiles.stages)
    if converted and target.family == "cdna4":
        return Tiles(tiles.rows, min(tiles.keys, 32), tiles.warps, tiles.stages)
    return tiles


def decode_tiles(
    target: Target, head_size: int, value_size: int, compute_bytes: int, converted: bool, rows: int
) -> Tiles:
    """Return the tiles of decode for sequences of at most this many rows; other arguments as of `prefill_tiles`."""
    if target == INTERPRETER:
        return Tiles(min(padded(rows), 32), 32, 1, 1)
    tiles = _widest(_EXACT if compute_bytes == 4 else _DECODE, target, head_size, value_size)
    return Tiles(min(padded(rows), tiles.rows), tiles.keys, tiles.warps, tiles.stages)


def _widest(table: dict[str, dict[int, Tiles]], target: Target, head_size: int, value_size: int) -> Tiles:
    width = max(padded(head_size), padded(value_size))
    by_width = table[target.family]
    return by_width[min(size for size in by_width if size >= width)]
