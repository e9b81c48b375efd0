"""What both AMX kernels are made of: packing into tiles, softmax on the way to bf16 weights, rows of the output.

Scores are computed as K Q^T and outputs as (P V)^T or P V, so that keys are read in place and a lane is a query row:
scores are f32[token][rows], weights bf16 in pairs of tokens. Weights are truncated to bf16 and what was truncated is
summed; half a unit added to the polynomial makes that rounding. The maximum is raised, and what was accumulated
multiplied, only if a score grew beyond it by more than 2^8: bf16 has the range, and it seldom happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.amx import HIGH_HALF, LANES, VECTOR, WORDS
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.vector import F32, I16, I32, I64, Emit, Value, vec

GROWTH = 8.0  # powers of two by which a score may exceed the maximum that weights are relative to
HALF_UNIT = 2.0**-8  # of a bf16 in [1, 2)


def _exp2_coefficients(degree: int) -> list[float]:
    """Polynomial of 2**x on [0, 1) with constant term 1, the relative error's squares least at Chebyshev nodes."""
    nodes = 0.5 + 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    powers = np.stack([nodes**i for i in range(1, degree + 1)], axis=1) / np.exp2(nodes)[:, None]
    rest = np.linalg.lstsq(powers, (np.exp2(nodes) - 1) / np.exp2(nodes), rcond=None)[0]
    return [1.0, *(float(c) for c in rest)]


COEFFICIENTS = _exp2_coefficients(3)


def exp2_rounded(e: Emit, isa: Isa, x: Value) -> Value:
    """2 ** x for x <= 2^8, 1e-4 relative, as i32 bits that truncation rounds to bf16; 0 for -inf."""
    b = e.b
    whole = None
    if isa.lanes == LANES:  # AVX-512: x - floor(x) is one instruction, and so is the scaling
        every, zero = ir.Constant(I16, -1), e.const(0.0, LANES)
        args = [x, ir.Constant(I32, 1), zero, every, ir.Constant(I32, 4)]
        part = _x86(e, "avx512.mask.reduce.ps.512", args)
    else:
        low = b.fcmp_ordered("<", x, e.const(-126.0, LANES))
        x = b.select(low, e.const(-126.0, LANES), x)
        floor = cgutils.get_or_insert_function(b.module, ir.FunctionType(VECTOR, [VECTOR]), "llvm.floor.v16f32")
        whole = b.call(floor, [x])
        part = b.fsub(x, whole)
    result = e.const(COEFFICIENTS[-1], LANES)
    for coefficient in COEFFICIENTS[-2:0:-1]:
        result = e.fma(result, part, e.const(coefficient, LANES))
    result = e.fma(result, part, e.const(COEFFICIENTS[0] + HALF_UNIT, LANES))
    if whole is None:
        result = _x86(e, "avx512.mask.scalef.ps.512", [result, x, zero, every, ir.Constant(I32, 4)])
        return b.bitcast(result, WORDS)
    exponent = b.shl(b.fptosi(whole, WORDS), e.consti(23, LANES))
    return b.select(low, e.consti(0, LANES), b.add(b.bitcast(result, WORDS), exponent))


def _x86(e: Emit, name: str, args: list[Value]) -> Value:
    fnty = ir.FunctionType(VECTOR, [arg.type for arg in args])
    return e.b.call(cgutils.get_or_insert_function(e.b.module, fnty, f"llvm.x86.{name}"), args)


