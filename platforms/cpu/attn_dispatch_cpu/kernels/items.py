"""What the attention kernels share: reading their arguments and items, a row's begin, and its end."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import njit

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.memory import read_f32, read_f64, read_i32, read_i64, write_f32
from attn_dispatch_cpu.kernels.rows import make_store_row
from attn_dispatch_cpu.kernels.vector import LOG2E

LN2 = math.log(2.0)
NEG_INF = -math.inf


class Layer(NamedTuple):
    """What all items of a call share: see `arguments`."""

    items: int
    group_size: int
    kv_heads: int
    head_size: int
    value_head_size: int
    key_token: int
    key_head: int
    value_token: int
    value_head: int
    in_blocks: bool
    block_size: int
    key_scales: int
    value_scales: int
    flags: int
    scale: float
    cap: float


class Item(NamedTuple):
    """One piece of work: query rows of one sequence, kv heads, a range of the context."""

    address: int
    sequence: int
    begin: int
    end: int
    part: int
    head: int
    heads: int
    group_first: int
    groups: int
    token: int
    rows: int


@njit  # type: ignore[untyped-decorator]
def read_layer(args: int) -> Layer:
    """Return what all items of a call share."""
    return Layer(
        read_i64(args + 8 * A.NUM_ITEMS),
        read_i64(args + 8 * A.GROUP_SIZE),
        read_i64(args + 8 * A.KV_HEADS),
        read_i64(args + 8 * A.HEAD_SIZE),
        read_i64(args + 8 * A.VALUE_HEAD_SIZE),
        read_i64(args + 8 * A.KEY_TOKEN),
        read_i64(args + 8 * A.KEY_HEAD),
        read_i64(args + 8 * A.VALUE_TOKEN),
        read_i64(args + 8 * A.VALUE_HEAD),
        read_i64(args + 8 * A.TABLE) != 0,
        read_i64(args + 8 * A.BLOCK_SIZE),
        read_i64(args + 8 * A.KEY_SCALES),
        read_i64(args + 8 * A.VALUE_SCALES),
        read_i64(args + 8 * A.FLAGS),
        read_f64(args + 8 * A.SCALE),
        read_f64(args + 8 * A.SOFT_CAP),
    )


@njit  # type: ignore[untyped-decorator]
def read_item(args: int, number: int) -> Item:
    """Return an item of the call."""
    at = read_i64(args + 8 * A.ITEM_TABLE) + number * (4 * A.ITEM_WORDS)
    sequence = read_i32(at + 4 * A.ITEM_SEQUENCE)
    groups = read_i32(at + 4 * A.ITEM_GROUPS)
    return Item(
        at,
        sequence,
        read_i32(at + 4 * A.ITEM_BEGIN),
        read_i32(at + 4 * A.ITEM_END),
        read_i32(at + 4 * A.ITEM_PART),
        read_i32(at + 4 * A.ITEM_HEAD),
        read_i32(at + 4 * A.ITEM_HEADS),
        read_i32(at + 4 * A.ITEM_GROUP),
        groups,
        read_i32(read_i64(args + 8 * A.QUERY_START) + 4 * sequence) + read_i32(at + 4 * A.ITEM_QUERY),
        read_i32(at + 4 * A.ITEM_QUERIES) * groups,
    )


@njit  # type: ignore[untyped-decorator]
def query_head(args: int, item: Item, head: int, row: int) -> int:
    """Return which query head a row is of."""
    return head * read_i64(args + 8 * A.GROUP_SIZE) + item.group_first + row % item.groups  # type: ignore[no-any-return]


@njit  # type: ignore[untyped-decorator]
def query_address(args: int, item: Item, head: int, row: int) -> int:
    """Return where a row's query is."""
    token = item.token + row // item.groups
    at = read_i64(args + 8 * A.Q) + token * read_i64(args + 8 * A.Q_TOKEN)
    return at + query_head(args, item, head, row) * read_i64(args + 8 * A.Q_HEAD)  # type: ignore[no-any-return]


@njit  # type: ignore[untyped-decorator]
def first_logit(args: int, item: Item, head: int, row: int) -> float:
    """Return the maximum that a row begins with, in powers of two: its sink, or -inf (no weight yet)."""
    sinks = read_i64(args + 8 * A.SINKS)
    if sinks == 0 or row >= item.rows or read_i32(item.address + 4 * A.ITEM_SINK) == 0:
        return NEG_INF
    return read_f32(sinks + 4 * query_head(args, item, head, row)) * LOG2E  # type: ignore[no-any-return]


def make_finish_row(isa: Isa) -> Any:
    """Build what stores a finished row.

    Its output is divided by the sum of the weights, and becomes a row of the result, or a partial one where the item is
    a part of a context; so does the LSE.
    """
    store_row = make_store_row(isa)

    @njit  # type: ignore[untyped-decorator]
    def finish_row(args: int, item: Item, head: int, row: int, source: int, maximum: float, total: float) -> None:
        value_head_size = read_i64(args + 8 * A.VALUE_HEAD_SIZE)
        kv_heads = read_i64(args + 8 * A.KV_HEADS)
        lse = NEG_INF
        factor = 0.0
        if total != 0.0:
            factor = read_f64(args + 8 * A.OUT_FACTOR) / total
            lse = (maximum + math.log2(total)) * LN2
        if item.part < 0:
            token = item.token + row // item.groups
            query = query_head(args, item, head, row)
            out = read_i64(args + 8 * A.OUT) + token * read_i64(args + 8 * A.OUT_TOKEN)
            store_row(source, factor, read_i64(args + 8 * A.OUT_KIND), value_head_size,
                      out + query * read_i64(args + 8 * A.OUT_HEAD))  # fmt: skip
            lses = read_i64(args + 8 * A.LSE)
            if lses != 0:
                write_f32(lses + 4 * (token * kv_heads * read_i64(args + 8 * A.GROUP_SIZE) + query), lse)
        else:
            entry = (item.part * kv_heads + head) * read_i64(args + 8 * A.PARTIAL_ROWS) + row
            store_row(source, factor, 0, value_head_size,
                      read_i64(args + 8 * A.PARTIAL_OUT) + entry * 4 * value_head_size)  # fmt: skip
            write_f32(read_i64(args + 8 * A.PARTIAL_LSE) + 4 * entry, lse)

    return finish_row


__all__ = ["NEG_INF", "Item", "Layer", "first_logit", "make_finish_row", "query_address", "read_item", "read_layer"]
