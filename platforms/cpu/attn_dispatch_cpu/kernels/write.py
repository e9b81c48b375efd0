"""Writing new keys and values into their slots, quantised on the way where the cache is.

int8 and fp8 caches get a scale per token and kv head, the largest magnitude of the row over the type's largest value:
stored = round(x / scale). Rounding is to nearest, ties to even, and saturates.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float64, int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.elements import load_widened, round_to
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES, KIND_BF16, KIND_E4M3, KIND_E5M2, KIND_F16, KIND_F32, KIND_INT8
from attn_dispatch_cpu.kernels.memory import read_f64, read_i64, take_item
from attn_dispatch_cpu.kernels.rows import by_kind, in_pieces
from attn_dispatch_cpu.kernels.vector import F32, I8, I32, Emit, Value, vec

LIMITS = {KIND_INT8: 127.0, KIND_E4M3: 448.0, KIND_E5M2: 57344.0}
SMALLEST_SCALE = 1e-30  # of a row of zeros: 0 / scale must be 0
FLOATS = (KIND_F32, KIND_F16, KIND_BF16)


def quantised_bits(e: Emit, kind: int, x: Value) -> Value:
    """Round f32 lanes, within the type's limits already, to int8 or fp8 bits."""
    b, lanes = e.b, x.type.count
    whole = vec(I32, lanes)
    nearest = ir.FunctionType(x.type, [x.type])
    name = f"llvm.nearbyint.v{lanes}f32"

    def rounded(value: Value) -> Value:
        function = cgutils.get_or_insert_function(b.module, nearest, name)
        return b.fptosi(b.call(function, [value]), whole)

    if kind == KIND_INT8:
        return b.trunc(rounded(x), vec(I8, lanes))
    mantissa, bias = (3, 7) if kind == KIND_E4M3 else (2, 15)
    shift = 23 - mantissa
    bits = b.bitcast(x, whole)
    sign = b.and_(b.lshr(bits, e.consti(24, lanes)), e.consti(0x80, lanes))
    magnitude = b.and_(bits, e.consti(0x7FFFFFFF, lanes))
    size = b.bitcast(magnitude, x.type)
    # Below the smallest normal number the steps are even: a multiple of the smallest one, which may round up to it.
    small = rounded(b.fmul(size, e.const(2.0 ** (bias - 1 + mantissa), lanes)))
    odd = b.and_(b.lshr(magnitude, e.consti(shift, lanes)), e.consti(1, lanes))
    half = b.add(odd, e.consti((1 << (shift - 1)) - 1, lanes))
    normal = b.lshr(b.add(magnitude, half), e.consti(shift, lanes))
    normal = b.sub(normal, e.consti((127 - bias) << mantissa, lanes))
    is_small = b.fcmp_ordered("<", size, e.const(2.0 ** (1 - bias), lanes))
    code = b.select(is_small, small, normal)
    return b.trunc(b.or_(code, sign), vec(I8, lanes))


