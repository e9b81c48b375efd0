"""Tile operations of the AMX decode: scores of 8 query rows, and their outputs as even and odd columns.

Values need no transpose: 16 tokens' rows are taken as pairs of neighbouring columns, and multiplied with weights (p, 0)
for the even and (0, p) for the odd column of each pair, which gives 8 query rows twice.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.amx import TILE_BYTES, VECTOR, TileLayout, Tiles
from attn_dispatch_cpu.kernels.amx_tiles import raise_maximum, weights_of
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.softmax import spread_tokens
from attn_dispatch_cpu.kernels.vector import I32, I64, Emit, Value

ROWS = S.AMX_DECODE_ROWS
GROUP = S.AMX_GROUP
TOKENS = (0,) * ROWS + (1,) * ROWS  # of each lane of a vector of scores: two tokens, 8 rows each
VECTORS = GROUP // 2  # of scores of a group
SCORE_BYTES = 4 * ROWS * GROUP
OUT_COLUMNS = 32  # of one accumulator
OUTS, OPERAND, QUERY, SCORE, WEIGHT = (0, 1, 2, 3), 4, 5, 6, 7  # tile registers


def tile_layout(emulated: bool) -> TileLayout:
    """Full tiles, but for queries (16 pairs x 8 rows) and scores (16 tokens x 8 rows)."""
    return TileLayout(rows=(16,) * 8, row_bytes=(64, 64, 64, 64, 64, 4 * ROWS, 4 * ROWS, 64), emulated=emulated)


def fetch_rows(e: Emit, group: Value, lines: Value) -> None:
    """Ask for `lines` cache lines of each row of a group, given its (address, bytes between rows)."""
    address, pitch = e.load(group, I64), e.load(e.add(group, 8), I64)
    with e.loop(lines) as line:
        for row in range(GROUP):
            e.prefetch(e.add(e.add(address, e.mul(line, 64)), e.mul(pitch, row)), 2)


def make_scores(layout: TileLayout) -> Any:
    """Build (keys, groups, queries, steps, scores, ahead, lines, state): K Q^T, f32[tokens][8].

    `keys` are (address, pitch) of groups, `ahead` those of what is fetched meanwhile, `lines` of each row.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def scores(tc: Any, keys: Any, groups: Any, queries: Any, steps: Any, out: Any, ahead: Any, lines: Any,
               state: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(builder)
            keys, groups, queries, steps, out, ahead, lines, state = args
            tiles = Tiles(e, layout, state)
            with e.loop(groups) as g:
                key = e.add(keys, e.mul(g, 16))
                address, pitch = e.load(key, I64), e.load(e.add(key, 8), I64)
                tiles.zero(SCORE)
                with e.loop(steps) as k:
                    tiles.load(OPERAND, e.add(address, e.mul(k, 64)), pitch)
                    tiles.load(QUERY, e.add(queries, e.mul(k, TILE_BYTES)), 64)
                    tiles.multiply_add(SCORE, OPERAND, QUERY)
                fetch_rows(e, e.add(ahead, e.mul(g, 16)), lines)
                tiles.store(SCORE, e.add(out, e.mul(g, SCORE_BYTES)), 4 * ROWS)
            return context.get_dummy_value()

        return void(*[int64] * 8), codegen

    return scores


def make_softmax(isa: Isa) -> Any:
    """Build (scores, groups, state, multiplier, weights, acc, columns, token scales) for one chunk.

    Weights are a tile for each group: [row] with (p, 0) for each token, and [8 + row] with (0, p).
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def softmax(tc: Any, scores: Any, groups: Any, state: Any, multiplier: Any, weights: Any, acc: Any, columns: Any,
                token_scales: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            scores, groups, state, multiplier, weights, acc, columns, token_scales = args
            factor = e.splat(multiplier, 16)
            peak = e.local(VECTOR, e.const(float("-inf"), 16))
            with e.loop(e.mul(groups, VECTORS)) as i:
                b.store(e.maximum(e.load(e.add(scores, e.mul(i, 64)), VECTOR), b.load(peak)), peak)
            top = b.load(peak)
            top = e.maximum(top, e.shuffle(top, top, [(lane + ROWS) % 16 for lane in range(16)]))
            total_at = e.add(state, 64)
            total = e.local(VECTOR, e.load(total_at, VECTOR))

            def rescale(times: Value) -> None:
                spread = [e.splat(b.extract_element(times, ir.Constant(I32, r)), 16) for r in range(ROWS)]
                with e.loop(columns) as c:
                    for r in range(2 * ROWS):
                        at = e.add(e.add(acc, e.mul(c, TILE_BYTES)), 64 * r)
                        e.store(b.fmul(e.load(at, VECTOR), spread[r % ROWS]), at)

            shift = raise_maximum(e, state, b.fmul(top, factor), total, rescale)
            minus_shift = b.fneg(shift)

            def emit(scaled: bool) -> None:
                with e.loop(groups) as g:
                    at = e.add(scores, e.mul(g, SCORE_BYTES))
                    rows = [e.load(e.add(at, 64 * i), VECTOR) for i in range(VECTORS)]
                    first = e.add(token_scales, e.mul(g, 4 * GROUP))
                    scales = [spread_tokens(e, e.add(first, 8 * i), TOKENS) for i in range(VECTORS)] if scaled else None
                    logits = [e.fma(row, factor, minus_shift) for row in rows]
                    vectors = weights_of(e, isa, logits, total, scales)
                    tile = e.add(weights, e.mul(g, TILE_BYTES))
                    for r, row in enumerate(rows_of_tokens(e, vectors)):
                        e.store(b.lshr(row, e.consti(16, 16)), e.add(tile, 64 * r))
                        e.store(row, e.add(tile, 64 * (ROWS + r)))

            with b.if_else(b.icmp_signed("==", token_scales, e.index(0)), likely=True) as (unscaled, scaled):
                with unscaled:
                    emit(False)
                with scaled:
                    emit(True)
            e.store(b.load(total), total_at)
            return context.get_dummy_value()

        return void(int64, int64, int64, float32, int64, int64, int64, int64), codegen

    return softmax


def rows_of_tokens(e: Emit, vectors: list[Value]) -> list[Value]:
    """Turn 8 vectors of 2 tokens x 8 rows into 8 rows of 16 tokens, in three rounds of shuffles."""
    tokens, rows = 2, ROWS  # of one vector, token by token; from the first round on row by row
    by_row = False
    parts = [[vector] for vector in vectors]  # for each run of tokens, its rows in as many vectors as they take
    while tokens < GROUP:
        merged = []
        for first, second in zip(parts[::2], parts[1::2], strict=True):
            halves = []
            for a, b in zip(first, second, strict=True):
                for half in (0, 1):
                    pattern = []
                    for r in range(half * rows // 2, (half + 1) * rows // 2):
                        lanes = [r * tokens + t if by_row else t * rows + r for t in range(tokens)]
                        pattern += lanes + [16 + lane for lane in lanes]
                    halves.append(e.shuffle(a, b, pattern))
            merged.append(halves)
        parts, tokens, rows, by_row = merged, 2 * tokens, rows // 2, True
    return parts[0]


def make_values(layout: TileLayout) -> Any:
    """Build (values, groups, weights, acc, columns, ahead, lines, state): acc += P V, for `columns` tiles of 32.

    `values` are (address, pitch) of groups, `ahead` those of what is fetched meanwhile, `lines` of each row.
    """

    def product(e: Emit, tiles: Tiles, values: Value, groups: Value, weights: Value, acc: Value, first: Value,
                count: int, fetch: Any) -> None:  # fmt: skip
        for c in range(count):
            tiles.load(OUTS[c], e.add(acc, e.mul(e.add(first, c), TILE_BYTES)), 64)
        with e.loop(groups) as g:
            value = e.add(values, e.mul(g, 16))
            address, pitch = e.load(value, I64), e.load(e.add(value, 8), I64)
            tiles.load(WEIGHT, e.add(weights, e.mul(g, TILE_BYTES)), 64)
            for c in range(count):
                tiles.load(OPERAND, e.add(address, e.mul(e.add(first, c), 64)), pitch)
                tiles.multiply_add(OUTS[c], WEIGHT, OPERAND)
            fetch(g)
        for c in range(count):
            tiles.store(OUTS[c], e.add(acc, e.mul(e.add(first, c), TILE_BYTES)), 64)

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(tc: Any, values: Any, groups: Any, weights: Any, acc: Any, columns: Any, ahead: Any, lines: Any,
                 state: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            values, groups, weights, acc, columns, ahead, lines, state = args
            tiles = Tiles(e, layout, state)
            width = len(OUTS)
            whole = b.udiv(columns, e.index(width))

            def fetch(g: Value, first: Value) -> None:
                once = b.select(b.icmp_signed("==", first, e.index(0)), lines, e.index(0))
                fetch_rows(e, e.add(ahead, e.mul(g, 16)), once)

            with e.loop(whole) as i:
                first = e.mul(i, width)
                product(e, tiles, values, groups, weights, acc, first, width, lambda g: fetch(g, first))
            done = e.mul(whole, width)
            with e.loop(b.sub(columns, done)) as i:
                first = b.add(done, i)
                product(e, tiles, values, groups, weights, acc, first, 1, lambda g: fetch(g, first))
            return context.get_dummy_value()

        return void(*[int64] * 8), codegen

    return multiply


@intrinsic  # type: ignore[untyped-decorator]
def collect_row(tc: Any, acc: Any, row: Any, columns: Any, target: Any) -> Any:
    """Put even and odd columns of an output row back into their order, f32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        acc, row, columns, target = args
        source = e.add(acc, e.mul(row, 64))
        with e.loop(columns) as c:
            at, to = e.add(source, e.mul(c, TILE_BYTES)), e.add(target, e.mul(c, 4 * OUT_COLUMNS))
            even, odd = e.load(at, VECTOR), e.load(e.add(at, 64 * ROWS), VECTOR)
            for half in (0, 1):
                lanes = range(8 * half, 8 * half + 8)
                e.store(e.shuffle(even, odd, [x for lane in lanes for x in (lane, 16 + lane)]), e.add(to, 64 * half))
        return context.get_dummy_value()

    return void(int64, int64, int64, int64), codegen


__all__ = [
    "GROUP",
    "ROWS",
    "TOKENS",
    "VECTORS",
    "collect_row",
    "make_scores",
    "make_softmax",
    "make_values",
    "tile_layout",
]
