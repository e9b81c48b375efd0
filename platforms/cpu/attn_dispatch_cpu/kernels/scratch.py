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

STATE_BYTES: Final = 128  # of 16 lanes: f32[16] maxima, f32[16] sums
LIMIT_BYTES: Final = 5 * 64  # of 16 lanes: see `addressing.fill_lane_limits`


@dataclass(frozen=True, eq=False, slots=True)
class Scratch:
    """The layout of one worker's scratch.

    Attributes:
        offsets: i64[regions], each at a cache line.
        num_bytes: of all, whole pages.
    """

    offsets: npt.NDArray[np.int64]
    num_bytes: int


def lay_out(sizes: dict[int, int]) -> Scratch:
    """Return where regions lie, given the bytes of each from region 0 on."""
    ends = np.cumsum([-(-sizes[region] // LINE_BYTES) * LINE_BYTES for region in range(len(sizes))])
    offsets = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Scratch(offsets, -(-int(ends[-1]) // PAGE_BYTES) * PAGE_BYTES)


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


def _padded(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


__all__ = ["Scratch", "decode_scratch", "prefill_scratch"]
