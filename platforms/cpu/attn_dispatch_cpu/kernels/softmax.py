"""Softmax over tiles of scores: 16 lanes at a time, online over chunks of the context.

Every kernel keeps its state per lane. In decode tiles a lane is (row, one of 4 tokens) and the row's maximum is shared
by its 4 lanes; in prefill tiles a lane is a row. Scores arrive raw (q . k); `multiplier` takes them to powers of two.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.vector import F32, I32, I64, LOG2E, Emit, Value, vec

L = 16
ROW = vec(F32, L)


def make_adjust(tokens: tuple[int, ...]) -> Any:
    """Build what is not a plain factor, applied in place: scores become base-2 logits, masked ones -inf.

    Arguments of the intrinsic:
        scores: f32[vectors][16], one every `vector_bytes`.
        limits: of the 16 lanes, see `addressing.fill_lane_limits`. Positions are integers: f32 has none beyond 2^24.
        position: of the first vector's first token.
        token_scales: f32 per token, or 0.
        flags: 1 soft-cap, 2 ALiBi.

    Args:
        tokens: of each lane, counted in its vector.
    """
    step = max(tokens) + 1

    @intrinsic  # type: ignore[untyped-decorator]
    def adjust(tc: Any, scores: Any, vectors: Any, vector_bytes: Any, limits: Any, position: Any, token_scales: Any,
               flags: Any, scale: Any, cap: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            scores, vectors, vector_bytes, limits, position, token_scales, flags, scale, cap = args
            whole = vec(I32, L)
            low, high, query = (e.load(e.add(limits, 64 * i), whole) for i in (0, 1, 3))
            slope = e.load(e.add(limits, 128), ROW)
            offset = ir.Constant(whole, list(tokens))
            minus_inf = e.const(float("-inf"), L)
            scale = e.splat(scale, L)
            has_cap = b.icmp_signed("!=", b.and_(flags, e.index(1)), e.index(0))
            has_alibi = b.icmp_signed("!=", b.and_(flags, e.index(2)), e.index(0))
            has_scales = b.icmp_signed("!=", token_scales, e.index(0))
            with e.loop(vectors) as i:
                at = e.add(scores, b.mul(i, vector_bytes))
                first = e.mul(i, step)
                where = b.add(e.splat(b.trunc(b.add(position, first), I32), L), offset)
                x = e.local(ROW, b.fmul(e.load(at, ROW), scale))
                with b.if_then(has_scales):
                    scales = spread_tokens(e, e.add(token_scales, e.mul(first, 4)), tokens)
                    b.store(b.fmul(b.load(x), scales), x)
                with b.if_then(has_cap):
                    b.store(b.fmul(e.splat(cap, L), _tanh(e, b.fdiv(b.load(x), e.splat(cap, L)))), x)
                with b.if_then(has_alibi):
                    away = b.sitofp(b.sub(query, where), ROW)
                    away = e.maximum(away, b.fneg(away))
                    b.store(b.fsub(b.load(x), b.fmul(slope, away)), x)
                seen = b.and_(b.icmp_signed(">=", where, low), b.icmp_signed("<", where, high))
                logits = b.fmul(b.load(x), e.const(LOG2E, L))
                e.store(b.select(seen, logits, minus_inf), at)
            return context.get_dummy_value()

        return void(int64, int64, int64, int64, int64, int64, int64, float32, float32), codegen

    return adjust


def spread_tokens(e: Emit, address: Value, tokens: tuple[int, ...]) -> Value:
    """Read an f32 for each token, and spread them over the lanes."""
    step = max(tokens) + 1
    values = e.load(address, vec(F32, step))
    return e.shuffle(values, values, list(tokens))


def _tanh(e: Emit, x: Value) -> Value:
    """tanh, 2e-7 absolute and 1e-6 relative: an odd series near 0, where the quotient of exponentials cancels."""
    b, lanes = e.b, x.type.count
    size = e.maximum(x, b.fneg(x))
    power = e.exp2(b.fmul(size, e.const(-2.0 * LOG2E, lanes)))
    large = b.fdiv(b.fsub(e.const(1.0, lanes), power), b.fadd(e.const(1.0, lanes), power))
    square = b.fmul(size, size)
    series = e.const(62.0 / 2835.0, lanes)
    for coefficient in (-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0):
        series = e.fma(series, square, e.const(coefficient, lanes))
    small = b.fmul(series, size)
    result = b.select(b.fcmp_ordered("<", size, e.const(0.25, lanes)), small, large)
    sign = b.and_(b.bitcast(x, vec(I32, lanes)), e.consti(-(2**31), lanes))
    return b.bitcast(b.or_(b.bitcast(result, vec(I32, lanes)), sign), vec(F32, lanes))


def rescale(e: Emit, state: Value, peak: Value) -> tuple[Value, Value]:
    """Raise the maximum of `state` (f32[16] maximum, f32[16] sum) to `peak`; return (shift, factor on old sums).

    A lane that has seen nothing yet keeps -inf; its shift is then 0, so that exp2(-inf - shift) is 0 and never NaN.
    """
    b = e.b
    old = e.load(state, ROW)
    peak = e.maximum(peak, old)
    e.store(peak, state)
    empty = b.fcmp_ordered("==", peak, e.const(float("-inf"), L))
    shift = b.select(empty, e.const(0.0, L), peak)
    return shift, e.exp2(b.fsub(old, shift))


def make_decode_softmax(dot: bool) -> Any:
    """Build the intrinsic of decode tiles; weights are bf16 if `dot`, else f32.

    Its last four args are tables of the key and value tiles to fetch, and how many lines each has: of every four
    lines the products leave one to this, so that memory does not rest meanwhile.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def softmax(
        tc: Any,
        scores: Any,
        tiles: Any,
        weights: Any,
        state: Any,
        factors: Any,
        token_scales: Any,
        multiplier: Any,
        key_ahead: Any,
        value_ahead: Any,
        key_lines: Any,
        value_lines: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            scores, tiles, weights, state, factors, token_scales, multiplier = args[:7]
            tables, key_lines, value_lines = args[7:9], args[9], args[10]
            peak = e.local(ROW, e.const(float("-inf"), L))
            with e.loop(tiles) as i:
                b.store(e.maximum(e.load(e.add(scores, e.mul(i, 64)), ROW), b.load(peak)), peak)
            top = b.load(peak)
            for swap in ([1, 0, 3, 2], [2, 3, 0, 1]):
                top = e.maximum(top, e.shuffle(top, top, [q + s for q in range(0, L, 4) for s in swap]))
            factor = e.splat(multiplier, L)
            shift, correction = rescale(e, state, b.fmul(top, factor))
            e.store(correction, factors)
            total_at = e.add(state, 64)
            total = e.local(ROW, b.fmul(e.load(total_at, ROW), correction))
            minus_shift = b.fneg(shift)
            scaled = b.icmp_signed("!=", token_scales, e.index(0))
            with e.loop(tiles) as i:
                weight = e.exp2(e.fma(e.load(e.add(scores, e.mul(i, 64)), ROW), factor, minus_shift))
                b.store(b.fadd(b.load(total), weight), total)
                for table, lines in zip(tables, (key_lines, value_lines), strict=True):
                    tile = e.load(e.add(table, e.mul(i, 8)), I64)
                    with e.loop(b.lshr(lines, e.index(2))) as line:
                        e.prefetch(e.add(tile, e.add(e.mul(line, 256), 192)), 2)
                if dot:
                    e.store(e.round_bf16_fast(weight), e.add(weights, e.mul(i, 32)))
                else:
                    scaled_weight = e.local(ROW, weight)
                    with b.if_then(scaled):
                        times = spread_tokens(e, e.add(token_scales, e.mul(i, 16)), (0, 1, 2, 3) * 4)
                        b.store(b.fmul(weight, times), scaled_weight)
                    e.store(b.load(scaled_weight), e.add(weights, e.mul(i, 64)))
            e.store(b.load(total), total_at)
            return context.get_dummy_value()

        return void(int64, int64, int64, int64, int64, int64, float32, int64, int64, int64, int64), codegen

    return softmax


__all__ = ["ROW", "L", "make_adjust", "make_decode_softmax", "rescale", "spread_tokens"]
