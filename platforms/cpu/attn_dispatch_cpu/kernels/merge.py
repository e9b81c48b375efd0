"""Merging the parts of items whose context was split over threads: out = sum of w_i out_i, w_i = exp(lse_i - lse)."""

from __future__ import annotations

import math
from typing import Any

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.addressing import region
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.memory import fill_zero, read_f32, read_i32, read_i64, take_item, write_f32
from attn_dispatch_cpu.kernels.rows import make_store_row

NEG_INF = -math.inf


def make_merge_kernel(isa: Isa) -> Any:
    """Build the kernel, as a plain function; an item is one split item's kv head."""
    store_row = make_store_row(isa)

    def merge(args: int, call: int, worker: int) -> None:
        items = read_i64(args + 8 * A.NUM_ITEMS)
        group = read_i64(args + 8 * A.GROUP_SIZE)
        kv_heads = read_i64(args + 8 * A.KV_HEADS)
        value_head_size = read_i64(args + 8 * A.VALUE_HEAD_SIZE)
        partial_rows = read_i64(args + 8 * A.PARTIAL_ROWS)
        partial_out = read_i64(args + 8 * A.PARTIAL_OUT)
        partial_lse = read_i64(args + 8 * A.PARTIAL_LSE)
        row = region(args, worker, S.MERGE_ROW)
        item = take_item(call)
        while item < items:
            entry = read_i64(args + 8 * A.SPLITS) + (item // kv_heads) * (4 * A.SPLIT_WORDS)
            head = item % kv_heads
            first = read_i32(entry + 4 * A.SPLIT_PART)
            parts = read_i32(entry + 4 * A.SPLIT_PARTS)
            tile = read_i64(args + 8 * A.ITEM_TABLE) + read_i32(entry + 4 * A.SPLIT_ITEM) * (4 * A.ITEM_WORDS)
            sequence = read_i32(tile + 4 * A.ITEM_SEQUENCE)
            token = read_i32(read_i64(args + 8 * A.QUERY_START) + 4 * sequence) + read_i32(tile + 4 * A.ITEM_QUERY)
            tile_head = read_i32(tile + 4 * A.ITEM_HEAD)
            inside = head >= tile_head and head < tile_head + read_i32(tile + 4 * A.ITEM_HEADS)
            groups = read_i32(tile + 4 * A.ITEM_GROUPS)
            rows = read_i32(tile + 4 * A.ITEM_QUERIES) * groups if inside else 0
            for r in range(rows):
                peak = NEG_INF
                for p in range(first, first + parts):
                    peak = max(peak, read_f32(partial_lse + 4 * ((p * kv_heads + head) * partial_rows + r)))
                total = 0.0
                fill_zero(row, (4 * value_head_size + 63) // 64 * 64)
                for p in range(first, first + parts):
                    at = (p * kv_heads + head) * partial_rows + r
                    lse = read_f32(partial_lse + 4 * at)
                    if lse > NEG_INF or lse != lse:
                        weight = math.exp(lse - peak)
                        total += weight
                        source = partial_out + at * 4 * value_head_size
                        for d in range(value_head_size):
                            write_f32(row + 4 * d, read_f32(row + 4 * d) + weight * read_f32(source + 4 * d))
                factor = 0.0
                lse = NEG_INF
                if total != 0.0:
                    factor = 1.0 / total
                    lse = peak + math.log(total)
                head_row = head * group + read_i32(tile + 4 * A.ITEM_GROUP) + r % groups
                out = read_i64(args + 8 * A.OUT) + (token + r // groups) * read_i64(args + 8 * A.OUT_TOKEN)
                store_row(
                    row,
                    factor,
                    read_i64(args + 8 * A.OUT_KIND),
                    value_head_size,
                    out + head_row * read_i64(args + 8 * A.OUT_HEAD),
                )
                lses = read_i64(args + 8 * A.LSE)
                if lses != 0:
                    write_f32(lses + 4 * ((token + r // groups) * kv_heads * group + head_row), lse)
            item = take_item(call)

    return merge


__all__ = ["make_merge_kernel"]
