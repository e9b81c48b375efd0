"""The record of one call: 64 words of 8 bytes that a kernel reads, instead of fifty arguments.

A kernel's signature is then the same for every kind and feature, `(job address, worker number)`, which the thread pool
can call without knowing more. Integers and addresses are int64, real numbers float64 in the same 8 bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np

TICKET: Final = 0  # address of an int64 counter that workers take items from: COUNTER of the same record
ITEMS: Final = 1
TILES: Final = 2  # i32[items][TILE_WORDS]
KV_HEADS: Final = 3
GROUP: Final = 4  # query heads per kv head
DEPTH: Final = 5  # D
WIDTH: Final = 6  # Dv
Q: Final = 7
Q_TOKEN: Final = 8  # strides are bytes
Q_HEAD: Final = 9
Q_KIND: Final = 10
KEY: Final = 11
KEY_BLOCK: Final = 12
KEY_HEAD: Final = 13
KEY_TOKEN: Final = 14
VALUE: Final = 15
VALUE_BLOCK: Final = 16
VALUE_HEAD: Final = 17
VALUE_TOKEN: Final = 18
TABLE: Final = 19  # i32[S][M]; 0: keys lie one after the other, sequence s from row NEW_START[s]
TABLE_ROW: Final = 20
BLOCK_SIZE: Final = 21
KV_LENS: Final = 22  # i32[S]
QUERY_START: Final = 23  # i32[S + 1]
NEW_START: Final = 24  # i32[S + 1]
OUT: Final = 25
OUT_TOKEN: Final = 26
OUT_HEAD: Final = 27
OUT_KIND: Final = 28
LSE: Final = 29  # f32[T, H] or 0
SCALE: Final = 30  # float64, with a per-tensor scale of the keys folded in
SOFT_CAP: Final = 31  # float64
FLAGS: Final = 32
SLOPES: Final = 33  # f32[H]
SINKS: Final = 34  # f32[H] or 0
LEFT: Final = 35  # window; -1: open. A causal layer has RIGHT = 0
RIGHT: Final = 36
KEY_SCALES: Final = 37  # f32[N, K, B] or 0
VALUE_SCALES: Final = 38
PARTIAL_OUT: Final = 39  # f32[parts][K][rows][Dv]
PARTIAL_LSE: Final = 40  # f32[parts][K][rows]
PARTIAL_ROWS: Final = 41
SCRATCH: Final = 42
SCRATCH_BYTES: Final = 43  # of one worker
SLOTS: Final = 44  # i64[rows], for writing
NEW_KEY: Final = 45
NEW_KEY_TOKEN: Final = 46
NEW_KEY_HEAD: Final = 47
NEW_VALUE: Final = 48
NEW_VALUE_TOKEN: Final = 49
NEW_VALUE_HEAD: Final = 50
NEW_ROWS: Final = 51
GROUPS: Final = 52  # i32[groups][GROUP_WORDS], tiles that were split
OUT_FACTOR: Final = 53  # float64, a per-tensor scale of the values
KEY_SCALE: Final = 54  # float64, the layer's per-tensor scales, for writing
VALUE_SCALE: Final = 55
COUNTER: Final = 63

WORDS: Final = 64

FLAG_CAP: Final = 1
FLAG_ALIBI: Final = 2
FLAG_ADJUST: Final = 4  # a scale that is not positive: maxima must be taken after it

TILE_WORDS: Final = 16
TILE_SEQUENCE: Final = 0
TILE_QUERY: Final = 1  # first query token, counted in its sequence
TILE_QUERIES: Final = 2
TILE_BEGIN: Final = 3  # keys of the tile
TILE_END: Final = 4
TILE_PART: Final = 5  # -1: the whole context, written straight to the output
TILE_SINK: Final = 6  # 1: this tile counts the sink
TILE_HEAD: Final = 7  # first kv head
TILE_HEADS: Final = 8  # kv heads
TILE_GROUP: Final = 9  # first query head of the group, and how many: all, but for very large groups
TILE_GROUPS: Final = 10

GROUP_WORDS: Final = 8
GROUP_PART: Final = 0  # first part; the others follow
GROUP_PARTS: Final = 1
GROUP_TILE: Final = 2  # one of its tiles, for what they have in common


def new_job() -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Return a zeroed record, as integers and (the same memory) as real numbers."""
    words = np.zeros(WORDS, np.int64)
    return words, words.view(np.float64)
