"""Where a work item's keys and values and a worker's scratch lie, and what each query row may see."""

from __future__ import annotations

from numba import njit

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.memory import read_f32, read_i32, read_i64, write_f32, write_i32
from attn_dispatch_cpu.kernels.scratch import LIMIT_BYTES


@njit  # type: ignore[untyped-decorator]
def region(args: int, worker: int, index: int) -> int:
    """Return the address of a region of a worker's scratch (see `scratch`)."""
    start = read_i64(args + 8 * A.SCRATCH) + worker * read_i64(args + 8 * A.SCRATCH_BYTES)
    return start + read_i64(read_i64(args + 8 * A.SCRATCH_OFFSETS) + 8 * index)  # type: ignore[no-any-return]


@njit  # type: ignore[untyped-decorator]
def locate(args: int, sequence: int, position: int) -> tuple[int, int, int]:
    """Return the addresses of one token's key and value in kv head 0, and its number among head 0's scales.

    Positions up to the next multiple of the block size follow at the token stride, heads at the head stride.
    """
    table = read_i64(args + 8 * A.TABLE)
    if table == 0:
        row = position + read_i32(read_i64(args + 8 * A.NEW_START) + 4 * sequence)
        block = 0
        entry = 0
    else:
        size = read_i64(args + 8 * A.BLOCK_SIZE)
        index = position // size
        row = position - index * size
        block = read_i32(table + sequence * read_i64(args + 8 * A.TABLE_ROW) + 4 * index)
        entry = block * read_i64(args + 8 * A.KV_HEADS) * size + row
    key = read_i64(args + 8 * A.KEY) + block * read_i64(args + 8 * A.KEY_BLOCK) + row * read_i64(args + 8 * A.KEY_TOKEN)
    value = read_i64(args + 8 * A.VALUE) + block * read_i64(args + 8 * A.VALUE_BLOCK)
    return key, value + row * read_i64(args + 8 * A.VALUE_TOKEN), entry


@njit  # type: ignore[untyped-decorator]
def fill_lane_limits(
    args: int, item: int, head: int, rows: int, lanes: int, lanes_per_row: int, period: int, limits: int
) -> tuple[int, int]:
    """Write what each lane may see (see `softmax.make_adjust`); return (highest low, lowest high).

    Lane i is of row `i // lanes_per_row % period`. Per 16 lanes: i32 first visible position, i32 one past the last, f32
    ALiBi slope, i32 query position. Rows beyond `rows` are padding: they see what the last one does, so that they never
    need a mask of their own.
    """
    sequence = read_i32(item + 4 * A.ITEM_SEQUENCE)
    start = read_i64(args + 8 * A.QUERY_START) + 4 * sequence
    length = read_i32(read_i64(args + 8 * A.KV_LENS) + 4 * sequence)
    first = length - (read_i32(start + 4) - read_i32(start)) + read_i32(item + 4 * A.ITEM_QUERY)
    begin = read_i32(item + 4 * A.ITEM_BEGIN)
    end = read_i32(item + 4 * A.ITEM_END)
    left = read_i64(args + 8 * A.LEFT)
    right = read_i64(args + 8 * A.RIGHT)
    group_size = read_i64(args + 8 * A.GROUP_SIZE)
    slopes = read_i64(args + 8 * A.SLOPES)
    group_first = read_i32(item + 4 * A.ITEM_GROUP)
    groups = read_i32(item + 4 * A.ITEM_GROUPS)
    highest_low = begin
    lowest_high = end
    for lane in range(lanes):
        row = min(lane // lanes_per_row % period, rows - 1)
        position = first + row // groups
        low = begin
        high = end
        if left >= 0:
            low = max(low, position - left)
        if right >= 0:
            high = min(high, position + right + 1)
        highest_low = max(highest_low, low)
        lowest_high = min(lowest_high, high)
        at = limits + (lane // 16) * LIMIT_BYTES + 4 * (lane % 16)
        write_i32(at, low)
        write_i32(at + 64, high)
        write_i32(at + 192, position)
        slope = 0.0
        if slopes != 0:
            slope = read_f32(slopes + 4 * (head * group_size + group_first + row % groups))
        write_f32(at + 128, slope)
    return highest_low, lowest_high


__all__ = ["fill_lane_limits", "locate", "region"]
