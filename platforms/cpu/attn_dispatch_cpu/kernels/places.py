"""Where a work item's keys and values lie, and what each of its query rows may see: shared by both kernels."""

from __future__ import annotations

from numba import njit

from attn_dispatch_cpu.kernels import job as J
from attn_dispatch_cpu.kernels.memory import read_f32, read_i32, read_i64, write_f32


@njit  # type: ignore[untyped-decorator]
def locate(job: int, sequence: int, position: int) -> tuple[int, int, int]:
    """Return the addresses of one token's key and value in kv head 0, and its number among head 0's scales.

    Positions up to the next multiple of the block size follow at the token stride, heads at the head stride.
    """
    table = read_i64(job + 8 * J.TABLE)
    if table == 0:
        row = position + read_i32(read_i64(job + 8 * J.NEW_START) + 4 * sequence)
        block = 0
        entry = 0
    else:
        size = read_i64(job + 8 * J.BLOCK_SIZE)
        index = position // size
        row = position - index * size
        block = read_i32(table + sequence * read_i64(job + 8 * J.TABLE_ROW) + 4 * index)
        entry = block * read_i64(job + 8 * J.KV_HEADS) * size + row
    key = read_i64(job + 8 * J.KEY) + block * read_i64(job + 8 * J.KEY_BLOCK) + row * read_i64(job + 8 * J.KEY_TOKEN)
    value = read_i64(job + 8 * J.VALUE) + block * read_i64(job + 8 * J.VALUE_BLOCK)
    return key, value + row * read_i64(job + 8 * J.VALUE_TOKEN), entry


@njit  # type: ignore[untyped-decorator]
def fill_facts(job: int, tile: int, head: int, rows: int, lanes_per_row: int, facts: int) -> tuple[int, int]:
    """Write each lane's limits, slope and position (see `softmax.adjust`); return (highest low, lowest high).

    Rows beyond `rows` are padding: they see what the others do, so that they never need a mask of their own.
    """
    sequence = read_i32(tile + 4 * J.TILE_SEQUENCE)
    start = read_i64(job + 8 * J.QUERY_START) + 4 * sequence
    length = read_i32(read_i64(job + 8 * J.KV_LENS) + 4 * sequence)
    first = length - (read_i32(start + 4) - read_i32(start)) + read_i32(tile + 4 * J.TILE_QUERY)
    begin = read_i32(tile + 4 * J.TILE_BEGIN)
    end = read_i32(tile + 4 * J.TILE_END)
    left = read_i64(job + 8 * J.LEFT)
    right = read_i64(job + 8 * J.RIGHT)
    group = read_i64(job + 8 * J.GROUP)
    slopes = read_i64(job + 8 * J.SLOPES)
    group_first = read_i32(tile + 4 * J.TILE_GROUP)
    groups = read_i32(tile + 4 * J.TILE_GROUPS)
    highest_low = begin
    lowest_high = end
    padded = (rows * lanes_per_row + 15) // 16 * 16
    for lane in range(padded):
        row = min(lane // lanes_per_row, rows - 1)
        position = first + row // groups
        low = begin
        high = end
        if left >= 0:
            low = max(low, position - left)
        if right >= 0:
            high = min(high, position + right + 1)
        highest_low = max(highest_low, low)
        lowest_high = min(lowest_high, high)
        at = facts + (lane // 16) * (5 * 64) + 4 * (lane % 16)
        write_f32(at, low)
        write_f32(at + 64, high)
        write_f32(at + 192, position)
        write_f32(at + 256, lane % lanes_per_row)
        slope = 0.0
        if slopes != 0:
            slope = read_f32(slopes + 4 * (head * group + group_first + row % groups))
        write_f32(at + 128, slope)
    return highest_low, lowest_high


__all__ = ["fill_facts", "locate"]
