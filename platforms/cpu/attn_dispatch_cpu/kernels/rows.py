"""Query rows in, output rows out: conversions of whole rows between an array's type and a kernel's scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import float32, int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.elements import load_widened, round_to
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES, KIND_BF16, KIND_F16, KIND_F32
from attn_dispatch_cpu.kernels.vector import F32, I16, Emit, Value, vec

FLOATS = (KIND_F32, KIND_F16, KIND_BF16)


def in_pieces(e: Emit, count: Value, lanes: int, piece: Callable[[Value, Value | None], None]) -> None:
    """Call `piece(first element, mask)` for whole vectors of a row (no mask), and for what is left (masked)."""
    b = e.b
    whole = b.udiv(count, e.index(lanes))
    with e.loop(whole) as i:
        piece(e.mul(i, lanes), None)
    rest = b.urem(count, e.index(lanes))
    with b.if_then(b.icmp_signed(">", rest, e.index(0))):
        piece(e.mul(whole, lanes), e.lanes_below(rest, lanes))


def by_kind(e: Emit, kind: Value, kinds: tuple[int, ...], emit: Callable[[int], None]) -> None:
    """Call `emit(k)` for every kind, each behind a test at run time."""
    for each in kinds:
        with e.b.if_then(e.b.icmp_signed("==", kind, e.index(each))):
            emit(each)


def make_load_row(isa: Isa, raw: bool) -> Any:
    """Build (source, kind, count, target): a row to f32, or bf16 as it is (`raw`), zeros up to a whole vector."""
    lanes = 2 * isa.lanes if raw else isa.lanes

    @intrinsic  # type: ignore[untyped-decorator]
    def load_row(tc: Any, source: Any, kind: Any, count: Any, target: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(builder)
            source, kind, count, target = args

            def convert(which: int) -> None:
                def piece(first: Value, mask: Value | None) -> None:
                    at = e.add(source, e.mul(first, ITEM_BYTES[which]))
                    if raw:
                        ty = vec(I16, lanes)
                        e.store(
                            e.load(at, ty) if mask is None else e.load_masked(at, ty, mask),
                            e.add(target, e.mul(first, 2)),
                        )
                    else:
                        e.store(load_widened(e, which, at, lanes, mask), e.add(target, e.mul(first, 4)))

                in_pieces(e, count, lanes, piece)

            if raw:
                convert(KIND_BF16)
            else:
                by_kind(e, kind, FLOATS, convert)
            return context.get_dummy_value()

        return void(int64, int64, int64, int64), codegen

    return load_row


def make_store_row(isa: Isa) -> Any:
    """Build (source f32, factor, kind, count, target): a row times a factor, rounded to its type."""
    lanes = isa.lanes

    @intrinsic  # type: ignore[untyped-decorator]
    def store_row(tc: Any, source: Any, factor: Any, kind: Any, count: Any, target: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            source, factor, kind, count, target = args
            times = e.splat(factor, lanes)

            def convert(which: int) -> None:
                def piece(first: Value, mask: Value | None) -> None:
                    # The source is padded to whole vectors: only the target needs the mask.
                    x = b.fmul(e.load(e.add(source, e.mul(first, 4)), vec(F32, lanes)), times)
                    at = e.add(target, e.mul(first, ITEM_BYTES[which]))
                    rounded = round_to(e, which, x)
                    if mask is None:
                        e.store(rounded, at)
                    else:
                        e.store_masked(rounded, at, mask)

                in_pieces(e, count, lanes, piece)

            by_kind(e, kind, FLOATS, convert)
            return context.get_dummy_value()

        return void(int64, float32, int64, int64, int64), codegen

    return store_row


def make_collect_row(column_unit: int, dot: bool) -> Any:
    """Build (accumulator, row, units, target f32): one row of a decode tile's output, columns in their order.

    The bf16 path accumulates a unit of two vectors in the order that interleaving two rows gives: columns 8i..8i+3 in
    the 128 bits i of the first vector, 8i+4..8i+7 in those of the second.
    """
    lanes = column_unit // 2
    order = [side + 4 * i + j for i in range(lanes // 4) for side in (0, lanes) for j in range(4)]

    @intrinsic  # type: ignore[untyped-decorator]
    def collect_row(tc: Any, accumulator: Any, row: Any, units: Any, target: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(builder)
            accumulator, row, units, target = args
            source = e.add(accumulator, e.mul(row, column_unit * 4))
            with e.loop(units) as u:
                at, to = e.add(source, e.mul(u, 4 * column_unit * 4)), e.add(target, e.mul(u, column_unit * 4))
                if dot:
                    low, high = e.load(at, vec(F32, lanes)), e.load(e.add(at, 4 * lanes), vec(F32, lanes))
                    for half in (0, lanes):
                        e.store(e.shuffle(low, high, order[half : half + lanes]), e.add(to, 4 * half))
                else:
                    e.store(e.load(at, vec(F32, column_unit)), to)
            return context.get_dummy_value()

        return void(int64, int64, int64, int64), codegen

    return collect_row


__all__ = ["by_kind", "in_pieces", "make_collect_row", "make_load_row", "make_store_row"]
