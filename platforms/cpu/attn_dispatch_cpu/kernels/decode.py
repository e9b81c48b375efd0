"""Attention for few query rows per kv head: decode, speculative verify. Memory-bound work, so keys stream once.

An item is a sequence's query tile, some neighbouring kv heads and a range of its context. It is read block by block
and, inside a block, head by head: that is the order in which an HND cache lies in memory, so that the hardware's
prefetcher sees runs of `heads * block_size` rows. While the keys of one (block, head) are multiplied those of the next
are fetched, and likewise its values.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.addressing import fill_lane_limits, locate, region
from attn_dispatch_cpu.kernels.decode_tiles import make_decode_tiles
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.items import NEG_INF, first_logit, make_finish_row, query_address, read_item, read_layer
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES
from attn_dispatch_cpu.kernels.memory import fill_zero, read_f32, read_i64, take_item, write_f32, write_i64
from attn_dispatch_cpu.kernels.rows import make_collect_row, make_load_row
from attn_dispatch_cpu.kernels.softmax import make_adjust, make_decode_softmax
from attn_dispatch_cpu.kernels.vector import LOG2E

MIN_CHUNK = 32


def make_decode_kernel(isa: Isa, kind: int, dot: bool) -> Any:
    """Build the kernel of one kind of cache, as a plain function for Numba to compile."""
    tiles_of = make_decode_tiles(isa, kind, dot)
    scores_tile, values_tiles = tiles_of.scores, tiles_of.values
    column_unit, head_unit = tiles_of.column_unit, tiles_of.head_unit
    q_item = 2 if dot else 4
    item_bytes = ITEM_BYTES[kind]
    softmax = make_decode_softmax(dot)
    load_row = make_load_row(isa, raw=dot)
    finish_row = make_finish_row(isa)
    adjust = make_adjust((0, 1, 2, 3) * 4)
    collect_row = make_collect_row(column_unit, dot)

    def decode(args: int, call: int, worker: int) -> None:
        layer = read_layer(args)
        block_size, scale, cap, flags = layer.block_size, layer.scale, layer.cap, layer.flags
        head_size, value_head_size = layer.head_size, layer.value_head_size
        key_scales, value_scales = layer.key_scales, layer.value_scales

        chunk = block_size
        if chunk < MIN_CHUNK:
            chunk = MIN_CHUNK // block_size * block_size
        if chunk > S.DECODE_CHUNK or not layer.in_blocks:
            chunk = S.DECODE_CHUNK

        q_row = (head_size + head_unit - 1) // head_unit * head_unit * q_item
        units = (value_head_size + column_unit - 1) // column_unit
        acc_bytes = units * column_unit * 16
        key_lines = head_size * item_bytes * 4 // 64
        value_lines = value_head_size * item_bytes * 4 // 64
        zero_bytes = (value_head_size * item_bytes + 127) // 64 * 64

        factors = region(args, worker, S.FACTORS)
        scores = region(args, worker, S.SCORES)
        weights = region(args, worker, S.WEIGHTS)
        keys_now = region(args, worker, S.KEYS_NOW)
        keys_next = region(args, worker, S.KEYS_NEXT)
        values_now = region(args, worker, S.VALUES_NOW)
        values_next = region(args, worker, S.VALUES_NEXT)
        rows_now = region(args, worker, S.VALUE_ROWS)
        key_factors = region(args, worker, S.KEY_FACTORS)
        value_factors = region(args, worker, S.VALUE_FACTORS)
        key_bases = region(args, worker, S.KEY_BASES)
        value_bases = region(args, worker, S.VALUE_BASES)
        entries = region(args, worker, S.ENTRIES)
        zeros = region(args, worker, S.ZEROS)
        output_row = region(args, worker, S.ROW)
        limits = region(args, worker, S.LIMITS)
        state = region(args, worker, S.STATE)
        acc = region(args, worker, S.ACC)
        q_rows = region(args, worker, S.QUERIES)
        fill_zero(zeros, zero_bytes)

        number = take_item(call)
        while number < layer.items:
            next_item = -1  # taken as late as can be: another worker may be free before this one
            item = read_item(args, number)
            sequence, begin, end, heads, rows = item.sequence, item.begin, item.end, item.heads, item.rows
            head_first = item.head
            row_tiles = (rows + 3) // 4
            head_tiles = heads * row_tiles

            fill_zero(acc, head_tiles * acc_bytes)
            fill_zero(q_rows, head_tiles * 4 * q_row)  # rows that pad a tile are 0
            highest_low = begin
            lowest_high = end
            for h in range(heads):
                head = head_first + h
                for r in range(rows):
                    q_at = query_address(args, item, head, r)
                    load_row(q_at, read_i64(args + 8 * A.Q_KIND), head_size, q_rows + (4 * h * row_tiles + r) * q_row)
                at = limits + h * row_tiles * S.LIMIT_BYTES
                highest_low, lowest_high = fill_lane_limits(
                    args, item.address, head, rows, 16 * row_tiles, 4, 4 * row_tiles, at
                )
                for lane in range(row_tiles * 16):
                    peak = first_logit(args, item, head, lane // 4)
                    total = 1.0 if lane % 4 == 0 and peak > NEG_INF else 0.0
                    at = state + (h * row_tiles + lane // 16) * S.STATE_BYTES + 4 * (lane % 16)
                    write_f32(at, peak)
                    write_f32(at + 64, total)

            first = begin // 4 * 4
            last = first
            tiles = 0
            if first < end:
                last = min((first // chunk + 1) * chunk, end)
                tiles = (last - first + 3) // 4
                for i in range(tiles):
                    key, value, entry = locate(args, sequence, first + 4 * i)
                    write_i64(key_bases + 8 * i, key)
                    write_i64(value_bases + 8 * i, value)
                    write_i64(entries + 8 * i, entry)
                    write_i64(keys_next + 8 * i, key + head_first * layer.key_head)
                    write_i64(values_next + 8 * i, value + head_first * layer.value_head)
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
                            write_i64(rows_now + 32 * i + 8 * j, at + j * layer.value_token)
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
                            write_i64(keys_next + 8 * i, read_i64(key_bases + 8 * i) + (head + 1) * layer.key_head)
                            write_i64(
                                values_next + 8 * i, read_i64(value_bases + 8 * i) + (head + 1) * layer.value_head
                            )
                    else:
                        ahead_first = last
                        ahead_end = end
                        ahead_sequence = sequence
                        ahead_head = head_first
                        if ahead_first >= end:
                            next_item = take_item(call)
                        if 0 <= next_item < layer.items:
                            ahead_item = read_item(args, next_item)
                            ahead_sequence, ahead_head = ahead_item.sequence, ahead_item.head
                            ahead_first = ahead_item.begin // 4 * 4
                            ahead_end = ahead_item.end
                        ahead_last = min((ahead_first // chunk + 1) * chunk, ahead_end)
                        ahead_tiles = (ahead_last - ahead_first + 3) // 4
                        for i in range(ahead_tiles):
                            key, value, entry = locate(args, ahead_sequence, ahead_first + 4 * i)
                            write_i64(key_bases + 8 * i, key)
                            write_i64(value_bases + 8 * i, value)
                            write_i64(entries + 8 * i, entry)
                            write_i64(keys_next + 8 * i, key + ahead_head * layer.key_head)
                            write_i64(values_next + 8 * i, value + ahead_head * layer.value_head)
                        for i in range(max(ahead_tiles, 0), tiles):  # nothing left to fetch: what is there already
                            write_i64(keys_next + 8 * i, read_i64(keys_now + 8 * i))
                            write_i64(values_next + 8 * i, read_i64(values_now + 8 * i))

                    for r in range(row_tiles):
                        which = h * row_tiles + r
                        for i in range(tiles):
                            scores_tile(q_rows + 4 * which * q_row, q_row, read_i64(keys_now + 8 * i), layer.key_token,
                                        head_size, scores + 64 * i, read_i64(keys_next + 8 * i))  # fmt: skip
                        multiplier = scale * LOG2E
                        if special:
                            adjust(scores, tiles, 64, limits + S.LIMIT_BYTES * which, first,
                                   key_factors if key_scales != 0 else 0, flags, scale, cap)  # fmt: skip
                            multiplier = 1.0
                        softmax(scores, tiles, weights, state + S.STATE_BYTES * which, factors,
                                value_factors if value_scales != 0 else 0, multiplier, keys_next, values_next,
                                key_lines, value_lines)  # fmt: skip
                        values_tiles(
                            acc + which * acc_bytes, weights, rows_now, tiles, value_head_size, factors, values_next
                        )
                first = last
                last = ahead_last
                tiles = ahead_tiles

            for h in range(heads):
                for r in range(rows):
                    which = h * row_tiles + r // 4
                    at = state + which * S.STATE_BYTES + 16 * (r % 4)
                    peak = read_f32(at)
                    total = read_f32(at + 64) + read_f32(at + 68) + read_f32(at + 72) + read_f32(at + 76)
                    collect_row(acc + which * acc_bytes, r % 4, units, output_row)
                    finish_row(args, item, head_first + h, r, output_row, peak, total)
            number = next_item if next_item >= 0 else take_item(call)

    return decode


__all__ = ["make_decode_kernel"]
