"""The arguments of every kernel: a record of 8-byte words, instead of fifty parameters.

A kernel's signature is then the same for every kind and feature, `(arguments, call, worker)`: the address of this
record, the address of one of its pairs of `CALL_WORDS`, and 0 for the caller or the number of a worker thread.
Integers and addresses are int64, real numbers float64 in the same 8 bytes; strides are bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

NUM_ITEMS: Final = 0
ITEM_TABLE: Final = 1  # i32[items][ITEM_WORDS]
KV_HEADS: Final = 2
GROUP_SIZE: Final = 3  # query heads per kv head
HEAD_SIZE: Final = 4  # D
VALUE_HEAD_SIZE: Final = 5  # Dv
SCRATCH: Final = 6
SCRATCH_BYTES: Final = 7  # of one worker
SCRATCH_OFFSETS: Final = 8  # address of i64[regions]: see `scratch`
Q: Final = 9
Q_TOKEN: Final = 10
Q_HEAD: Final = 11
Q_KIND: Final = 12
KEY: Final = 13
KEY_BLOCK: Final = 14
KEY_HEAD: Final = 15
KEY_TOKEN: Final = 16
VALUE: Final = 17
VALUE_BLOCK: Final = 18
VALUE_HEAD: Final = 19
VALUE_TOKEN: Final = 20
TABLE: Final = 21  # i32[S][M]; 0: keys lie one after the other, sequence s from row NEW_START[s]
TABLE_ROW: Final = 22
BLOCK_SIZE: Final = 23
KV_LENS: Final = 24  # i32[S]
QUERY_START: Final = 25  # i32[S + 1]
NEW_START: Final = 26  # i32[S + 1]
OUT: Final = 27
OUT_TOKEN: Final = 28
OUT_HEAD: Final = 29
OUT_KIND: Final = 30
LSE: Final = 31  # f32[T, H] or 0
SCALE: Final = 32  # float64, with a per-tensor scale of the keys folded in
SOFT_CAP: Final = 33  # float64
FLAGS: Final = 34
SLOPES: Final = 35  # f32[H]
SINKS: Final = 36  # f32[H] or 0
LEFT: Final = 37  # window; -1: open. A causal layer has RIGHT = 0
RIGHT: Final = 38
KEY_SCALES: Final = 39  # f32[N, K, B] or 0
VALUE_SCALES: Final = 40
PARTIAL_OUT: Final = 41  # f32[parts][K][rows][Dv]
PARTIAL_LSE: Final = 42  # f32[parts][K][rows]
PARTIAL_ROWS: Final = 43
SPLITS: Final = 44  # i32[splits][SPLIT_WORDS]: items whose context was cut into parts
SLOTS: Final = 45  # i64[rows], for writing
NEW_KEY: Final = 46
NEW_KEY_TOKEN: Final = 47
NEW_KEY_HEAD: Final = 48
NEW_VALUE: Final = 49
NEW_VALUE_TOKEN: Final = 50
NEW_VALUE_HEAD: Final = 51
NEW_ROWS: Final = 52
OUT_FACTOR: Final = 53  # float64, a per-tensor scale of the values
KEY_SCALE: Final = 54  # float64, the layer's per-tensor scales, for writing
VALUE_SCALE: Final = 55
PREFETCH: Final = 56  # 1: keys and values are read from memory, not from a cache of the CPU

CALLS: Final = 57  # pairs of (next item, state of the call; see `calls`), a pair for each kernel of one run
CALL_WORDS: Final = 2
NUM_CALLS: Final = 5

WORDS: Final = CALLS + CALL_WORDS * NUM_CALLS

FLAG_CAP: Final = 1
FLAG_ALIBI: Final = 2
FLAG_ADJUST: Final = 4  # a scale that is not positive: maxima must be taken after it

ITEM_WORDS: Final = 16
ITEM_SEQUENCE: Final = 0
ITEM_QUERY: Final = 1  # first query token, counted in its sequence
ITEM_QUERIES: Final = 2
ITEM_BEGIN: Final = 3  # its keys
ITEM_END: Final = 4
ITEM_PART: Final = 5  # -1: the whole context, written straight to the output
ITEM_SINK: Final = 6  # 1: this item counts the sink
ITEM_HEAD: Final = 7  # first kv head
ITEM_HEADS: Final = 8  # kv heads
ITEM_GROUP: Final = 9  # first query head of the group, and how many: all, but for very large groups
ITEM_GROUPS: Final = 10

SPLIT_WORDS: Final = 8
SPLIT_PART: Final = 0  # first part; the others follow
SPLIT_PARTS: Final = 1
SPLIT_ITEM: Final = 2  # one of its items, for what they have in common

# The record of a worker thread that waits for its next call.
WAIT_SIGN: Final = 0  # a counter that callers raise,
WAIT_SEEN: Final = 1  # what it was,
WAIT_LOOKS: Final = 2  # and how often to look
WAIT_WORDS: Final = 3

# The kernel that times a code path: [rounds, result, ...].
RATE_WORDS: Final = 16
RATE_CHAINS: Final = 8  # of sums that do not wait for each other


def new_arguments() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return a zeroed record, as integers and (the same memory) as real numbers."""
    words = np.zeros(WORDS, np.int64)
    return words, words.view(np.float64)
