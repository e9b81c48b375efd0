"""AMX attention for few query rows per kv head: decode, speculative verify. Memory-bound, so keys stream once.

An item is a sequence's query tile, some neighbouring kv heads and a range of its context. For every head and chunk:
scores, softmax, values. Both products read the cache in place. While scores are computed the values of the same chunk
are fetched, and while these are multiplied the keys of the next.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.addressing import fill_lane_limits, region
from attn_dispatch_cpu.kernels.amx import TILE_BYTES, make_configure, make_release
from attn_dispatch_cpu.kernels.amx_decode_tiles import (
    GROUP,
    ROWS,
    TOKENS,
    VECTORS,
    collect_row,
    make_scores,
    make_softmax,
    make_values,
    tile_layout,
)
from attn_dispatch_cpu.kernels.amx_rows import make_place_chunk, read_scales
from attn_dispatch_cpu.kernels.amx_tiles import pack_queries
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.items import NEG_INF, first_logit, make_finish_row, query_address, read_item, read_layer
from attn_dispatch_cpu.kernels.memory import fill_zero, read_f32, read_i64, take_item, write_f32
from attn_dispatch_cpu.kernels.rows import make_load_row
from attn_dispatch_cpu.kernels.softmax import make_adjust
from attn_dispatch_cpu.kernels.vector import LOG2E


def make_amx_decode_kernel(isa: Isa, kind: int, emulated: bool) -> Any:
    """Build the kernel of one kind of cache, as a plain function for Numba to compile. Queries are bf16."""
    layout = tile_layout(emulated)
    configure, release = make_configure(layout), make_release(layout)
    scores_of_chunk, softmax, multiply = make_scores(layout), make_softmax(isa), make_values(layout)
    place_keys, place_values = make_place_chunk(isa, kind, False), make_place_chunk(isa, kind, True)
    load_row, finish_row = make_load_row(isa, raw=True), make_finish_row(isa)
    adjust = make_adjust(TOKENS)

    def decode(args: int, call: int, worker: int) -> None:
        layer = read_layer(args)
        head_size, scale, cap, flags = layer.head_size, layer.scale, layer.cap, layer.flags
        key_scales, value_scales = layer.key_scales, layer.value_scales
        fetched = read_i64(args + 8 * A.PREFETCH)

        steps = (head_size + 31) // 32
        columns = (layer.value_head_size + 31) // 32
        q_pitch = 64 * steps

        tiles = region(args, worker, S.AMX_TILES)
        queries_at = region(args, worker, S.AMX_QUERIES)
        acc = region(args, worker, S.AMX_ACC)
        scores = region(args, worker, S.AMX_SCORES)
        weights = region(args, worker, S.AMX_WEIGHTS)
        state = region(args, worker, S.AMX_STATE)
        limits = region(args, worker, S.AMX_LIMITS)
        rows_at = region(args, worker, S.AMX_ROWS)
        key_groups = region(args, worker, S.AMX_KEY_GROUPS)
        value_groups = region(args, worker, S.AMX_VALUE_GROUPS)
        key_buffer = region(args, worker, S.AMX_KEY_BUFFER)
        value_buffer = region(args, worker, S.AMX_VALUE_BUFFER)
        key_factors = region(args, worker, S.AMX_KEY_FACTORS)
        value_factors = region(args, worker, S.AMX_VALUE_FACTORS)
        configure(region(args, worker, S.AMX_CONFIG))

        number = take_item(call)
        while number < layer.items:
            item = read_item(args, number)
            sequence, begin, end, head, rows = item.sequence, item.begin, item.end, item.head, item.rows
            last_head = head + item.heads
            start = begin // GROUP * GROUP
            first = start
            highest_low = begin
            lowest_high = end
            groups = (min(first + S.AMX_CHUNK, end) - first + GROUP - 1) // GROUP
            place_keys(args, sequence, head, first, groups, begin, end, key_buffer, key_groups)
            while head < last_head:
                if first == start:
                    fill_zero(rows_at, 16 * q_pitch)
                    for r in range(rows):
                        q_at = query_address(args, item, head, r)
                        load_row(q_at, 0, head_size, rows_at + r * q_pitch)
                    pack_queries(rows_at, q_pitch, steps, queries_at)
                    if head == item.head or flags & A.FLAG_ALIBI != 0:  # heads differ in their slopes only
                        highest_low, lowest_high = fill_lane_limits(args, item.address, head, rows, 16, 1, ROWS, limits)
                    for lane in range(16):
                        peak = first_logit(args, item, head, lane % ROWS)
                        total = 1.0 if lane < ROWS and peak > NEG_INF else 0.0
                        write_f32(state + 4 * lane, peak)
                        write_f32(state + 64 + 4 * lane, total)
                    fill_zero(acc, columns * TILE_BYTES)

                place_values(args, sequence, head, first, groups, begin, end, value_buffer, value_groups)
                scores_of_chunk(key_groups, groups, queries_at, steps, scores, value_groups,
                                columns if fetched != 0 else 0, tiles)  # fmt: skip
                if key_scales != 0:
                    read_scales(args, sequence, head, first, groups * GROUP, begin, end, key_factors, value_factors)
                multiplier = scale * LOG2E
                if flags != 0 or key_scales != 0 or first < highest_low or first + groups * GROUP > lowest_high:
                    adjust(scores, groups * VECTORS, 64, limits, first, key_factors if key_scales != 0 else 0, flags,
                           scale, cap)  # fmt: skip
                    multiplier = 1.0
                softmax(scores, groups, state, multiplier, weights, acc, columns,
                        value_factors if value_scales != 0 else 0)  # fmt: skip

                next_head = head
                next_first = first + S.AMX_CHUNK
                if next_first >= end:
                    next_head += 1
                    next_first = start
                lines = 0
                next_groups = groups
                if next_head < last_head:
                    next_groups = (min(next_first + S.AMX_CHUNK, end) - next_first + GROUP - 1) // GROUP
                    place_keys(args, sequence, next_head, next_first, next_groups, begin, end, key_buffer, key_groups)
                    # A last chunk may have fewer groups than this one: the table's rest is of an earlier chunk.
                    lines = steps if fetched != 0 else 0
                multiply(value_groups, groups, weights, acc, columns, key_groups, lines, tiles)

                if next_head != head:
                    for r in range(rows):
                        peak = read_f32(state + 4 * r)
                        total = read_f32(state + 64 + 4 * r) + read_f32(state + 64 + 4 * (ROWS + r))
                        collect_row(acc, r, columns, rows_at)
                        finish_row(args, item, head, r, rows_at, peak, total)
                head, first, groups = next_head, next_first, next_groups
            number = take_item(call)
        release()

    return decode


__all__ = ["make_amx_decode_kernel"]
