"""Attention for few query rows per kv head: decode, speculative verify. Memory-bound work, so keys stream once.

An item is a sequence's query tile, some neighbouring kv heads and a range of its context. It is read block by block
and, inside a block, head by head: that is the order in which an HND cache lies in memory, so that the hardware's
prefetcher sees runs of `heads * block_size` rows. While the keys of one (block, head) are multiplied those of the next
are fetched, and likewise its values.
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
    write_i64,
)  # fmt: skip
from attn_dispatch_cpu.kernels.narrow_tiles import make_narrow_tiles
from attn_dispatch_cpu.kernels.places import fill_facts, locate
from attn_dispatch_cpu.kernels.rows import make_collect_row, make_load_row, make_store_row
from attn_dispatch_cpu.kernels.softmax import adjust, make_narrow_softmax
from attn_dispatch_cpu.kernels.vector import LOG2E

MAX_CHUNK = 128  # tokens of one step; a block, or several small ones
MIN_CHUNK = 32
LN2 = math.log(2.0)
NEG_INF = -math.inf


def narrow_scratch_bytes(depth: int, width: int, heads: int, rows: int) -> int:
    """Bytes of scratch that one worker needs: what `make_narrow_kernel` lays out, and room to align it."""
    depth, width = -(-depth // 32) * 32, -(-width // 32) * 32
    row_tiles = -(-rows // 4)
    per_tile = 16 * depth + 16 * width + 128 + 320
    return heads * row_tiles * per_tile + 80 * MAX_CHUNK + 8 * width + 4096


def make_narrow_kernel(isa: Isa, kind: int, dot: bool) -> Any:
    """Build the kernel of one kind of cache, as a plain function `(job, worker)` for Numba to compile."""
    tiles_of = make_narrow_tiles(isa, kind, dot)
    scores_tile, values_tiles = tiles_of.scores, tiles_of.values
    column_unit, depth_unit = tiles_of.column_unit, tiles_of.depth_unit
    q_item = 2 if dot else 4
    item_bytes = ITEM_BYTES[kind]
    softmax = make_narrow_softmax(dot)
    load_row = make_load_row(isa, raw=dot)
    store_row = make_store_row(isa)
    collect_row = make_collect_row(column_unit, dot)

    def narrow(job: int, worker: int) -> None:
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

        chunk = block_size
        if chunk < MIN_CHUNK:
            chunk = MIN_CHUNK // block_size * block_size
        if chunk > MAX_CHUNK or read_i64(job + 8 * J.TABLE) == 0:
            chunk = MAX_CHUNK

        q_row = (depth + depth_unit - 1) // depth_unit * depth_unit * q_item
        units = (width + column_unit - 1) // column_unit
        acc_bytes = units * column_unit * 16
        key_lines = depth * item_bytes * 4 // 64
        value_lines = width * item_bytes * 4 // 64
        zero_bytes = (width * item_bytes + 127) // 64 * 64

        base = (read_i64(job + 8 * J.SCRATCH) + worker * read_i64(job + 8 * J.SCRATCH_BYTES) + 63) // 64 * 64
        factors = base
        scores = factors + 64
        weights = scores + 16 * MAX_CHUNK
        keys_now = weights + 16 * MAX_CHUNK
        keys_next = keys_now + 2 * MAX_CHUNK
        values_now = keys_next + 2 * MAX_CHUNK
        values_next = values_now + 2 * MAX_CHUNK
        rows_now = values_next + 2 * MAX_CHUNK
        key_factors = rows_now + 8 * MAX_CHUNK
        value_factors = key_factors + 4 * MAX_CHUNK
        key_bases = value_factors + 4 * MAX_CHUNK
        value_bases = key_bases + 2 * MAX_CHUNK
        entries = value_bases + 2 * MAX_CHUNK
        zeros = entries + 2 * MAX_CHUNK
        output_row = zeros + zero_bytes
        per_item = (output_row + (4 * width + 191) // 64 * 64) // 64 * 64
        fill_zero(zeros, zero_bytes)

        item = take_ticket(ticket)
        while item < items:
            next_item = -1  # taken as late as can be: another worker may be free before this one
            tile = tile_table + item * (4 * J.TILE_WORDS)
            sequence = read_i32(tile + 4 * J.TILE_SEQUENCE)
            queries = read_i32(tile + 4 * J.TILE_QUERIES)
            begin = read_i32(tile + 4 * J.TILE_BEGIN)
            end = read_i32(tile + 4 * J.TILE_END)
            part = read_i32(tile + 4 * J.TILE_PART)
            head_first = read_i32(tile + 4 * J.TILE_HEAD)
            heads = read_i32(tile + 4 * J.TILE_HEADS)
            counts_sink = sinks != 0 and read_i32(tile + 4 * J.TILE_SINK) != 0
            token = read_i32(query_start + 4 * sequence) + read_i32(tile + 4 * J.TILE_QUERY)
            rows = queries * group
            row_tiles = (rows + 3) // 4
            head_tiles = heads * row_tiles

            facts = per_item
            state = facts + head_tiles * 320
            acc = state + head_tiles * 128
            q_rows = (acc + head_tiles * acc_bytes + 63) // 64 * 64
            fill_zero(acc, head_tiles * acc_bytes)
            fill_zero(q_rows, head_tiles * 4 * q_row)  # rows that pad a tile are 0
            q_first = read_i64(job + 8 * J.Q) + token * read_i64(job + 8 * J.Q_TOKEN)
            highest_low = begin
            lowest_high = end
            for h in range(heads):
                head = head_first + h
                for r in range(rows):
                    q_at = q_first + (r // group) * read_i64(job + 8 * J.Q_TOKEN)
                    q_at += (head * group + r % group) * read_i64(job + 8 * J.Q_HEAD)
                    load_row(q_at, read_i64(job + 8 * J.Q_KIND), depth, q_rows + (4 * h * row_tiles + r) * q_row)
                highest_low, lowest_high = fill_facts(job, tile, head, rows, 4, facts + h * row_tiles * 320)
                for lane in range(row_tiles * 16):
                    peak = NEG_INF
                    total = 0.0
                    if counts_sink and lane // 4 < rows:
                        peak = read_f32(sinks + 4 * (head * group + (lane // 4) % group)) * LOG2E
                        if lane % 4 == 0 and peak > NEG_INF:
                            total = 1.0
                    at = state + (h * row_tiles + lane // 16) * 128 + 4 * (lane % 16)
                    write_f32(at, peak)
                    write_f32(at + 64, total)

            first = begin // 4 * 4
            last = first
            tiles = 0
            if first < end:
                last = min((first // chunk + 1) * chunk, end)
                tiles = (last - first + 3) // 4
                for i in range(tiles):
                    key, value, entry = locate(job, sequence, first + 4 * i)
                    write_i64(key_bases + 8 * i, key)
                    write_i64(value_bases + 8 * i, value)
                    write_i64(entries + 8 * i, entry)
                    write_i64(keys_next + 8 * i, key + head_first * key_head)
                    write_i64(values_next + 8 * i, value + head_first * value_head)
            while first < end:
                special = flags != 0 or key_scales != 0 or first < highest_low or first + 4 * tiles > lowest_high
                ahead_first = first
                ahead_last = last
                ahead_tiles = tiles
                for h in range(heads):
                    head = head_first + h
                    keys_now, keys_next = keys_next, keys_now
                    values_now, values_next = values_next, values_now
                    for i in range(tiles):
                        at = read_i64(values_now + 8 * i)
                        t = first + 4 * i
                        for j in range(4):
                            write_i64(rows_now + 32 * i + 8 * j, at + j * value_token)
                        if t < begin or t + 4 > end:
                            for j in range(4):
                                if t + j < begin or t + j >= end:
                                    write_i64(rows_now + 32 * i + 8 * j, zeros)
                        if key_scales != 0:
                            entry = 4 * (read_i64(entries + 8 * i) + head * block_size)
                            for j in range(4):
                                write_f32(key_factors + 16 * i + 4 * j, read_f32(key_scales + entry + 4 * j))
                                factor = read_f32(value_scales + entry + 4 * j)
                                if t + j < begin or t + j >= end:
                                    factor = 0.0
                                write_f32(value_factors + 16 * i + 4 * j, factor)
                    # What to fetch while these are multiplied: the keys and the values of the next step.
                    if h + 1 < heads:
                        for i in range(tiles):
                            write_i64(keys_next + 8 * i, read_i64(key_bases + 8 * i) + (head + 1) * key_head)
                            write_i64(values_next + 8 * i, read_i64(value_bases + 8 * i) + (head + 1) * value_head)
                    else:
                        ahead_first = last
                        ahead_end = end
                        ahead_sequence = sequence
                        ahead_head = head_first
                        if ahead_first >= end:
                            next_item = take_ticket(ticket)
                        if 0 <= next_item < items:
                            ahead_tile = tile_table + next_item * (4 * J.TILE_WORDS)
                            ahead_sequence = read_i32(ahead_tile + 4 * J.TILE_SEQUENCE)
                            ahead_first = read_i32(ahead_tile + 4 * J.TILE_BEGIN) // 4 * 4
                            ahead_end = read_i32(ahead_tile + 4 * J.TILE_END)
                            ahead_head = read_i32(ahead_tile + 4 * J.TILE_HEAD)
                        ahead_last = min((ahead_first // chunk + 1) * chunk, ahead_end)
                        ahead_tiles = (ahead_last - ahead_first + 3) // 4
                        for i in range(ahead_tiles):
                            key, value, entry = locate(job, ahead_sequence, ahead_first + 4 * i)
                            write_i64(key_bases + 8 * i, key)
                            write_i64(value_bases + 8 * i, value)
                            write_i64(entries + 8 * i, entry)
                            write_i64(keys_next + 8 * i, key + ahead_head * key_head)
                            write_i64(values_next + 8 * i, value + ahead_head * value_head)
                        for i in range(max(ahead_tiles, 0), tiles):  # nothing left to fetch: what is there already
                            write_i64(keys_next + 8 * i, read_i64(keys_now + 8 * i))
                            write_i64(values_next + 8 * i, read_i64(values_now + 8 * i))

                    for r in range(row_tiles):
                        which = h * row_tiles + r
                        for i in range(tiles):
                            scores_tile(q_rows + 4 * which * q_row, q_row, read_i64(keys_now + 8 * i), key_token, depth,
                                        scores + 64 * i, read_i64(keys_next + 8 * i))  # fmt: skip
                        multiplier = scale * LOG2E
                        if special:
                            adjust(scores, tiles, 64, facts + 320 * which, first, 4,
                                   key_factors if key_scales != 0 else 0, flags, scale, cap)  # fmt: skip
                            multiplier = 1.0
                        softmax(scores, tiles, weights, state + 128 * which, factors,
                                value_factors if value_scales != 0 else 0, multiplier, keys_next, values_next,
                                key_lines, value_lines)  # fmt: skip
                        values_tiles(acc + which * acc_bytes, weights, rows_now, tiles, width, factors, values_next)
                first = last
                last = ahead_last
                tiles = ahead_tiles

            for h in range(heads):
                for r in range(rows):
                    which = h * row_tiles + r // 4
                    at = state + which * 128 + 16 * (r % 4)
                    peak = read_f32(at)
                    total = read_f32(at + 64) + read_f32(at + 68) + read_f32(at + 72) + read_f32(at + 76)
                    lse = NEG_INF
                    factor = 0.0
                    if total != 0.0:
                        factor = out_factor / total
                        lse = (peak + math.log2(total)) * LN2
                    collect_row(acc + which * acc_bytes, r % 4, units, output_row)
                    head_row = (head_first + h) * group + r % group
                    if part < 0:
                        out = read_i64(job + 8 * J.OUT) + (token + r // group) * read_i64(job + 8 * J.OUT_TOKEN)
                        store_row(output_row, factor, read_i64(job + 8 * J.OUT_KIND), width,
                                  out + head_row * read_i64(job + 8 * J.OUT_HEAD))  # fmt: skip
                        lses = read_i64(job + 8 * J.LSE)
                        if lses != 0:
                            write_f32(lses + 4 * ((token + r // group) * kv_heads * group + head_row), lse)
                    else:
                        entry = (part * kv_heads + head_first + h) * read_i64(job + 8 * J.PARTIAL_ROWS) + r
                        store_row(output_row, factor, 0, width, read_i64(job + 8 * J.PARTIAL_OUT) + entry * 4 * width)
                        write_f32(read_i64(job + 8 * J.PARTIAL_LSE) + 4 * entry, lse)
            item = next_item if next_item >= 0 else take_ticket(ticket)

    return narrow


__all__ = ["make_narrow_kernel", "narrow_scratch_bytes"]
