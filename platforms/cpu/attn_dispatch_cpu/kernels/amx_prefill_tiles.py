"""Tile operations of the AMX prefill: scores and outputs of a panel of 32 query rows, which are the tiles' columns."""

from __future__ import annotations

from typing import Any

from numba import float32, int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels import scratch as S
from attn_dispatch_cpu.kernels.amx import TILE_BYTES, VECTOR, WORDS, TileLayout, Tiles, high_half, low_half
from attn_dispatch_cpu.kernels.amx_tiles import pack_pairs, raise_maximum, splat_f32, weights_of
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.vector import I64, Emit

STRIP = 2 * S.AMX_GROUP  # tokens: as many as a tile has bf16 in a row
WEIGHT_TILES = S.AMX_CHUNK // STRIP
TOTALS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers: 2 x 2 sums of what two tiles are multiplied with


def tile_layout(emulated: bool) -> TileLayout:
    """Every tile is full."""
    return TileLayout(rows=(16,) * 8, row_bytes=(64,) * 8, emulated=emulated)


def make_scores(layout: TileLayout) -> Any:
    """Build (groups, queries, steps, scores, state): K Q^T of one strip and panel, f32[2 row tiles][32 tokens][16].

    `groups` points to (address, bytes between tokens) of the strip's two groups of 16 tokens.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def scores(tc: Any, groups: Any, queries: Any, steps: Any, out: Any, state: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            groups, queries, steps, out, state = args
            tiles = Tiles(e, layout, state)
            keys = [(e.load(e.add(groups, 16 * g), I64), e.load(e.add(groups, 16 * g + 8), I64)) for g in (0, 1)]
            row_tile = e.mul(steps, TILE_BYTES)
            for tile in TOTALS:
                tiles.zero(tile)
            with e.loop(steps) as k:
                at = e.add(queries, e.mul(k, TILE_BYTES))
                for g in (0, 1):
                    tiles.load(LEFT[g], e.add(keys[g][0], e.mul(k, 64)), keys[g][1])
                    tiles.load(RIGHT[g], b.add(at, row_tile) if g else at, 64)
                for g in (0, 1):
                    for r in (0, 1):
                        tiles.multiply_add(TOTALS[2 * g + r], LEFT[g], RIGHT[r])
            for g in (0, 1):
                for r in (0, 1):
                    tiles.store(TOTALS[2 * g + r], e.add(out, r * 2 * TILE_BYTES + g * TILE_BYTES), 64)
            return context.get_dummy_value()

        return void(*[int64] * 5), codegen

    return scores


def make_softmax(isa: Isa) -> Any:
    """Build (scores, state, multiplier, weights, done, acc, columns, token scales) for one strip and 16 rows.

    `weights` is where the strip's bf16 pairs go; `done` tiles of weights before it, and the `columns` / 16 tiles of
    `acc`, 2 KiB apart, are multiplied where a maximum is raised.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def softmax(tc: Any, scores: Any, state: Any, multiplier: Any, weights: Any, done: Any, acc: Any, columns: Any,
                token_scales: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            scores, state, multiplier, weights, done, acc, columns, token_scales = args
            factor = e.splat(multiplier, 16)
            peaks = [e.load(e.add(scores, 64 * t), VECTOR) for t in range(4)]
            for t in range(4, STRIP):
                peaks[t % 4] = e.maximum(e.load(e.add(scores, 64 * t), VECTOR), peaks[t % 4])
            peak = e.maximum(e.maximum(peaks[0], peaks[1]), e.maximum(peaks[2], peaks[3]))
            total_at = e.add(state, 64)
            total = e.local(VECTOR, e.load(total_at, VECTOR))

            def rescale(times: Any) -> None:
                with e.loop(columns) as c, e.loop(e.index(16)) as i:
                    at = e.add(acc, e.add(e.mul(c, 2 * TILE_BYTES), e.mul(i, 64)))
                    e.store(b.fmul(e.load(at, VECTOR), times), at)
                with e.loop(e.mul(done, 16)) as i:
                    at = b.sub(weights, e.mul(e.add(i, 1), 64))
                    pairs = e.load(at, WORDS)
                    half = e.consti(0x8000, 16)
                    halves = [b.add(b.bitcast(b.fmul(f(e, pairs), times), WORDS), half) for f in (low_half, high_half)]
                    e.store(pack_pairs(e, *halves), at)

            shift = raise_maximum(e, state, b.fmul(peak, factor), total, rescale)
            minus_shift = b.fneg(shift)

            def emit(scaled: bool) -> None:
                for first in range(0, STRIP, 4):
                    tokens = range(first, first + 4)
                    rows = [e.load(e.add(scores, 64 * t), VECTOR) for t in tokens]
                    scales = [splat_f32(e, e.add(token_scales, 4 * t)) for t in tokens] if scaled else None
                    logits = [e.fma(row, factor, minus_shift) for row in rows]
                    four = weights_of(e, isa, logits, total, scales)
                    for i in (0, 2):
                        e.store(pack_pairs(e, four[i], four[i + 1]), e.add(weights, 32 * (first + i)))

            with b.if_else(b.icmp_signed("==", token_scales, e.index(0)), likely=True) as (unscaled, scaled):
                with unscaled:
                    emit(False)
                with scaled:
                    emit(True)
            e.store(b.load(total), total_at)
            return context.get_dummy_value()

        return void(int64, int64, float32, int64, int64, int64, int64, int64), codegen

    return softmax


def make_values(layout: TileLayout) -> Any:
    """Build (values, weights, strips, acc, columns, started, state): acc += V^T P of one panel.

    `values` are tiles [column tile][strip], `weights` [row tile][strip], `acc` [column tile][row tile]; `columns` is in
    units of 32. `started` == 0: from nothing.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def product(tc: Any, values: Any, weights: Any, strips: Any, acc: Any, columns: Any, started: Any,
                state: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            values, weights, strips, acc, columns, started, state = args
            tiles = Tiles(e, layout, state)
            begun = b.icmp_signed("!=", started, e.index(0))
            column_step = TILE_BYTES * WEIGHT_TILES
            with e.loop(columns) as c:
                out = e.add(acc, e.mul(c, 4 * TILE_BYTES))
                left = e.add(values, e.mul(c, 2 * column_step))
                with b.if_else(begun) as (then, otherwise):
                    with then:
                        for tile in TOTALS:
                            tiles.load(tile, e.add(out, TILE_BYTES * tile), 64)
                    with otherwise:
                        for tile in TOTALS:
                            tiles.zero(tile)
                with e.loop(strips) as j:
                    at = e.mul(j, TILE_BYTES)
                    for i in (0, 1):
                        tiles.load(LEFT[i], e.add(b.add(left, at), i * column_step), 64)
                        tiles.load(RIGHT[i], e.add(b.add(weights, at), i * column_step), 64)
                    for i in (0, 1):
                        for r in (0, 1):
                            tiles.multiply_add(TOTALS[2 * i + r], LEFT[i], RIGHT[r])
                for tile in TOTALS:
                    tiles.store(tile, e.add(out, TILE_BYTES * tile), 64)
            return context.get_dummy_value()

        return void(*[int64] * 7), codegen

    return product


__all__ = ["STRIP", "WEIGHT_TILES", "make_scores", "make_softmax", "make_values", "tile_layout"]
