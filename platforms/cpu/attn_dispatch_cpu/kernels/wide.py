"""Attention for many query rows per kv head: prefill, chunked prefill, encoders. Arithmetic-bound work.

An item is up to 64 query rows (query tokens times the heads of one group) of one kv head. Its queries are laid out once
with a row per lane; then, for every chunk of its context: scores, softmax per lane, values, all as products of the one
register tile in `wide_tiles`. Keys and values that the tile cannot read as they lie are converted once per chunk.
"""

from __future__ import annotations

import math
from typing import Any

from attn_dispatch_cpu.kernels import job as J
from attn_dispatch_cpu.kernels.elements import ITEM_BYTES
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.memory import (
    fill_zero,
    read_f32,
    read_f64,
    read_i32,
    read_i64,
    take_ticket,
    write_f32,
    write_i32,
    write_i64,
)  # fmt: skip
from attn_dispatch_cpu.kernels.places import fill_facts, locate
from attn_dispatch_cpu.kernels.rows import make_load_row, make_store_row
from attn_dispatch_cpu.kernels.softmax import adjust
from attn_dispatch_cpu.kernels.vector import LOG2E
from attn_dispatch_cpu.kernels.wide_tiles import ROWS, interleave_rows, make_product, make_wide_softmax, make_widen_row

CHUNK = 64
SEGMENT = 128  # steps of a score that are summed one after the other, before they are added to the others
LN2 = math.log(2.0)
NEG_INF = -math.inf


