"""Attention for many query rows per kv head: prefill, chunked prefill, encoders. Arithmetic-bound work.

An item is up to 64 query rows (query tokens times the heads of one group) of one kv head. Its queries are laid out once
with a row per lane; then, for every chunk of its context: scores, softmax per lane, values, all as products of the one
register tile in `wide_tiles`. Keys and values that the tile cannot read as they lie are converted once per chunk.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.addressing import fill_lane_limits, locate, region
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.items import NEG_INF, first_logit, make_finish_row, query_address, read_item, read_layer
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES
from attn_dispatch_cpu.kernels.memory import (
    fill_zero,
    read_f32,
    read_i32,
    read_i64,
    take_item,
    write_f32,
    write_i32,
    write_i64,
)
from attn_dispatch_cpu.kernels.prefill_tiles import (
    ROWS,
    interleave_rows,
    make_prefill_softmax,
    make_product,
    make_widen_row,
)
from attn_dispatch_cpu.kernels.rows import make_load_row
from attn_dispatch_cpu.kernels.scratch import PREFILL_CHUNK
from attn_dispatch_cpu.kernels.softmax import make_adjust
from attn_dispatch_cpu.kernels.vector import LOG2E

SEGMENT = 128  # steps of a score that are summed one after the other, before they are added to the others


def make_prefill_kernel(isa: Isa, kind: int, dot: bool) -> Any:
    """Build the kernel of one kind of cache, as a plain function for Numba to compile."""
    product = make_product(isa, dot)
    softmax = make_prefill_softmax(dot)
    widen_row = make_widen_row(isa, kind)
    load_row = make_load_row(isa, raw=dot)
    adjust = make_adjust((0,) * 16)
    finish_row = make_finish_row(isa)
    item_bytes = ITEM_BYTES[kind]
    pad = 32 if dot else isa.lanes
    in_place = dot  # keys are read where they lie; with a dot product of pairs, if their number is even

    def prefill(args: int, call: int, worker: int) -> None:
        layer = read_layer(args)
        block_size, scale, cap, flags = layer.block_size, layer.scale, layer.cap, layer.flags
        head_size, value_head_size = layer.head_size, layer.value_head_size
        key_scales, value_scales = layer.key_scales, layer.value_scales

        head_size_pad = (head_size + pad - 1) // pad * pad
        value_head_size_pad = (value_head_size + 31) // 32 * 32
        steps = (head_size + 1) // 2 if dot else head_size
        direct = in_place and head_size % 2 == 0

        q_lanes = region(args, worker, S.P_QUERIES)
        acc = region(args, worker, S.P_ACC)
        scores = region(args, worker, S.P_SCORES)
        weights = region(args, worker, S.P_WEIGHTS)
        state = region(args, worker, S.P_STATE)
        limits = region(args, worker, S.P_LIMITS)
        factors = region(args, worker, S.P_FACTORS)
        keys = region(args, worker, S.P_KEYS)
        values = region(args, worker, S.P_VALUES)
        row = region(args, worker, S.P_ROW)
        zeros = region(args, worker, S.P_ZEROS)
        key_factors = region(args, worker, S.P_KEY_FACTORS)
        value_factors = region(args, worker, S.P_VALUE_FACTORS)
        value_rows = region(args, worker, S.P_VALUE_ROWS)
        ones = region(args, worker, S.P_ONES)
        for r in range(ROWS):
            write_f32(ones + 4 * r, 1.0)
        fill_zero(zeros, (value_head_size * item_bytes + 127) // 64 * 64)

        number = take_item(call)
        while number < layer.items:
            item = read_item(args, number)
            sequence, begin, end, head, rows = item.sequence, item.begin, item.end, item.head, item.rows
            vectors = (rows + 15) // 16

            fill_zero(q_lanes, 4 * ROWS * head_size_pad)
            for r in range(rows):
                q_at = query_address(args, item, head, r)
                load_row(q_at, read_i64(args + 8 * A.Q_KIND), head_size, row)
                for d in range(steps):
                    write_i32(q_lanes + 4 * (d * ROWS + r), read_i32(row + 4 * d))
            highest_low, lowest_high = fill_lane_limits(
                args, item.address, head, rows, 16 * vectors, 1, 16 * vectors, limits
            )
            for r in range(vectors * 16):
                peak = first_logit(args, item, head, r)
                total = 1.0 if peak > NEG_INF else 0.0
                at = state + (r // 16) * S.STATE_BYTES + 4 * (r % 16)
                write_f32(at, peak)
                write_f32(at + 64, total)
            fill_zero(acc, 4 * ROWS * value_head_size)

            first = begin
            while first < end:
                last = min(first + PREFILL_CHUNK, end)
                tokens = last - first
                t = first
                while t < last:  # run by run: neighbours in a block
                    key, value, entry = locate(args, sequence, t)
                    run = last - t
                    if layer.in_blocks:
                        run = min(run, block_size - t % block_size)
                    key += head * layer.key_head
                    value += head * layer.value_head
                    at = t - first
                    if direct:
                        for d in range(0, steps, SEGMENT):
                            product(key + 4 * d, layer.key_token, 4, q_lanes + 4 * ROWS * d, min(SEGMENT, steps - d),
                                    scores + 4 * ROWS * at, run, rows, ones if d > 0 else 0)  # fmt: skip
                    else:
                        for j in range(run):
                            if dot:
                                load_row(key + j * layer.key_token, 0, head_size, keys + (at + j) * 2 * head_size_pad)
                            else:
                                widen_row(key + j * layer.key_token, head_size, keys + (at + j) * 4 * head_size_pad)
                    if dot:
                        # Pairs begin at the chunk's first token, and may lie across two blocks.
                        for j in range(run):
                            write_i64(value_rows + 8 * (at + j), value + j * layer.value_token)
                    else:
                        for j in range(run):
                            widen_row(
                                value + j * layer.value_token,
                                value_head_size,
                                values + (at + j) * 4 * value_head_size_pad,
                            )
                    if key_scales != 0:
                        entry = 4 * (entry + head * block_size)
                        for j in range(run):
                            write_f32(key_factors + 4 * (at + j), read_f32(key_scales + entry + 4 * j))
                            write_f32(value_factors + 4 * (at + j), read_f32(value_scales + entry + 4 * j))
                    t += run
                if dot:
                    write_i64(value_rows + 8 * tokens, zeros)
                    for j in range(0, tokens, 2):
                        interleave_rows(read_i64(value_rows + 8 * j), read_i64(value_rows + 8 * j + 8), value_head_size,
                                        values + j * 2 * value_head_size_pad)  # fmt: skip
                if not direct:
                    unit = 2 if dot else 4
                    for d in range(0, steps, SEGMENT):
                        product(keys + 4 * d, unit * head_size_pad, 4, q_lanes + 4 * ROWS * d, min(SEGMENT, steps - d),
                                scores, tokens, rows, ones if d > 0 else 0)  # fmt: skip

                padded = (tokens + 1) // 2 * 2 if dot else tokens
                special = flags != 0 or key_scales != 0 or first < highest_low or first + padded > lowest_high
                for v in range(vectors):
                    multiplier = scale * LOG2E
                    if special:
                        adjust(scores + 64 * v, padded, 4 * ROWS, limits + S.LIMIT_BYTES * v, first,
                               key_factors if key_scales != 0 else 0, flags, scale, cap)  # fmt: skip
                        multiplier = 1.0
                    softmax(scores + 64 * v, padded, weights + 64 * v, state + S.STATE_BYTES * v, factors + 64 * v,
                            value_factors if value_scales != 0 else 0, multiplier)  # fmt: skip
                product(
                    values,
                    4,
                    4 * value_head_size_pad,
                    weights,
                    padded // 2 if dot else tokens,
                    acc,
                    value_head_size,
                    rows,
                    factors,
                )
                first = last

            for r in range(rows):
                at = state + (r // 16) * S.STATE_BYTES + 4 * (r % 16)
                for d in range(value_head_size):
                    write_i32(row + 4 * d, read_i32(acc + 4 * (d * ROWS + r)))
                finish_row(args, item, head, r, row, read_f32(at), read_f32(at + 64))
            number = take_item(call)

    return prefill


__all__ = ["make_prefill_kernel"]
