"""What the kernels share: reading stored elements, and one tile of query rows' pass over its keys.

Everything between a score and its weight is in base 2 (one instruction on every GPU): scores, slopes and sinks come
multiplied by log2(e).
"""

# The language of kernels has no static types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_keys", "widened"]

PLAIN = tl.constexpr(0)
E4M3 = tl.constexpr(1)
E5M2 = tl.constexpr(2)
INT8 = tl.constexpr(3)


@triton.jit
def widened(stored, STORED: tl.constexpr, COMPUTE: tl.constexpr):
    """Return stored elements in the type that is computed with.

    fp8 comes as bytes and is widened through float16's bits, which every target can: Triton knows fp8 itself only from
    sm_89 and gfx942 on.
    """
    if STORED == E4M3:
        bits = stored.to(tl.uint16)
        # The same exponent and mantissa in float16's places; its bias is 15, e4m3's is 7.
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        wide = half.to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), wide).to(COMPUTE)
    if STORED == E5M2:
        return (stored.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(COMPUTE)
    if STORED == INT8:
        # By way of float32: the interpreter takes an integer's bits for a bfloat16's.
        return stored.to(tl.float32).to(COMPUTE)
    return stored.to(COMPUTE)


@triton.jit
def attend_keys(
    q,  # [BLOCK_M, BLOCK_D], of COMPUTE
    query_at,  # i32[BLOCK_M], positions of the rows
    slopes,  # f32[BLOCK_M], times log2(e)
    begin,
    end,
    key,
    value,
    table,  # where this sequence's row of the block table begins
    first_row,  # of a sequence without pages: where its keys begin
    kv_head,
    scale,  # of the scores; times log2(e) if there is no soft-cap
    cap,  # soft-cap
    key_page,
    key_head,
    key_token,
    value_page,
    value_head,
    value_token,
    PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
    LEVEL: tl.constexpr = None,
):
    """Return (sum of weighted values f32[BLOCK_M, BLOCK_DV], peak, total of weights) over keys begin..end.

    `begin` is a multiple of BLOCK_N. Nothing outside begin..end is read. Weights are relative to the peak, or to LEVEL
    if there is one: then the peak is relative to it too, and the caller sees to it that it is not too far away.
    """
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    if LEVEL is None:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        # Each place of a step keeps its own until the end: threads do not wait for each other in between.
        peak = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    key_base = key + kv_head.to(tl.int64) * key_head
    value_base = value + kv_head.to(tl.int64) * value_head
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_N)
        live = at < end
        if PAGED:
            if BLOCK_SIZE % BLOCK_N == 0:
                # The whole tile lies in one page.
                page = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
                inside = start % BLOCK_SIZE + tl.arange(0, BLOCK_N)
                key_at = page * key_page + inside * key_token
                value_at = page * value_page + inside * value_token
            else:
                pages = tl.load(table + at // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
                key_at = pages * key_page + (at % BLOCK_SIZE) * key_token
                value_at = pages * value_page + (at % BLOCK_SIZE) * value_token
        else:
            key_at = (first_row + at).to(tl.int64) * key_token
            value_at = (first_row + at).to(tl.int64) * value_token
        if HEAD_SIZE == BLOCK_D:
            keys = tl.load(key_base + key_at[None, :] + d[:, None], mask=live[None, :], other=0)
        else:
            keys = tl.load(
                key_base + key_at[None, :] + d[:, None], mask=live[None, :] & (d[:, None] < HEAD_SIZE), other=0
            )
        keys = widened(keys, STORED, COMPUTE)
        if INTERPRETED:
            keys = keys.to(tl.float32)
        scores = tl.dot(q, keys, input_precision="ieee") * scale
        if CAPPED:
            # cap * tanh(x / cap), in base 2; the exponential's limits give tanh's.
            scores = cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(scores / cap * 2.8853900817779268) + 1.0))
        ahead = at[None, :] - query_at[:, None]
        if ALIBI:
            scores -= slopes[:, None] * tl.abs(ahead).to(tl.float32)
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (ahead <= 0)
        if LEFT >= 0:
            seen = seen & (ahead >= -LEFT)
        if RIGHT >= 0:
            seen = seen & (ahead <= RIGHT)
        scores = tl.where(seen, scores, float("-inf"))
        if LEVEL is None:
            higher = tl.maximum(peak, tl.max(scores, 1))
            # A row that has seen nothing yet has no peak to subtract.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - level[:, None])
            shrink = tl.exp2(peak - level)
            total = total * shrink + tl.sum(weights, 1)
            peak = higher
        else:
            scores -= LEVEL
            weights = tl.exp2(scores)
            total += weights
            peak = tl.maximum(peak, scores)
        if VALUE_SIZE == BLOCK_DV:
            values = tl.load(value_base + value_at[:, None] + e[None, :], mask=live[:, None], other=0)
        else:
            values = tl.load(
                value_base + value_at[:, None] + e[None, :], mask=live[:, None] & (e[None, :] < VALUE_SIZE), other=0
            )
        values = widened(values, STORED, COMPUTE)
        weights = weights.to(COMPUTE)
        if INTERPRETED:
            # The interpreter multiplies bfloat16's bits as if they were numbers.
            values = values.to(tl.float32)
            weights = weights.to(tl.float32)
        if LEVEL is None:
            sums = tl.dot(weights, values, sums * shrink[:, None], input_precision="ieee")
        else:
            sums = tl.dot(weights, values, sums, input_precision="ieee")
    if LEVEL is not None:
        peak = tl.max(peak, 1)
        total = tl.sum(total, 1)
    return sums, peak, total