def make_store_slot(isa: Isa, kind: int) -> Any:
    """Build (source, source kind, count, target, scale address, layer's scale): one row into its slot."""
    lanes = isa.lanes

    def largest(e: Emit, source: Value, which: int, count: Value) -> Value:
        b = e.b
        top = e.local(vec(F32, lanes), e.const(0.0, lanes))

        def piece(first: Value, mask: Value | None) -> None:
            x = load_widened(e, which, e.add(source, e.mul(first, ITEM_BYTES[which])), lanes, mask)
            size = b.bitcast(b.and_(b.bitcast(x, vec(I32, lanes)), e.consti(0x7FFFFFFF, lanes)), vec(F32, lanes))
            # "Not below" rather than "above": a NaN becomes the row's scale, and is not lost.
            old = b.load(top)
            b.store(b.select(b.fcmp_unordered(">=", size, old), size, old), top)

        in_pieces(e, count, lanes, piece)
        best = e.local(F32, ir.Constant(F32, 0.0))
        final = b.load(top)
        for lane in range(lanes):
            x, old = b.extract_element(final, ir.Constant(I32, lane)), b.load(best)
            b.store(b.select(b.fcmp_unordered(">=", x, old), x, old), best)
        return b.load(best)

    def store(e: Emit, source: Value, which: int, count: Value, target: Value, scale_at: Value,
              layer_scale: Value) -> None:  # fmt: skip
        b = e.b
        inverse = None
        limit = LIMITS.get(kind, 0.0)
        if kind in LIMITS:
            scale = b.fmul(largest(e, source, which, count), ir.Constant(F32, 1.0 / limit))
            tiny = ir.Constant(F32, SMALLEST_SCALE)
            scale = b.select(b.fcmp_ordered("<", scale, tiny), tiny, scale)
            # Read back as stored * scale * the layer's own.
            e.store(b.fdiv(scale, b.fptrunc(layer_scale, F32)), scale_at)
            inverse = e.splat(scale, lanes)

        def piece(first: Value, mask: Value | None) -> None:
            x = load_widened(e, which, e.add(source, e.mul(first, ITEM_BYTES[which])), lanes, mask)
            if inverse is not None:
                x = b.fdiv(x, inverse)
                high, low = e.const(limit, lanes), e.const(-limit, lanes)
                x = b.select(b.fcmp_ordered(">", x, high), high, b.select(b.fcmp_ordered("<", x, low), low, x))
                bits = quantised_bits(e, kind, x)
            else:
                bits = round_to(e, kind, x)
            at = e.add(target, e.mul(first, ITEM_BYTES[kind]))
            if mask is None:
                e.store(bits, at)
            else:
                e.store_masked(bits, at, mask)

        in_pieces(e, count, lanes, piece)

    @intrinsic  # type: ignore[untyped-decorator]
    def store_slot(tc: Any, source: Any, source_kind: Any, count: Any, target: Any, scale_at: Any,
                   layer_scale: Any) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(builder)
            source, source_kind, count, target, scale_at, layer_scale = args

            def convert(which: int) -> None:
                if which == kind:
                    # The same type: bits as they are, NaN payloads and all.
                    ir_i8 = ir.IntType(8)
                    size = e.mul(count, ITEM_BYTES[kind])
                    cgutils.raw_memcpy(builder, e.pointer(target, ir_i8), e.pointer(source, ir_i8), size, 1)
                else:
                    store(e, source, which, count, target, scale_at, layer_scale)

            by_kind(e, source_kind, FLOATS, convert)
            return context.get_dummy_value()

        return void(int64, int64, int64, int64, int64, float64), codegen

    return store_slot


def make_write_kernel(isa: Isa, kind: int) -> Any:
    """Build the kernel of one kind of cache, as a plain function; an item is a new token."""
    store_slot = make_store_slot(isa, kind)

    def write(args: int, call: int, worker: int) -> None:
        rows = read_i64(args + 8 * A.NEW_ROWS)
        slots = read_i64(args + 8 * A.SLOTS)
        heads = read_i64(args + 8 * A.KV_HEADS)
        size = read_i64(args + 8 * A.BLOCK_SIZE)
        head_size = read_i64(args + 8 * A.HEAD_SIZE)
        value_head_size = read_i64(args + 8 * A.VALUE_HEAD_SIZE)
        new_kind = read_i64(args + 8 * A.Q_KIND)
        key_scales = read_i64(args + 8 * A.KEY_SCALES)
        value_scales = read_i64(args + 8 * A.VALUE_SCALES)
        row = take_item(call)
        while row < rows:
            slot = read_i64(slots + 8 * row)
            if slot >= 0:
                block = slot // size
                at = slot - block * size
                for head in range(heads):
                    scale = 4 * ((block * heads + head) * size + at)
                    new = read_i64(args + 8 * A.NEW_KEY) + row * read_i64(args + 8 * A.NEW_KEY_TOKEN)
                    target = read_i64(args + 8 * A.KEY) + block * read_i64(args + 8 * A.KEY_BLOCK)
                    target += head * read_i64(args + 8 * A.KEY_HEAD) + at * read_i64(args + 8 * A.KEY_TOKEN)
                    store_slot(new + head * read_i64(args + 8 * A.NEW_KEY_HEAD), new_kind, head_size,
                               target, key_scales + scale, read_f64(args + 8 * A.KEY_SCALE))  # fmt: skip
                    new = read_i64(args + 8 * A.NEW_VALUE) + row * read_i64(args + 8 * A.NEW_VALUE_TOKEN)
                    target = read_i64(args + 8 * A.VALUE) + block * read_i64(args + 8 * A.VALUE_BLOCK)
                    target += head * read_i64(args + 8 * A.VALUE_HEAD) + at * read_i64(args + 8 * A.VALUE_TOKEN)
                    store_slot(new + head * read_i64(args + 8 * A.NEW_VALUE_HEAD), new_kind, value_head_size,
                               target, value_scales + scale, read_f64(args + 8 * A.VALUE_SCALE))  # fmt: skip
            row = take_item(call)

    return write


__all__ = ["make_write_kernel"]
