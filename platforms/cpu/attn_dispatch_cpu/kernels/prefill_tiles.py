"""Register tiles for many query rows (prefill): a lane is a query row.

Both products have one shape, `out[m][row] += sum over k of a[m][k] * b[k][row]`: an element of `a` is spread over
the lanes and multiplied with vectors of rows. For scores m is a token, k the head size; for values m is a column, k a
token. On a CPU with the bf16 dot product one k is a pair of bf16; elsewhere one f32. No sum over lanes, and softmax
runs per lane.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.elements import load_widened
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES
from attn_dispatch_cpu.kernels.scratch import PREFILL_ROWS as ROWS
from attn_dispatch_cpu.kernels.softmax import ROW, L, rescale
from attn_dispatch_cpu.kernels.vector import F32, I16, I32, Emit, Value, vec


def make_product(isa: Isa, dot: bool) -> Any:
    """Build (a, a_m, a_k, right, steps, out, m, rows, factors): strides of `a` in bytes, 64 rows in `right` and `out`.

    `m` outputs of `rows` rows each are made from `steps` steps. `factors` (f32[64]) continues from what is in `out`,
    times a factor per row; 0 starts from nothing.
    """
    lanes = isa.lanes
    accumulator = vec(F32, lanes)
    element = I32 if dot else F32

    def tile(e: Emit, a: Value, a_m: Value, a_k: Value, right: Value, steps: Value, out: Value, count: int,
             vectors: int, factors: Value) -> None:  # fmt: skip
        b = e.b
        sums = [[e.local(accumulator, e.const(0.0, lanes)) for _ in range(vectors)] for _ in range(count)]
        starts = [e.add(a, e.mul(a_m, i)) for i in range(count)]
        with e.loop(steps) as k:
            at = e.add(right, e.mul(k, 4 * ROWS))
            rows = [e.load(e.add(at, 4 * lanes * v), accumulator) for v in range(vectors)]
            offset = b.mul(k, a_k)
            for i in range(count):
                spread = e.splat(e.load(e.add(starts[i], offset), element), lanes)
                for v in range(vectors):
                    old = b.load(sums[i][v])
                    if dot:
                        pairs = vec(I16, 2 * lanes)
                        new = e.dot_bf16(old, b.bitcast(spread, pairs), b.bitcast(rows[v], pairs))
                    else:
                        new = e.fma(spread, rows[v], old)
                    b.store(new, sums[i][v])
        # What was there before is added last, so that no sum runs over more than the steps of one call.
        with b.if_then(b.icmp_signed("!=", factors, e.index(0))):
            for v in range(vectors):
                factor = e.load(e.add(factors, 4 * lanes * v), accumulator)
                for i in range(count):
                    before = e.load(e.add(out, 4 * ROWS * i + 4 * lanes * v), accumulator)
                    b.store(e.fma(before, factor, b.load(sums[i][v])), sums[i][v])
        for i in range(count):
            for v in range(vectors):
                e.store(b.load(sums[i][v]), e.add(out, 4 * ROWS * i + 4 * lanes * v))

    @intrinsic  # type: ignore[untyped-decorator]
    def product(tc: Any, a: Any, a_m: Any, a_k: Any, right: Any, steps: Any, out: Any, m: Any, rows: Any,
                factors: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            a, a_m, a_k, right, steps, out, m, rows, factors = args

            def columns(vectors: int, first_row: Value) -> None:
                """All m outputs for `vectors` vectors of rows."""
                shift = e.mul(first_row, 4)
                right_at, out_at = e.add(right, shift), e.add(out, shift)
                none = b.icmp_signed("==", factors, e.index(0))
                factors_at = b.select(none, factors, e.add(factors, shift))
                whole = b.udiv(m, e.index(isa.tile_tokens))
                with e.loop(whole) as i:
                    at = e.mul(i, isa.tile_tokens)
                    tile(e, e.add(a, b.mul(at, a_m)), a_m, a_k, right_at, steps, e.add(out_at, e.mul(at, 4 * ROWS)),
                         isa.tile_tokens, vectors, factors_at)  # fmt: skip
                done = e.mul(whole, isa.tile_tokens)
                with e.loop(b.sub(m, done)) as i:
                    at = b.add(done, i)
                    tile(e, e.add(a, b.mul(at, a_m)), a_m, a_k, right_at, steps, e.add(out_at, e.mul(at, 4 * ROWS)),
                         1, vectors, factors_at)  # fmt: skip

            step = isa.tile_vectors * lanes
            whole_rows = b.udiv(rows, e.index(step))
            with e.loop(whole_rows) as w:
                columns(isa.tile_vectors, e.mul(w, step))
            done_rows = e.mul(whole_rows, step)
            left = b.udiv(e.add(b.sub(rows, done_rows), lanes - 1), e.index(lanes))
            with e.loop(left) as w:
                columns(1, e.add(done_rows, e.mul(w, lanes)))
            return context.get_dummy_value()

        return void(*[int64] * 9), codegen

    return product


@intrinsic  # type: ignore[untyped-decorator]
def interleave_rows(tc: Any, first: Any, second: Any, count: Any, target: Any) -> Any:
    """Write 16-bit elements of two rows in turn: target[2 i] = first[i], target[2 i + 1] = second[i]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        first, second, count, target = args
        ty = vec(I16, 16)
        pattern = [x for i in range(16) for x in (i, 16 + i)]

        def piece(at: Value, mask: Value | None) -> None:
            rows = [e.add(row, e.mul(at, 2)) for row in (first, second)]
            pair = [e.load(r, ty) if mask is None else e.load_masked(r, ty, mask) for r in rows]
            e.store(e.shuffle(pair[0], pair[1], pattern), e.add(target, e.mul(at, 4)))

        whole = b.udiv(count, e.index(16))
        with e.loop(whole) as i:
            piece(e.mul(i, 16), None)
        rest = b.urem(count, e.index(16))
        with b.if_then(b.icmp_signed(">", rest, e.index(0))):
            piece(e.mul(whole, 16), e.lanes_below(rest, 16))
        return context.get_dummy_value()

    return void(int64, int64, int64, int64), codegen


