"""The kernels: prefill over pages, split decode, the merge of its parts, and the cache write.

A tile is BLOCK_M rows of one sequence and one key/value head. A row is one query token of one of the heads that share
it: row r of a sequence is token r // GROUP, head r % GROUP, so that grouped heads read each key once.

Shapes: S sequences, T query tokens, H query heads, K key/value heads, D and Dv head sizes, M blocks per sequence.
Splitting decode over keys: FlashDecoding (Dao et al., 2023); running softmax: FlashAttention-2 (Dao, 2023);
a fixed maximum instead: FlashDecoding++ (Hong et al., 2023), see `fixed_maximum`.
"""

# The language of kernels has no static types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .elements import attend_keys

__all__ = ["decode", "merge", "prefill", "write"]


@triton.jit
def _rows(item, query_start, kv_lens, item_sequence, item_row, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return what a tile is: (sequence, its keys, first query token, rows, which are there, positions, first, last)."""
    sequence = tl.load(item_sequence + item)
    begin_row = tl.load(item_row + item)
    first_token = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - first_token
    kv_len = tl.load(kv_lens + sequence)
    rows = begin_row + tl.arange(0, BLOCK_M)
    there = rows < query_len * GROUP
    # The last query sits at the last key.
    offset = kv_len - query_len
    lowest = begin_row // GROUP + offset
    highest = tl.minimum((begin_row + BLOCK_M - 1) // GROUP, query_len - 1) + offset
    return sequence, kv_len, first_token, rows, there, rows // GROUP + offset, lowest, highest


@triton.jit
def _span(
    kv_len,
    lowest,
    highest,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the keys (begin, end) that a tile with these positions sees; begin is a multiple of BLOCK_N."""
    begin = 0
    end = kv_len
    if CAUSAL:
        end = tl.minimum(end, highest + 1)
    if RIGHT >= 0:
        end = tl.minimum(end, highest + RIGHT + 1)
    if LEFT >= 0:
        begin = tl.maximum(lowest - LEFT, 0) // BLOCK_N * BLOCK_N
    return begin, tl.maximum(end, 0)


@triton.jit
def _queries(
    q,
    first_token,
    rows,
    there,
    kv_head,
    q_token,
    q_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return a tile's queries, [BLOCK_M, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    at = (first_token + rows // GROUP).to(tl.int64) * q_token + (kv_head * GROUP + rows % GROUP) * q_head
    found = tl.load(q + at[:, None] + d[None, :], mask=there[:, None] & (d[None, :] < HEAD_SIZE), other=0).to(COMPUTE)
    if INTERPRETED:
        found = found.to(tl.float32)
    return found


@triton.jit(do_not_specialize=["table_width"])
def prefill(
    q,  # [T, H, D]
    key,  # [N, K, B, D], or rows [T, K, D]
    value,  # [N, K, B, Dv], or rows [T, K, Dv]
    out,  # [T, H, Dv]
    lse,  # f32[T, H]
    slopes,  # f32[H]
    sinks,  # f32[H]
    query_start,  # i32[S + 1]
    kv_lens,  # i32[S]
    key_start,  # i32[S + 1], rows of keys without pages
    block_table,  # i32[S, M]
    item_sequence,  # i32[tiles]
    item_row,  # i32[tiles], each tile's first row in its sequence
    table_width,
    scale,
    cap,
    value_scale,
    q_token,
    q_head,
    key_page,
    key_head,
    key_token,
    value_page,
    value_head,
    value_token,
    out_token,
    out_head,
    num_heads,
    PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
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
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend one tile of rows to all its keys. Grid: (tiles, K)."""
    kv_head = tl.program_id(1)
    sequence, kv_len, first_token, rows, there, query_at, lowest, highest = _rows(
        tl.program_id(0), query_start, kv_lens, item_sequence, item_row, GROUP, BLOCK_M
    )
    begin, end = _span(kv_len, lowest, highest, CAUSAL, LEFT, RIGHT, BLOCK_N)
    heads = kv_head * GROUP + rows % GROUP
    queries = _queries(
        q, first_token, rows, there, kv_head, q_token, q_head, GROUP, HEAD_SIZE, BLOCK_D, COMPUTE, INTERPRETED
    )
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + heads) * 1.4426950408889634
    first_row = 0
    if not PAGED:
        first_row = tl.load(key_start + sequence)
    sums, peak, total = attend_keys(
        queries, query_at, slope, begin, end, key, value, block_table + sequence.to(tl.int64) * table_width, first_row,
        kv_head, scale, cap, key_page, key_head, key_token, value_page, value_head, value_token, PAGED, BLOCK_SIZE,
        HEAD_SIZE, VALUE_SIZE, STORED, COMPUTE, INTERPRETED, CAUSAL, LEFT, RIGHT, CAPPED, ALIBI, BLOCK_M, BLOCK_N,
        BLOCK_D, BLOCK_DV, STAGES,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + heads) * 1.4426950408889634
        higher = tl.maximum(peak, sink)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.exp2(sink - level)
        sums = sums * shrink[:, None]
        peak = higher
    nothing = total == 0.0
    share = tl.where(nothing, 1.0, total)
    result = sums / share[:, None] * value_scale
    tokens = (first_token + rows // GROUP).to(tl.int64)
    e = tl.arange(0, BLOCK_DV)
    tl.store(
        out + (tokens * out_token + heads * out_head)[:, None] + e[None, :],
        result.to(out.dtype.element_ty),
        mask=there[:, None] & (e[None, :] < VALUE_SIZE),
    )
    if LSE:
        natural = tl.where(nothing, float("-inf"), (peak + tl.log2(share)) * 0.6931471805599453)
        tl.store(lse + tokens * num_heads + heads, natural, mask=there)


@triton.jit(do_not_specialize=["table_width"])
def decode(
    q,  # [T, H, D]
    key,  # [N, K, B, D]
    value,  # [N, K, B, Dv]
    part,  # f32[tiles, K, splits, BLOCK_M, Dv], each split's own result
    part_lse,  # f32[tiles, K, splits, BLOCK_M], in base 2
    slopes,  # f32[H]
    query_start,  # i32[S + 1]
    kv_lens,  # i32[S]
    key_start,  # i32[S + 1], rows of keys without pages
    block_table,  # i32[S, M]
    item_sequence,  # i32[tiles]
    item_row,  # i32[tiles]
    table_width,
    scale,
    cap,
    q_token,
    q_head,
    key_page,
    key_head,
    key_token,
    value_page,
    value_head,
    value_token,
    PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
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
    LEVEL: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
):
    """Attend one tile of rows to one part of its keys. Grid: (tiles, K, splits).

    With a LEVEL (FlashDecoding++) weights are relative to it, and the tile is computed again, with a running maximum,
    where a row's largest weight is not within 2^LOWEST..2^HIGHEST.
    """
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    sequence, kv_len, first_token, rows, there, query_at, lowest, highest = _rows(
        item, query_start, kv_lens, item_sequence, item_row, GROUP, BLOCK_M
    )
    begin, end = _span(kv_len, lowest, highest, CAUSAL, LEFT, RIGHT, BLOCK_N)
    length = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * length
    end = tl.minimum(end, begin + length)
    queries = _queries(
        q, first_token, rows, there, kv_head, q_token, q_head, GROUP, HEAD_SIZE, BLOCK_D, COMPUTE, INTERPRETED
    )
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + kv_head * GROUP + rows % GROUP) * 1.4426950408889634
    first_row = 0
    if not PAGED:
        first_row = tl.load(key_start + sequence)
    sums, peak, total = attend_keys(
        queries, query_at, slope, begin, end, key, value, block_table + sequence.to(tl.int64) * table_width, first_row,
        kv_head, scale, cap, key_page, key_head, key_token, value_page, value_head, value_token, PAGED, BLOCK_SIZE,
        HEAD_SIZE, VALUE_SIZE, STORED, COMPUTE, INTERPRETED, CAUSAL, LEFT, RIGHT, CAPPED, ALIBI, BLOCK_M, BLOCK_N,
        BLOCK_D, BLOCK_DV, STAGES, LEVEL,
    )  # fmt: skip
    if LEVEL is not None:
        # A row that sees nothing has no score to be far away. NaN stays NaN either way.
        far = there & (peak > float("-inf")) & ((peak < LOWEST) | (peak > HIGHEST))
        peak = tl.full([BLOCK_M], LEVEL, tl.float32)
        if tl.max(far.to(tl.int32), 0) > 0:
            # Seldom: with a single step under way it takes the fewest registers from the loop above.
            sums, peak, total = attend_keys(
                queries, query_at, slope, begin, end, key, value, block_table + sequence.to(tl.int64) * table_width,
                first_row, kv_head, scale, cap, key_page, key_head, key_token, value_page, value_head, value_token,
                PAGED, BLOCK_SIZE, HEAD_SIZE, VALUE_SIZE, STORED, COMPUTE, INTERPRETED, CAUSAL, LEFT, RIGHT, CAPPED,
                ALIBI, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, 1,
            )  # fmt: skip
    nothing = total == 0.0
    share = tl.where(nothing, 1.0, total)
    at = ((item.to(tl.int64) * tl.num_programs(1) + kv_head) * splits + split) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_DV)
    tl.store(
        part + at[:, None] * VALUE_SIZE + e[None, :],
        sums / share[:, None],
        mask=there[:, None] & (e[None, :] < VALUE_SIZE),
    )
    tl.store(part_lse + at, tl.where(nothing, float("-inf"), peak + tl.log2(share)), mask=there)


@triton.jit(do_not_specialize=["splits"])
def merge(
    part,  # f32[tiles, K, splits, ROWS, Dv]
    part_lse,  # f32[tiles, K, splits, ROWS], in base 2
    out,  # [T, H, Dv]
    lse,  # f32[T, H]
    sinks,  # f32[H]
    query_start,  # i32[S + 1]
    item_sequence,  # i32[tiles]
    item_row,  # i32[tiles]
    splits,
    value_scale,
    out_token,
    out_head,
    num_heads,
    GROUP: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Weigh the splits of one row by their log-sum-exp, and add the sink. Grid: (tiles, K, ROWS)."""
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    place = tl.program_id(2)
    sequence = tl.load(item_sequence + item)
    first_token = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - first_token
    row = tl.load(item_row + item) + place
    if row < query_len * GROUP:
        e = tl.arange(0, BLOCK_DV)
        head = kv_head * GROUP + row % GROUP
        base = (item.to(tl.int64) * tl.num_programs(1) + kv_head) * splits * ROWS + place
        peak = float("-inf")
        total = 0.0
        sums = tl.zeros([BLOCK_DV], tl.float32)
        if SINKS:
            peak = tl.load(sinks + head) * 1.4426950408889634
            total = tl.where(peak == float("-inf"), 0.0, 1.0)
        for split in range(splits):
            at = base + split * ROWS
            own = tl.load(part_lse + at)
            higher = tl.maximum(peak, own)
            level = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(peak - level)
            weight = tl.exp2(own - level)
            total = total * shrink + weight
            sums = sums * shrink + weight * tl.load(part + at * VALUE_SIZE + e, mask=e < VALUE_SIZE, other=0.0)
            peak = higher
        nothing = total == 0.0
        share = tl.where(nothing, 1.0, total)
        token = (first_token + row // GROUP).to(tl.int64)
        result = (sums / share * value_scale).to(out.dtype.element_ty)
        tl.store(out + token * out_token + head * out_head + e, result, mask=e < VALUE_SIZE)
        if LSE:
            natural = tl.where(nothing, float("-inf"), (peak + tl.log2(share)) * 0.6931471805599453)
            tl.store(lse + token * num_heads + head, natural)


@triton.jit(do_not_specialize=["count"])
def write(
    rows,  # [rows, K, D], of the cache's type (fp8 as bytes)
    cache,  # [N, K, B, D]
    slots,  # i64[rows], -1: not written
    count,
    row_token,
    row_head,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Store new rows in their slots. Grid: (ceil(rows / ROWS), K)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < count, other=-1)
    d = tl.arange(0, BLOCK_WIDTH)
    mask = (slot >= 0)[:, None] & (d[None, :] < WIDTH)
    source = row.to(tl.int64) * row_token + head * row_head
    new = tl.load(rows + source[:, None] + d[None, :], mask=mask, other=0)
    target = ((slot // BLOCK_SIZE * num_kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * WIDTH
    tl.store(cache + target[:, None] + d[None, :], new, mask=mask)
