"""Element types in memory: how a vector of each is read as f32, and how f32 is rounded to each.

Conversions are exact where the target is wider;
rounding is to nearest, ties to even.
"""

from __future__ import annotations

from attn_dispatch_cpu.kernels.kinds import KIND_BF16, KIND_E4M3, KIND_F16, KIND_F32, KIND_INT8
from attn_dispatch_cpu.kernels.vector import F16, F32, I8, I16, I32, Emit, Value, vec

_STORED = (F32, F16, I16, I8, I8, I8)


def load_widened(e: Emit, kind: int, address: Value, lanes: int, mask: Value | None = None) -> Value:
    """Read `lanes` elements of a kind as f32; lanes outside `mask` are 0 and their memory is not touched."""
    ty = vec(_STORED[kind], lanes)
    raw = e.load(address, ty) if mask is None else e.load_masked(address, ty, mask)
    return widen(e, kind, raw)


def widen(e: Emit, kind: int, raw: Value) -> Value:
    """Return the f32 values of a vector of stored elements."""
    b, lanes = e.b, raw.type.count
    floats = vec(F32, lanes)
    if kind == KIND_F32:
        return raw
    if kind == KIND_F16:
        return b.fpext(raw, floats)
    if kind == KIND_BF16:
        return b.bitcast(b.shl(b.zext(raw, vec(I32, lanes)), e.consti(16, lanes)), floats)
    if kind == KIND_INT8:
        return b.sitofp(b.sext(raw, vec(I32, lanes)), floats)
    bits = b.zext(raw, vec(I32, lanes))
    sign = b.shl(b.and_(bits, e.consti(0x80, lanes)), e.consti(24, lanes))
    body = b.and_(bits, e.consti(0x7F, lanes))
    mantissa = 3 if kind == KIND_E4M3 else 2
    # The exponent and mantissa, moved into place, are the value times 2^(bias - 127): f32 has room even for the
    # smallest, and a multiplication by a power of two puts subnormals right as well.
    shifted = b.bitcast(b.shl(body, e.consti(23 - mantissa, lanes)), floats)
    bias = 7 if kind == KIND_E4M3 else 15
    value = b.fmul(shifted, e.const(2.0 ** (127 - bias), lanes))
    value = b.bitcast(b.or_(b.bitcast(value, vec(I32, lanes)), sign), floats)
    special = e.consti(0x7F if kind == KIND_E4M3 else 0x7C, lanes)  # NaN; of e5m2 infinities too, never stored here
    nan = b.icmp_signed("==" if kind == KIND_E4M3 else ">=", body, special)
    return b.select(nan, e.const(float("nan"), lanes), value)


def round_to(e: Emit, kind: int, x: Value) -> Value:
    """Round f32 lanes to one of the three float kinds, as stored."""
    if kind == KIND_F32:
        return x
    if kind == KIND_F16:
        return e.b.fptrunc(x, vec(F16, x.type.count))
    return e.round_bf16(x)


__all__ = ["load_widened", "round_to", "widen"]