def make_widen_row(isa: Isa, kind: int) -> Any:
    """Build (source, count, target): a cache row to f32, whole vectors (zeros beyond `count`)."""
    lanes = isa.lanes

    @intrinsic  # type: ignore[untyped-decorator]
    def widen_row(tc: Any, source: Any, count: Any, target: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            source, count, target = args
            whole = b.udiv(count, e.index(lanes))
            with e.loop(whole) as i:
                at = e.add(source, e.mul(i, lanes * ITEM_BYTES[kind]))
                e.store(load_widened(e, kind, at, lanes), e.add(target, e.mul(i, 4 * lanes)))
            rest = b.urem(count, e.index(lanes))
            with b.if_then(b.icmp_signed(">", rest, e.index(0))):
                at = e.add(source, e.mul(whole, lanes * ITEM_BYTES[kind]))
                widened = load_widened(e, kind, at, lanes, e.lanes_below(rest, lanes))
                e.store(widened, e.add(target, e.mul(whole, 4 * lanes)))
            return context.get_dummy_value()

        return void(int64, int64, int64), codegen

    return widen_row


def make_prefill_softmax(dot: bool) -> Any:
    """Build (scores, tokens, weights, state, factors, token_scales, multiplier) for one vector of 16 rows.

    Scores and weights are `[token][64 rows]`; with the dot product weights are `[token / 2][64 rows][2]` bf16, and the
    caller has made the number of tokens even (a masked token's weight is 0).
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def softmax(tc: Any, scores: Any, tokens: Any, weights: Any, state: Any, factors: Any, token_scales: Any,
                multiplier: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            scores, tokens, weights, state, factors, token_scales, multiplier = args
            peak = e.local(ROW, e.const(float("-inf"), L))
            with e.loop(tokens) as i:
                b.store(e.maximum(e.load(e.add(scores, e.mul(i, 4 * ROWS)), ROW), b.load(peak)), peak)
            factor = e.splat(multiplier, L)
            shift, correction = rescale(e, state, b.fmul(b.load(peak), factor))
            e.store(correction, factors)
            total_at = e.add(state, 64)
            total = e.local(ROW, b.fmul(e.load(total_at, ROW), correction))
            minus_shift = b.fneg(shift)
            scaled = b.icmp_signed("!=", token_scales, e.index(0))

            def weight_of(i: Value) -> Value:
                weight = e.exp2(e.fma(e.load(e.add(scores, e.mul(i, 4 * ROWS)), ROW), factor, minus_shift))
                b.store(b.fadd(b.load(total), weight), total)
                return weight

            if dot:
                with e.loop(b.udiv(tokens, e.index(2))) as i:
                    pair = [e.round_bf16_fast(weight_of(e.add(e.mul(i, 2), j))) for j in (0, 1)]
                    mixed = e.shuffle(pair[0], pair[1], [x for lane in range(L) for x in (lane, L + lane)])
                    e.store(mixed, e.add(weights, e.mul(i, 4 * ROWS)))
            else:
                with e.loop(tokens) as i:
                    weight = e.local(ROW, weight_of(i))
                    with b.if_then(scaled):
                        times = e.splat(e.load(e.add(token_scales, e.mul(i, 4)), F32), L)
                        b.store(b.fmul(b.load(weight), times), weight)
                    e.store(b.load(weight), e.add(weights, e.mul(i, 4 * ROWS)))
            e.store(b.load(total), total_at)
            return context.get_dummy_value()

        return void(int64, int64, int64, int64, int64, int64, float32), codegen

    return softmax


__all__ = ["ROWS", "interleave_rows", "make_prefill_softmax", "make_product", "make_widen_row"]
