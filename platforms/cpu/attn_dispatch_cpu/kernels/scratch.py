"""Where a kernel keeps what it works on: the regions of one worker's scratch, their sizes and offsets.

A region has a number here and its size here. Python allocates by this table and hands the offsets to the kernels, so
that the size of the memory and its use cannot part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

LINE_BYTES = 64
PAGE_BYTES = 4096
VECTOR = 32  # elements that rows are padded to: the widest vector of any kernel

# Decode: few query rows per kv head.
DECODE_ROWS: Final = 4  # query rows of a register tile
DECODE_TOKENS: Final = 4
DECODE_CHUNK: Final = 128  # tokens of one step; a block, or several small ones
(FACTORS, SCORES, WEIGHTS, KEYS_NOW, KEYS_NEXT, VALUES_NOW, VALUES_NEXT, VALUE_ROWS, KEY_FACTORS, VALUE_FACTORS,
 KEY_BASES, VALUE_BASES, ENTRIES, ZEROS, ROW, LIMITS, STATE, ACC, QUERIES) = range(19)  # fmt: skip

# Prefill: many query rows per kv head.
PREFILL_ROWS: Final = 64  # query rows of an item, padded: the lanes that all tiles run over
PREFILL_CHUNK: Final = 64  # tokens of one step
(P_QUERIES, P_ACC, P_SCORES, P_WEIGHTS, P_STATE, P_LIMITS, P_FACTORS, P_KEYS, P_VALUES, P_ROW, P_ZEROS,
 P_KEY_FACTORS, P_VALUE_FACTORS, P_VALUE_ROWS, P_ONES) = range(15)  # fmt: skip

# AMX, both kernels.
AMX_GROUP: Final = 16  # tokens of a tile of keys or values as they lie
AMX_CHUNK: Final = 256  # tokens of one step
AMX_MAX_ROWS: Final = 512  # query rows of an item of prefill
AMX_DECODE_ROWS: Final = 8  # query rows of decode: both halves of a tile's 16
(AMX_CONFIG, AMX_TILES, AMX_QUERIES, AMX_ACC, AMX_SCORES, AMX_WEIGHTS, AMX_VALUES, AMX_STATE, AMX_LIMITS, AMX_STARTED,
 AMX_ROWS, AMX_KEY_GROUPS, AMX_VALUE_GROUPS, AMX_KEY_BUFFER, AMX_VALUE_BUFFER, AMX_KEY_FACTORS,
 AMX_VALUE_FACTORS) = range(17)  # fmt: skip

# Merging the parts of a context.
MERGE_ROW: Final = 0

STATE_BYTES: Final = 128  # of 16 lanes: f32[16] maxima, f32[16] sums
LIMIT_BYTES: Final = 4 * 64  # of 16 lanes: see `addressing.fill_lane_limits`


@dataclass(frozen=True, eq=False, slots=True)
class Scratch:
    """The layout of one worker's scratch.

    Attributes:
        offsets: i64[regions], each at a cache line.
        offsets_at: their address.
        num_bytes: of all, whole pages.
    """

    offsets: npt.NDArray[np.int64]
    offsets_at: int
    num_bytes: int


def lay_out(sizes: dict[int, int]) -> Scratch:
    """Return where regions lie, given the bytes of each from region 0 on."""
    ends = np.cumsum([-(-sizes[region] // LINE_BYTES) * LINE_BYTES for region in range(len(sizes))])
    offsets = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Scratch(offsets, offsets.ctypes.data, -(-int(ends[-1]) // PAGE_BYTES) * PAGE_BYTES)


def decode_scratch(head_size: int, value_head_size: int, heads: int, rows: int) -> Scratch:
    """Return the scratch of the decode kernel, for items of up to `heads` kv heads with `rows` query rows each."""
    head_size, value_head_size = _padded(head_size), _padded(value_head_size)
    tiles = heads * -(-rows // DECODE_ROWS)
    lanes = DECODE_ROWS * DECODE_TOKENS
    addresses = 8 * DECODE_CHUNK // DECODE_TOKENS
    return lay_out(
        {
            FACTORS: 4 * lanes,
            SCORES: 4 * DECODE_ROWS * DECODE_CHUNK,
            WEIGHTS: 4 * DECODE_ROWS * DECODE_CHUNK,
            **dict.fromkeys((KEYS_NOW, KEYS_NEXT, VALUES_NOW, VALUES_NEXT), addresses),
            VALUE_ROWS: 8 * DECODE_CHUNK,
            KEY_FACTORS: 4 * DECODE_CHUNK,
            VALUE_FACTORS: 4 * DECODE_CHUNK,
            **dict.fromkeys((KEY_BASES, VALUE_BASES, ENTRIES), addresses),
            ZEROS: 4 * value_head_size + LINE_BYTES,
            ROW: 4 * value_head_size,
            LIMITS: tiles * LIMIT_BYTES,
            STATE: tiles * STATE_BYTES,
            ACC: tiles * DECODE_ROWS * 4 * value_head_size,
            QUERIES: tiles * DECODE_ROWS * 4 * head_size,
        }
    )


def prefill_scratch(head_size: int, value_head_size: int) -> Scratch:
    """Return the scratch of the prefill kernel."""
    head_size, value_head_size = _padded(head_size), _padded(value_head_size)
    vectors = PREFILL_ROWS // 16
    return lay_out(
        {
            P_QUERIES: 4 * PREFILL_ROWS * head_size,
            P_ACC: 4 * PREFILL_ROWS * value_head_size,
            P_SCORES: 4 * PREFILL_ROWS * PREFILL_CHUNK,
            P_WEIGHTS: 4 * PREFILL_ROWS * PREFILL_CHUNK,
            P_STATE: vectors * STATE_BYTES,
            P_LIMITS: vectors * LIMIT_BYTES,
            P_FACTORS: 4 * PREFILL_ROWS,
            P_KEYS: 4 * PREFILL_CHUNK * head_size,
            P_VALUES: 4 * PREFILL_CHUNK * value_head_size,
            P_ROW: 4 * max(head_size, value_head_size),
            P_ZEROS: 4 * value_head_size + LINE_BYTES,
            P_KEY_FACTORS: 4 * PREFILL_CHUNK,
            P_VALUE_FACTORS: 4 * PREFILL_CHUNK,
            P_VALUE_ROWS: 8 * (PREFILL_CHUNK + 1),
            P_ONES: 4 * PREFILL_ROWS,
        }
    )


def merge_scratch(value_head_size: int) -> Scratch:
    """Return the scratch of the merge kernel."""
    return lay_out({MERGE_ROW: 4 * _padded(value_head_size)})


def amx_prefill_scratch(head_size: int, value_head_size: int, rows: int) -> Scratch:
    """Return the scratch of the AMX prefill kernel, for items of up to `rows` query rows."""
    head_size, value_head_size = _padded(head_size), _padded(value_head_size)
    rows = -(-rows // 32) * 32
    return lay_out(
        _amx(head_size, value_head_size)
        | {
            AMX_QUERIES: 2 * rows * head_size,
            AMX_ACC: 4 * rows * value_head_size,
            AMX_SCORES: 4 * 32 * 32,
            AMX_WEIGHTS: 2 * 32 * AMX_CHUNK,
            AMX_VALUES: 2 * AMX_CHUNK * value_head_size,
            AMX_STATE: rows // 16 * STATE_BYTES,
            AMX_LIMITS: rows // 16 * LIMIT_BYTES,
            AMX_STARTED: 8 * (rows // 32),
        }
    )


def amx_decode_scratch(head_size: int, value_head_size: int) -> Scratch:
    """Return the scratch of the AMX decode kernel."""
    head_size, value_head_size = _padded(head_size), _padded(value_head_size)
    return lay_out(
        _amx(head_size, value_head_size)
        | {
            AMX_QUERIES: 2 * 16 * head_size,
            AMX_ACC: 4 * 16 * value_head_size // 2,
            AMX_SCORES: 4 * AMX_DECODE_ROWS * AMX_CHUNK,
            AMX_WEIGHTS: 4 * 16 * AMX_CHUNK,
            AMX_VALUES: 0,
            AMX_STATE: STATE_BYTES,
            AMX_LIMITS: LIMIT_BYTES,
            AMX_STARTED: 0,
        }
    )


def _amx(head_size: int, value_head_size: int) -> dict[int, int]:
    """The regions that both AMX kernels have alike; sizes are padded."""
    return {
        AMX_CONFIG: LINE_BYTES,
        AMX_TILES: 8 * 1024,  # of the emulation
        AMX_ROWS: 4 * 16 * max(head_size, value_head_size),
        AMX_KEY_GROUPS: 16 * AMX_CHUNK // AMX_GROUP,
        AMX_VALUE_GROUPS: 16 * AMX_CHUNK // AMX_GROUP,
        AMX_KEY_BUFFER: 2 * AMX_CHUNK * head_size,
        AMX_VALUE_BUFFER: 2 * AMX_CHUNK * value_head_size,
        AMX_KEY_FACTORS: 4 * AMX_CHUNK,
        AMX_VALUE_FACTORS: 4 * AMX_CHUNK,
    }


def amx_prefill_rows(head_size: int, value_head_size: int) -> int:
    """Return how many query rows an item of the AMX prefill has, so that they stay in the second-level cache."""
    return min(AMX_MAX_ROWS, max(64, AMX_MAX_ROWS * 128 // max(head_size, value_head_size, 1) // 32 * 32))


def _padded(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


__all__ = [
    "Scratch",
    "amx_decode_scratch",
    "amx_prefill_rows",
    "amx_prefill_scratch",
    "decode_scratch",
    "merge_scratch",
    "prefill_scratch",
]