def weights_of(e: Emit, isa: Isa, logits: list[Value], total: Value, scales: list[Value] | None) -> list[Value]:
    """Return i32 lanes whose high halves are the bf16 weights 2 ** logits; add all of them to the variable `total`.

    `scales` (f32 lanes) multiply what is returned, not what is summed: of values that are stored with scales.
    """
    b = e.b
    high = e.consti(HIGH_HALF, LANES)
    bits = [b.and_(exp2_rounded(e, isa, x), high) for x in logits]
    sums = [b.bitcast(x, VECTOR) for x in bits]
    if scales is not None:
        products = [b.bitcast(b.fmul(weight, scale), WORDS) for weight, scale in zip(sums, scales, strict=True)]
        bits = [b.and_(b.add(x, e.consti(0x8000, LANES)), high) for x in products]
    while len(sums) > 1:  # a tree: no addition waits for all before it
        sums = [b.fadd(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]
    b.store(b.fadd(b.load(total), sums[0]), total)
    return bits


def pack_pairs(e: Emit, first: Value, second: Value) -> Value:
    """Bf16 in the high halves of two vectors, as pairs."""
    return e.b.or_(e.b.lshr(first, e.consti(16, LANES)), e.b.and_(second, e.consti(HIGH_HALF, LANES)))


def raise_maximum(e: Emit, state: Value, peak: Value, total: Value, rescale: Callable[[Value], None]) -> Value:
    """Return the shift to subtract from logits; where `peak` outgrew the maximum in `state`, raise that first.

    `state` is f32[16] maxima (the sums behind them are in the variable `total`). `rescale(factor)` emits what
    multiplies whatever else was accumulated; it is a cold branch.
    """
    b = e.b
    old = e.load(state, VECTOR)
    grown = b.fcmp_ordered(">", peak, b.fadd(old, e.const(GROWTH, LANES)))
    any_grown = b.icmp_unsigned("!=", b.bitcast(grown, I16), ir.Constant(I16, 0))
    with b.if_then(any_grown, likely=False):
        new = e.maximum(peak, old)
        minus_inf = e.const(float("-inf"), LANES)
        # A lane without any key yet has nothing to multiply; -inf - -inf would be NaN.
        nothing = b.fcmp_ordered("==", old, minus_inf)
        factor = b.select(nothing, e.const(0.0, LANES), e.exp2(b.fsub(old, new)))
        e.store(new, state)
        b.store(b.fmul(b.load(total), factor), total)
        rescale(factor)
    maximum = e.load(state, VECTOR)
    empty = b.fcmp_ordered("==", maximum, e.const(float("-inf"), LANES))
    return b.select(empty, e.const(0.0, LANES), maximum)


def transpose(e: Emit, rows: list[Value]) -> list[Value]:
    """The 16 x 16 transpose of vectors of 32-bit lanes, in four rounds of two-source shuffles."""
    for distance in (1, 2, 4, 8):
        result: list[Value] = [None] * LANES
        for i in range(LANES):
            if i & distance:
                continue
            a, b = rows[i], rows[i + distance]
            low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
            high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
            result[i], result[i + distance] = e.shuffle(a, b, low), e.shuffle(a, b, high)
        rows = result
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def pack_queries(tc: Any, source: Any, pitch: Any, steps: Any, target: Any) -> Any:
    """Lay out 16 rows of bf16 as `steps` tiles of [16 pairs][16 rows]: target tile s has elements 32 s to 32 s + 31."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        source, pitch, steps, target = args
        with e.loop(steps) as s:
            at = e.add(source, e.mul(s, 64))
            rows = [e.load(e.add(at, e.mul(pitch, i)), WORDS) for i in range(LANES)]
            for i, row in enumerate(transpose(e, rows)):
                e.store(row, e.add(e.add(target, e.mul(s, 1024)), 64 * i))
        return context.get_dummy_value()

    return void(int64, int64, int64, int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def pack_values(tc: Any, groups: Any, columns: Any, target: Any, step: Any) -> Any:
    """Lay out 32 tokens of values as tiles of [16 columns][32 tokens], one every `step` bytes.

    `groups` points to (address, bytes between tokens) of two groups of 16 tokens; `columns` is in units of 16.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        groups, columns, target, step = args
        tokens = [(e.load(e.add(groups, 16 * g), I64), e.load(e.add(groups, 16 * g + 8), I64)) for g in (0, 1)]
        pattern = [x for lane in range(LANES) for x in (lane, LANES + lane)]
        with e.loop(columns) as c:
            pairs = []
            for group, pitch in tokens:
                at = e.add(group, e.mul(c, 32))
                rows = [e.load(e.add(at, e.mul(pitch, i)), vec(I16, LANES)) for i in range(LANES)]
                pairs += [e.shuffle(rows[i], rows[i + 1], pattern) for i in range(0, LANES, 2)]
            tile = e.add(target, b.mul(c, step))
            for i, row in enumerate(transpose(e, [b.bitcast(pair, WORDS) for pair in pairs])):
                e.store(row, e.add(tile, 64 * i))
        return context.get_dummy_value()

    return void(int64, int64, int64, int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def unpack_output(tc: Any, source: Any, step: Any, columns: Any, target: Any, pitch: Any) -> Any:
    """Turn tiles of [16 columns][16 rows], one every `step` bytes, into 16 rows of f32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        source, step, columns, target, pitch = args
        with e.loop(columns) as c:
            tile = e.add(source, b.mul(c, step))
            rows = transpose(e, [e.load(e.add(tile, 64 * i), VECTOR) for i in range(LANES)])
            for i, row in enumerate(rows):
                e.store(row, e.add(e.add(target, e.mul(c, 64)), e.mul(pitch, i)))
        return context.get_dummy_value()

    return void(int64, int64, int64, int64, int64), codegen


def splat_f32(e: Emit, address: Value) -> Value:
    """One f32 of memory in every lane."""
    return e.splat(e.load(address, F32), LANES)


__all__ = [
    "exp2_rounded",
    "pack_pairs",
    "pack_queries",
    "pack_values",
    "raise_maximum",
    "splat_f32",
    "transpose",
    "unpack_output",
    "weights_of",
]
