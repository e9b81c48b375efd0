"""Register tiles for few query rows (decode): 4 rows x 4 tokens of scores, 4 rows x 64 columns of output.

Scores of a tile lie as 16 floats, `[row][token]`.

On a CPU with the bf16 dot product two neighbouring elements of a row go through one lane: keys are used as they lie;
of values, two tokens' rows are interleaved on the way (an output unit is then 32 columns in the order that the
interleaving gives, which `collect_row` undoes). Elsewhere both are widened to f32 once and used by all rows.

Measured on Zen 4, D = 128, in cycles per token and kv head, where the products alone take 16 + 16: scores 18.3 (the sum
over lanes hides behind the products; spreading 128 bits of a key over four rows instead needs no such sum, but its
loads take 22.8), values 17.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.elements import load_widened
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES
from attn_dispatch_cpu.kernels.scratch import DECODE_ROWS as ROWS
from attn_dispatch_cpu.kernels.scratch import DECODE_TOKENS as TOKENS
from attn_dispatch_cpu.kernels.vector import F32, I16, I32, I64, Emit, Value, vec

LANES = ROWS * TOKENS
LATER = 3  # of every 4 lines to fetch, the one that softmax asks for: memory is not to rest while it computes
UNITS = 4  # f32 units, or pairs of them, that one pass over the values accumulates: 64 columns at 16 lanes


@dataclass(frozen=True)
class DecodeTiles:
    """The micro-kernels of one kind of cache, as Numba intrinsics, and the layout that they share.

    Attributes:
        scores: (q, q_row_bytes, key, token_bytes, D, out, ahead).
        values: (acc, weights, token addresses, tiles, Dv, factors, addresses of tiles to fetch).
        column_unit: columns of one unit of the output accumulator.
        head_unit: elements of q and of a key taken per step; q rows are zero-padded to a multiple.
    """

    scores: Any
    values: Any
    column_unit: int
    head_unit: int


def make_decode_tiles(isa: Isa, kind: int, dot: bool, locality: int = 2) -> DecodeTiles:
    """Build the micro-kernels for a cache of `kind`; `dot`: queries and cache are bf16 and the CPU multiplies them."""
    column_unit = 2 * isa.lanes if dot else isa.lanes
    head_unit = 2 * isa.lanes if dot else isa.lanes
    scores = _scores(isa, kind, dot, head_unit, locality)
    return DecodeTiles(scores, _values(isa, kind, dot, column_unit, locality), column_unit, head_unit)


def _scores(isa: Isa, kind: int, dot: bool, head_unit: int, locality: int) -> Any:
    """4 tokens x 4 rows; q is laid out `[row][D]`."""
    lanes = isa.lanes
    item, q_item = ITEM_BYTES[kind], 2 if dot else 4
    accumulator, pairs = vec(F32, lanes), vec(I16, 2 * lanes)

    def step(e: Emit, sums: list[list[Value]], queries: list[Value], keys: list[Value], offset: Value, q_offset: Value,
             mask: Value | None) -> None:  # fmt: skip
        """Multiply one head_size unit of 4 tokens with that of some rows."""
        columns = []
        for key in keys:
            at = e.add(key, offset)
            if dot:
                columns.append(e.load(at, pairs) if mask is None else e.load_masked(at, pairs, mask))
            else:
                columns.append(load_widened(e, kind, at, lanes, mask))
        for r, query in enumerate(queries):
            row = e.load(e.add(query, q_offset), pairs if dot else accumulator)
            for t, column in enumerate(columns):
                old = e.b.load(sums[r][t])
                e.b.store(e.dot_bf16(old, column, row) if dot else e.fma(column, row, old), sums[r][t])

    @intrinsic  # type: ignore[untyped-decorator]
    def scores(tc: Any, q: Any, q_row: Any, key: Any, token: Any, head_size: Any, out: Any, ahead: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            q, q_row, key, token, head_size, out, ahead = args
            whole, rest = b.udiv(head_size, e.index(head_unit)), b.urem(head_size, e.index(head_unit))
            keys = [e.add(key, e.mul(token, t)) for t in range(TOKENS)]
            for first in range(0, ROWS, isa.rows_per_pass):
                queries = [e.add(q, e.mul(q_row, first + r)) for r in range(isa.rows_per_pass)]
                sums = [[e.local(accumulator, e.const(0.0, lanes)) for _ in range(TOKENS)] for _ in queries]
                with e.loop(whole) as i:
                    step(e, sums, queries, keys, e.mul(i, head_unit * item), e.mul(i, head_unit * q_item), None)
                    if first == 0:
                        # The tile's rows lie side by side: line after line, whatever row it belongs to.
                        start = e.add(ahead, e.mul(i, TOKENS * head_unit * item))
                        for line in range(TOKENS * head_unit * item // 64):
                            if line % 4 != LATER:
                                e.prefetch(e.add(start, 64 * line), locality)
                with b.if_then(b.icmp_signed(">", rest, e.index(0)), likely=False):
                    mask = e.lanes_below(rest, head_unit)
                    step(e, sums, queries, keys, e.mul(whole, head_unit * item), e.mul(whole, head_unit * q_item), mask)
                totals = reduce_tile(e, [[b.load(s) for s in row] for row in sums])
                for n, total in enumerate(totals):
                    e.store(total, e.add(out, first * TOKENS * 4 + n * total.type.count * 4))
            return context.get_dummy_value()

        return void(int64, int64, int64, int64, int64, int64, int64), codegen

    return scores


def sum_quads(e: Emit, four: list[Value]) -> Value:
    """Sum every 4 lanes of 4 vectors: lanes 4r..4r+3 of the result are the sums of quad r of each."""
    lanes = four[0].type.count

    def halves(a: Value, b: Value, low: tuple[int, ...], high: tuple[int, ...]) -> Value:
        def within(pattern: tuple[int, ...]) -> list[int]:
            return [q + (p if p < 4 else p - 4 + lanes) for q in range(0, lanes, 4) for p in pattern]

        return e.b.fadd(e.shuffle(a, b, within(low)), e.shuffle(a, b, within(high)))

    pairs = [halves(four[t], four[t + 1], (0, 4, 1, 5), (2, 6, 3, 7)) for t in (0, 2)]
    return halves(pairs[0], pairs[1], (0, 1, 4, 5), (2, 3, 6, 7))


def reduce_tile(e: Emit, sums: list[list[Value]]) -> list[Value]:
    """Sum each accumulator over its lanes: [row][4 tokens] of vectors to vectors of `[row][token]` floats.

    Every step adds two half-full vectors made by one shuffle each, so that n accumulators cost about 3n instructions.
    """
    lanes = sums[0][0].type.count
    rows = [sum_quads(e, row) for row in sums]
    # Each row's vector now holds [4 tokens] once per 128 bits; add those up, several rows side by side.
    parts = lanes // 4
    while parts > 1:
        half = parts // 2
        groups = lanes // (4 * parts)  # rows that a vector holds already
        low, high = [], []
        for source in (0, lanes):
            for g in range(groups):
                base = source + g * 4 * parts
                low += [base + i for i in range(4 * half)]
                high += [base + 4 * half + i for i in range(4 * half)]
        rows = [
            e.b.fadd(e.shuffle(rows[i], rows[i + 1], low), e.shuffle(rows[i], rows[i + 1], high))
            for i in range(0, len(rows), 2)
        ]
        parts = half
    return rows


def _values(isa: Isa, kind: int, dot: bool, column_unit: int, locality: int) -> Any:
    item = ITEM_BYTES[kind]
    lanes = isa.lanes
    vectors = 2 if dot else 1  # accumulator vectors per unit and row
    units = UNITS // vectors
    unit_bytes = ROWS * column_unit * 4
    weight_bytes = LANES * (2 if dot else 4)
    accumulator = vec(F32, lanes)

    def multiply(e: Emit, rows: range, count: int, sums: dict[Any, Value], at: list[Value], weights: Value,
                 mask: Value | None) -> None:  # fmt: skip
        """Add 4 tokens' value columns, weighted, to `count` units of some rows."""
        b = e.b
        for t in range(0, TOKENS, vectors):
            columns: list[Value] = []
            for u in range(count):
                offset = u * column_unit * item
                if dot:
                    ty = vec(I16, 2 * lanes)
                    pair = [
                        e.load(e.add(at[t + i], offset), ty)
                        if mask is None
                        else e.load_masked(e.add(at[t + i], offset), ty, mask)
                        for i in (0, 1)
                    ]
                    for start in (0, 4):
                        pattern = [
                            x
                            for q in range(0, 2 * lanes, 8)
                            for i in range(4)
                            for x in (q + start + i, 2 * lanes + q + start + i)
                        ]
                        columns.append(e.shuffle(pair[0], pair[1], pattern))
                else:
                    columns.append(load_widened(e, kind, e.add(at[t], offset), lanes, mask))
            for r in rows:
                if dot:
                    bits = e.load(e.add(weights, (r * TOKENS + t) * 2), I32)
                    weight = b.bitcast(e.splat(bits, lanes), vec(I16, 2 * lanes))
                else:
                    weight = e.splat(e.load(e.add(weights, (r * TOKENS + t) * 4), F32), lanes)
                for c, column in enumerate(columns):
                    slot = sums[r, c]
                    old = b.load(slot)
                    b.store(e.dot_bf16(old, column, weight) if dot else e.fma(column, weight, old), slot)

    def group(e: Emit, rows: range, count: int, acc: Value, weights: Value, table: Value, tiles: Value, offset: Value,
              factors: Value, ahead: Value, mask: Value | None, fetch: bool) -> None:  # fmt: skip
        """Run over all tokens for `count` units of columns that begin `offset` bytes into a row."""
        b = e.b
        sums = {}
        accumulators = {
            (r, c): e.add(acc, (c // vectors) * unit_bytes + (r * column_unit + (c % vectors) * lanes) * 4)
            for r in rows
            for c in range(count * vectors)
        }
        for r in rows:
            factor = e.splat(e.load(e.add(factors, r * TOKENS * 4), F32), lanes)
            for c in range(count * vectors):
                sums[r, c] = e.local(accumulator, b.fmul(e.load(accumulators[r, c], accumulator), factor))
        with e.loop(tiles) as i:
            entry = e.add(table, e.mul(i, 8 * TOKENS))
            at = [e.add(e.load(e.add(entry, 8 * t), I64), offset) for t in range(TOKENS)]
            multiply(e, rows, count, sums, at, e.add(weights, e.mul(i, weight_bytes)), mask)
            if fetch:
                next_tile = e.add(e.load(e.add(ahead, e.mul(i, 8)), I64), e.mul(offset, TOKENS))
                for line in range(TOKENS * count * column_unit * item // 64):
                    if line % 4 != LATER:
                        e.prefetch(e.add(next_tile, 64 * line), locality)
        for key, slot in sums.items():
            e.store(b.load(slot), accumulators[key])

    @intrinsic  # type: ignore[untyped-decorator]
    def values(
        tc: Any, acc: Any, weights: Any, table: Any, tiles: Any, value_head_size: Any, factors: Any, ahead: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            acc, weights, table, tiles, value_head_size, factors, ahead = args
            group_columns = units * column_unit
            groups = b.udiv(value_head_size, e.index(group_columns))
            for first in range(0, ROWS, isa.rows_per_pass):
                rows = range(first, first + isa.rows_per_pass)
                with e.loop(groups) as g:
                    group(e, rows, units, e.add(acc, e.mul(g, units * unit_bytes)), weights, table, tiles,
                          e.mul(g, group_columns * item), factors, ahead, None, first == 0)  # fmt: skip
                # What is left, one unit at a time; the last may be partly outside the row.
                done = e.mul(groups, group_columns)
                left = b.udiv(e.add(b.sub(value_head_size, done), column_unit - 1), e.index(column_unit))
                with e.loop(left) as u:
                    column = e.add(done, e.mul(u, column_unit))
                    mask = e.lanes_below(b.sub(value_head_size, column), column_unit)
                    unit = b.udiv(column, e.index(column_unit))
                    group(e, rows, 1, e.add(acc, e.mul(unit, unit_bytes)), weights, table, tiles,
                          e.mul(column, item), factors, ahead, mask, first == 0)  # fmt: skip
            return context.get_dummy_value()

        return void(int64, int64, int64, int64, int64, int64, int64), codegen

    return values


__all__ = ["LANES", "ROWS", "TOKENS", "DecodeTiles", "make_decode_tiles"]