def wide_scratch_bytes(depth: int, width: int) -> int:
    """Bytes of scratch that one worker needs: what `make_wide_kernel` lays out, and room to align it."""
    depth, width = -(-depth // 32) * 32, -(-width // 32) * 32
    return (
        4 * (ROWS * (depth + width + 2 * CHUNK + 32) + CHUNK * (depth + width) + 2 * depth + 4 * width + 4 * CHUNK)
        + 4096
    )


def make_wide_kernel(isa: Isa, kind: int, dot: bool) -> Any:
    """Build the kernel of one kind of cache, as a plain function `(job, worker)` for Numba to compile."""
    product = make_product(isa, dot)
    softmax = make_wide_softmax(dot)
    widen_row = make_widen_row(isa, kind)
    load_row = make_load_row(isa, raw=dot)
    store_row = make_store_row(isa)
    item_bytes = ITEM_BYTES[kind]
    pad = 32 if dot else isa.lanes
    in_place = dot  # keys are read where they lie; with a dot product of pairs, if their number is even

    def wide(job: int, worker: int) -> None:
        items = read_i64(job + 8 * J.ITEMS)
        ticket = read_i64(job + 8 * J.TICKET)
        tile_table = read_i64(job + 8 * J.TILES)
        group = read_i64(job + 8 * J.GROUP)
        kv_heads = read_i64(job + 8 * J.KV_HEADS)
        depth = read_i64(job + 8 * J.DEPTH)
        width = read_i64(job + 8 * J.WIDTH)
        key_token = read_i64(job + 8 * J.KEY_TOKEN)
        key_head = read_i64(job + 8 * J.KEY_HEAD)
        value_token = read_i64(job + 8 * J.VALUE_TOKEN)
        value_head = read_i64(job + 8 * J.VALUE_HEAD)
        block_size = read_i64(job + 8 * J.BLOCK_SIZE)
        key_scales = read_i64(job + 8 * J.KEY_SCALES)
        value_scales = read_i64(job + 8 * J.VALUE_SCALES)
        flags = read_i64(job + 8 * J.FLAGS)
        scale = read_f64(job + 8 * J.SCALE)
        cap = read_f64(job + 8 * J.SOFT_CAP)
        sinks = read_i64(job + 8 * J.SINKS)
        query_start = read_i64(job + 8 * J.QUERY_START)
        out_factor = read_f64(job + 8 * J.OUT_FACTOR)

        depth_pad = (depth + pad - 1) // pad * pad
        width_pad = (width + 31) // 32 * 32
        steps = (depth + 1) // 2 if dot else depth
        direct = in_place and depth % 2 == 0

        base = (read_i64(job + 8 * J.SCRATCH) + worker * read_i64(job + 8 * J.SCRATCH_BYTES) + 63) // 64 * 64
        q_lanes = base
        acc = q_lanes + 4 * ROWS * depth_pad
        scores = acc + 4 * ROWS * width_pad
        weights = scores + 4 * ROWS * CHUNK
        state = weights + 4 * ROWS * CHUNK
        facts = state + 128 * (ROWS // 16)
        factors = facts + 320 * (ROWS // 16)
        keys = factors + 4 * ROWS
        values = keys + 4 * CHUNK * depth_pad
        row = values + 4 * CHUNK * width_pad
        zeros = row + 4 * max(depth_pad, width_pad)
        key_factors = zeros + (width * item_bytes + 127) // 64 * 64
        value_factors = key_factors + 4 * CHUNK
        value_rows = value_factors + 4 * CHUNK
        ones = value_rows + 8 * CHUNK + 64
        for r in range(ROWS):
            write_f32(ones + 4 * r, 1.0)
        fill_zero(zeros, key_factors - zeros)

        item = take_ticket(ticket)
        while item < items:
            tile = tile_table + item * (4 * J.TILE_WORDS)
            sequence = read_i32(tile + 4 * J.TILE_SEQUENCE)
            queries = read_i32(tile + 4 * J.TILE_QUERIES)
            begin = read_i32(tile + 4 * J.TILE_BEGIN)
            end = read_i32(tile + 4 * J.TILE_END)
            part = read_i32(tile + 4 * J.TILE_PART)
            head = read_i32(tile + 4 * J.TILE_HEAD)
            group_first = read_i32(tile + 4 * J.TILE_GROUP)
            groups = read_i32(tile + 4 * J.TILE_GROUPS)
            counts_sink = sinks != 0 and read_i32(tile + 4 * J.TILE_SINK) != 0
            token = read_i32(query_start + 4 * sequence) + read_i32(tile + 4 * J.TILE_QUERY)
            rows = queries * groups
            vectors = (rows + 15) // 16

            fill_zero(q_lanes, 4 * ROWS * depth_pad)
            for r in range(rows):
                q_at = read_i64(job + 8 * J.Q) + (token + r // groups) * read_i64(job + 8 * J.Q_TOKEN)
                q_at += (head * group + group_first + r % groups) * read_i64(job + 8 * J.Q_HEAD)
                load_row(q_at, read_i64(job + 8 * J.Q_KIND), depth, row)
                for d in range(steps):
                    write_i32(q_lanes + 4 * (d * ROWS + r), read_i32(row + 4 * d))
            highest_low, lowest_high = fill_facts(job, tile, head, rows, 1, facts)
            for r in range(vectors * 16):
                peak = NEG_INF
                total = 0.0
                if counts_sink and r < rows:
                    peak = read_f32(sinks + 4 * (head * group + group_first + r % groups)) * LOG2E
                    if peak > NEG_INF:
                        total = 1.0
                at = state + (r // 16) * 128 + 4 * (r % 16)
                write_f32(at, peak)
                write_f32(at + 64, total)
            fill_zero(acc, 4 * ROWS * width)

            first = begin
            while first < end:
                last = min(first + CHUNK, end)
                tokens = last - first
                t = first
                while t < last:  # run by run: neighbours in a block
                    key, value, entry = locate(job, sequence, t)
                    run = last - t
                    if read_i64(job + 8 * J.TABLE) != 0:
                        run = min(run, block_size - t % block_size)
                    key += head * key_head
                    value += head * value_head
                    at = t - first
                    if direct:
                        for d in range(0, steps, SEGMENT):
                            product(key + 4 * d, key_token, 4, q_lanes + 4 * ROWS * d, min(SEGMENT, steps - d),
                                    scores + 4 * ROWS * at, run, rows, ones if d > 0 else 0)  # fmt: skip
                    else:
                        for j in range(run):
                            if dot:
                                load_row(key + j * key_token, 0, depth, keys + (at + j) * 2 * depth_pad)
                            else:
                                widen_row(key + j * key_token, depth, keys + (at + j) * 4 * depth_pad)
                    if dot:
                        # Pairs begin at the chunk's first token, and may lie across two blocks.
                        for j in range(run):
                            write_i64(value_rows + 8 * (at + j), value + j * value_token)
                    else:
                        for j in range(run):
                            widen_row(value + j * value_token, width, values + (at + j) * 4 * width_pad)
                    if key_scales != 0:
                        entry = 4 * (entry + head * block_size)
                        for j in range(run):
                            write_f32(key_factors + 4 * (at + j), read_f32(key_scales + entry + 4 * j))
                            write_f32(value_factors + 4 * (at + j), read_f32(value_scales + entry + 4 * j))
                    t += run
                if dot:
                    write_i64(value_rows + 8 * tokens, zeros)
                    for j in range(0, tokens, 2):
                        interleave_rows(read_i64(value_rows + 8 * j), read_i64(value_rows + 8 * j + 8), width,
                                        values + j * 2 * width_pad)  # fmt: skip
                if not direct:
                    unit = 2 if dot else 4
                    for d in range(0, steps, SEGMENT):
                        product(keys + 4 * d, unit * depth_pad, 4, q_lanes + 4 * ROWS * d, min(SEGMENT, steps - d),
                                scores, tokens, rows, ones if d > 0 else 0)  # fmt: skip

                padded = (tokens + 1) // 2 * 2 if dot else tokens
                special = flags != 0 or key_scales != 0 or first < highest_low or first + padded > lowest_high
                for v in range(vectors):
                    multiplier = scale * LOG2E
                    if special:
                        adjust(scores + 64 * v, padded, 4 * ROWS, facts + 320 * v, first, 1,
                               key_factors if key_scales != 0 else 0, flags, scale, cap)  # fmt: skip
                        multiplier = 1.0
                    softmax(scores + 64 * v, padded, weights + 64 * v, state + 128 * v, factors + 64 * v,
                            value_factors if value_scales != 0 else 0, multiplier)  # fmt: skip
                product(values, 4, 4 * width_pad, weights, padded // 2 if dot else tokens, acc, width, rows, factors)
                first = last

            for r in range(rows):
                at = state + (r // 16) * 128 + 4 * (r % 16)
                total = read_f32(at + 64)
                lse = NEG_INF
                factor = 0.0
                if total != 0.0:
                    factor = out_factor / total
                    lse = (read_f32(at) + math.log2(total)) * LN2
                for d in range(width):
                    write_i32(row + 4 * d, read_i32(acc + 4 * (d * ROWS + r)))
                head_row = head * group + group_first + r % groups
                if part < 0:
                    out = read_i64(job + 8 * J.OUT) + (token + r // groups) * read_i64(job + 8 * J.OUT_TOKEN)
                    store_row(row, factor, read_i64(job + 8 * J.OUT_KIND), width,
                              out + head_row * read_i64(job + 8 * J.OUT_HEAD))  # fmt: skip
                    lses = read_i64(job + 8 * J.LSE)
                    if lses != 0:
                        write_f32(lses + 4 * ((token + r // groups) * kv_heads * group + head_row), lse)
                else:
                    entry = (part * kv_heads + head) * read_i64(job + 8 * J.PARTIAL_ROWS) + r
                    store_row(row, factor, 0, width, read_i64(job + 8 * J.PARTIAL_OUT) + entry * 4 * width)
                    write_f32(read_i64(job + 8 * J.PARTIAL_LSE) + 4 * entry, lse)
            item = take_ticket(ticket)

    return wide


__all__ = ["make_wide_kernel", "wide_scratch_bytes"]
