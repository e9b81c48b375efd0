"""AMX attention for many query rows per kv head: prefill, chunked prefill, encoders.

An item is up to some hundred query rows of one kv head. Its queries are packed once; for every chunk of its context
the values are transposed once, and then, for each panel of 32 rows: scores and softmax strip by strip of 32 tokens,
and after that the product with the values. Panels skip the strips that none of their rows sees.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.addressing import fill_lane_limits, region
from attn_dispatch_cpu.kernels.amx import TILE_BYTES, make_configure, make_release
from attn_dispatch_cpu.kernels.amx_prefill_tiles import (
    STRIP,
    WEIGHT_TILES,
    make_scores,
    make_softmax,
    make_values,
    tile_layout,
)
from attn_dispatch_cpu.kernels.amx_rows import make_place_chunk, read_scales
from attn_dispatch_cpu.kernels.amx_tiles import pack_queries, pack_values, unpack_output
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.items import NEG_INF, first_logit, make_finish_row, query_address, read_item, read_layer
from attn_dispatch_cpu.kernels.memory import fill_zero, read_f32, read_i32, read_i64, take_item, write_f32, write_i64
from attn_dispatch_cpu.kernels.rows import make_load_row
from attn_dispatch_cpu.kernels.softmax import make_adjust
from attn_dispatch_cpu.kernels.vector import LOG2E

PANEL = 32  # query rows: two tiles of 16 lanes


def make_amx_prefill_kernel(isa: Isa, kind: int, emulated: bool) -> Any:
    """Build the kernel of one kind of cache, as a plain function for Numba to compile. Queries are bf16."""
    layout = tile_layout(emulated)
    configure, release = make_configure(layout), make_release(layout)
    scores_of_strip, softmax, product = make_scores(layout), make_softmax(isa), make_values(layout)
    place_keys, place_values = make_place_chunk(isa, kind, False), make_place_chunk(isa, kind, True)
    load_row, finish_row = make_load_row(isa, raw=True), make_finish_row(isa)
    adjust = make_adjust((0,) * 16)

    def prefill(args: int, call: int, worker: int) -> None:
        layer = read_layer(args)
        head_size, scale, cap, flags = layer.head_size, layer.scale, layer.cap, layer.flags
        key_scales, value_scales = layer.key_scales, layer.value_scales
        steps = (head_size + 31) // 32
        columns = (layer.value_head_size + 31) // 32
        query_tile = steps * TILE_BYTES
        panel_bytes = 4 * columns * TILE_BYTES
        column_step = TILE_BYTES * WEIGHT_TILES
        row_pitch = 4 * max(32 * steps, 32 * columns)

        tiles = region(args, worker, S.AMX_TILES)
        queries_at = region(args, worker, S.AMX_QUERIES)
        acc = region(args, worker, S.AMX_ACC)
        scores = region(args, worker, S.AMX_SCORES)
        weights = region(args, worker, S.AMX_WEIGHTS)
        values = region(args, worker, S.AMX_VALUES)
        state = region(args, worker, S.AMX_STATE)
        limits = region(args, worker, S.AMX_LIMITS)
        started = region(args, worker, S.AMX_STARTED)
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
            panels = (rows + PANEL - 1) // PANEL

            for first_row in range(0, panels * PANEL, 16):
                fill_zero(rows_at, 16 * row_pitch)
                for r in range(first_row, min(first_row + 16, rows)):
                    q_at = query_address(args, item, head, r)
                    load_row(q_at, 0, head_size, rows_at + (r - first_row) * row_pitch)
                pack_queries(rows_at, row_pitch, steps, queries_at + (first_row // 16) * query_tile)
            fill_lane_limits(args, item.address, head, rows, panels * PANEL, 1, panels * PANEL, limits)
            for r in range(panels * PANEL):
                peak = first_logit(args, item, head, r)
                total = 1.0 if peak > NEG_INF else 0.0
                at = state + (r // 16) * S.STATE_BYTES + 4 * (r % 16)
                write_f32(at, peak)
                write_f32(at + 64, total)
            fill_zero(started, 8 * panels)

            first = begin // S.AMX_GROUP * S.AMX_GROUP
            while first < end:
                last = min(first + S.AMX_CHUNK, end)
                strips = (last - first + STRIP - 1) // STRIP
                place_keys(args, sequence, head, first, 2 * strips, begin, end, key_buffer, key_groups)
                place_values(args, sequence, head, first, 2 * strips, begin, end, value_buffer, value_groups)
                for j in range(strips):
                    pack_values(value_groups + 32 * j, 2 * columns, values + j * TILE_BYTES, column_step)
                if key_scales != 0:
                    read_scales(args, sequence, head, first, STRIP * strips, begin, end, key_factors, value_factors)

                for p in range(panels):
                    limit = limits + 2 * p * S.LIMIT_BYTES
                    lowest_low = read_i32(limit)
                    highest_low = read_i32(limit + S.LIMIT_BYTES + 60)
                    lowest_high = read_i32(limit + 64)
                    highest_high = read_i32(limit + S.LIMIT_BYTES + 64 + 60)
                    strip_first = max(lowest_low - first, 0) // STRIP
                    strip_last = min((max(highest_high - first, 0) + STRIP - 1) // STRIP, strips)
                    panel = acc + p * panel_bytes
                    for j in range(strip_first, strip_last):
                        position = first + j * STRIP
                        scores_of_strip(key_groups + 32 * j, queries_at + 2 * p * query_tile, steps, scores, tiles)
                        special = flags != 0 or key_scales != 0
                        special = special or position < highest_low or position + STRIP > lowest_high
                        for r in range(2):
                            multiplier = scale * LOG2E
                            if special:
                                adjust(scores + 2 * TILE_BYTES * r, STRIP, 64, limit + r * S.LIMIT_BYTES, position,
                                       key_factors + 4 * j * STRIP if key_scales != 0 else 0, flags, scale,
                                       cap)  # fmt: skip
                                multiplier = 1.0
                            softmax(scores + 2 * TILE_BYTES * r, state + (2 * p + r) * S.STATE_BYTES, multiplier,
                                    weights + r * column_step + j * TILE_BYTES, j - strip_first,
                                    panel + TILE_BYTES * r, 2 * columns,
                                    value_factors + 4 * j * STRIP if value_scales != 0 else 0)  # fmt: skip
                    if strip_last > strip_first:
                        product(values + strip_first * TILE_BYTES, weights + strip_first * TILE_BYTES,
                                strip_last - strip_first, panel, columns, read_i64(started + 8 * p),
                                tiles)  # fmt: skip
                        write_i64(started + 8 * p, 1)
                first += S.AMX_CHUNK

            for r in range(rows):
                if r % 16 == 0:
                    tile = acc + (r // PANEL) * panel_bytes + (r // 16 % 2) * TILE_BYTES
                    if read_i64(started + 8 * (r // PANEL)) != 0:
                        unpack_output(tile, 2 * TILE_BYTES, 2 * columns, rows_at, row_pitch)
                    else:
                        fill_zero(rows_at, 16 * row_pitch)
                at = state + (r // 16) * S.STATE_BYTES + 4 * (r % 16)
                finish_row(args, item, head, r, rows_at + (r % 16) * row_pitch, read_f32(at), read_f32(at + 64))
            number = take_item(call)
        release()

    return prefill


__all__ = ["make_amx_prefill_kernel"]
