"""Merging the parts of tiles whose context was split over threads: out = sum of w_i out_i, w_i = exp(lse_i - lse)."""

from __future__ import annotations

import math
from typing import Any

from attn_dispatch_cpu.kernels import job as J
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.memory import (
    fill_zero,
    read_f32,
    read_i32,
    read_i64,
    take_ticket,
    write_f32,
)  # fmt: skip
from attn_dispatch_cpu.kernels.rows import make_store_row

NEG_INF = -math.inf


def make_merge_kernel(isa: Isa) -> Any:
    """Build the kernel, as a plain function `(job, worker)`; an item is one split tile's kv head."""
    store_row = make_store_row(isa)

    def merge(job: int, worker: int) -> None:
        items = read_i64(job + 8 * J.ITEMS)
        ticket = read_i64(job + 8 * J.TICKET)
        group = read_i64(job + 8 * J.GROUP)
        kv_heads = read_i64(job + 8 * J.KV_HEADS)
        width = read_i64(job + 8 * J.WIDTH)
        partial_rows = read_i64(job + 8 * J.PARTIAL_ROWS)
        partial_out = read_i64(job + 8 * J.PARTIAL_OUT)
        partial_lse = read_i64(job + 8 * J.PARTIAL_LSE)
        row = (read_i64(job + 8 * J.SCRATCH) + worker * read_i64(job + 8 * J.SCRATCH_BYTES) + 63) // 64 * 64
        item = take_ticket(ticket)
        while item < items:
            entry = read_i64(job + 8 * J.GROUPS) + (item // kv_heads) * (4 * J.GROUP_WORDS)
            head = item % kv_heads
            first = read_i32(entry + 4 * J.GROUP_PART)
            parts = read_i32(entry + 4 * J.GROUP_PARTS)
            tile = read_i64(job + 8 * J.TILES) + read_i32(entry + 4 * J.GROUP_TILE) * (4 * J.TILE_WORDS)
            sequence = read_i32(tile + 4 * J.TILE_SEQUENCE)
            token = read_i32(read_i64(job + 8 * J.QUERY_START) + 4 * sequence) + read_i32(tile + 4 * J.TILE_QUERY)
            tile_head = read_i32(tile + 4 * J.TILE_HEAD)
            inside = head >= tile_head and head < tile_head + read_i32(tile + 4 * J.TILE_HEADS)
            groups = read_i32(tile + 4 * J.TILE_GROUPS)
            rows = read_i32(tile + 4 * J.TILE_QUERIES) * groups if inside else 0
            for r in range(rows):
                peak = NEG_INF
                for p in range(first, first + parts):
                    peak = max(peak, read_f32(partial_lse + 4 * ((p * kv_heads + head) * partial_rows + r)))
                total = 0.0
                fill_zero(row, (4 * width + 127) // 64 * 64)
                for p in range(first, first + parts):
                    at = (p * kv_heads + head) * partial_rows + r
                    lse = read_f32(partial_lse + 4 * at)
                    if lse > NEG_INF or lse != lse:
                        weight = math.exp(lse - peak)
                        total += weight
                        source = partial_out + at * 4 * width
                        for d in range(width):
                            write_f32(row + 4 * d, read_f32(row + 4 * d) + weight * read_f32(source + 4 * d))
                factor = 0.0
                lse = NEG_INF
                if total != 0.0:
                    factor = 1.0 / total
                    lse = peak + math.log(total)
                head_row = head * group + read_i32(tile + 4 * J.TILE_GROUP) + r % groups
                out = read_i64(job + 8 * J.OUT) + (token + r // groups) * read_i64(job + 8 * J.OUT_TOKEN)
                store_row(
                    row, factor, read_i64(job + 8 * J.OUT_KIND), width, out + head_row * read_i64(job + 8 * J.OUT_HEAD)
                )
                lses = read_i64(job + 8 * J.LSE)
                if lses != 0:
                    write_f32(lses + 4 * ((token + r // groups) * kv_heads * group + head_row), lse)
            item = take_ticket(ticket)

    return merge


__all__ = ["make_merge_kernel"]
