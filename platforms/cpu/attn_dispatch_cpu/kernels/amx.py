"""AMX: eight tile registers of up to 16 rows of 64 bytes, and the product of two tiles of bf16 pairs, summed in f32.

A tile's shape is configured once per kernel call and worker, from the one table of that kernel, and released at its
end. Tile numbers are registers that LLVM neither allocates nor saves: no code between two tile operations may use them.
Emulated, the same operations are loops over vectors in 8 KiB of scratch, so that the logic of the kernels is tested on
any CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.vector import F32, I8, I32, I64, Emit, Value, vec

LANES = 16
TILE_BYTES = 1024
VECTOR = vec(F32, LANES)
WORDS = vec(I32, LANES)
HIGH_HALF = -65536  # 0xFFFF0000


@dataclass(frozen=True)
class TileLayout:
    """What the tiles of a kernel hold: one row per tile register.

    Attributes:
        rows: of each tile, up to 16.
        row_bytes: of each tile, up to 64.
        emulated: operations are loops over vectors.
    """

    rows: tuple[int, ...]
    row_bytes: tuple[int, ...]
    emulated: bool

    def words(self) -> tuple[int, ...]:
        """Return the 64 bytes that LDTILECFG takes, as int64: palette 1, bytes per row from 16, rows from 48 on."""
        config = bytearray(64)
        config[0] = 1
        for tile, (rows, row_bytes) in enumerate(zip(self.rows, self.row_bytes, strict=True)):
            config[16 + 2 * tile : 18 + 2 * tile] = row_bytes.to_bytes(2, "little")
            config[48 + tile] = rows
        return tuple(int.from_bytes(config[i : i + 8], "little", signed=True) for i in range(0, 64, 8))


class Tiles:
    """Emits tile operations; `state` is the address of 8 KiB that only the emulation uses."""

    def __init__(self, e: Emit, layout: TileLayout, state: Value) -> None:
        self._e, self._layout, self._state = e, layout, state

    def zero(self, tile: int) -> None:
        """Set a tile to 0."""
        if not self._layout.emulated:
            self._call("tilezero", [self._number(tile)])
            return
        with self._e.loop(self._e.index(LANES)) as row:
            self._e.store(self._e.const(0.0, LANES), self._row(tile, row))

    def load(self, tile: int, address: Value, stride: Value | int) -> None:
        """Read a tile's rows, `stride` bytes apart."""
        e, stride = self._e, self._index(stride)
        if not self._layout.emulated:
            self._call("tileloadd64", [self._number(tile), e.pointer(address, I8), stride])
            return
        mask = e.lanes_below(e.index(self._layout.row_bytes[tile] // 4), LANES)
        with e.loop(e.index(LANES)) as row:  # what lies beyond the tile's shape is 0
            e.store(e.const(0.0, LANES), self._row(tile, row))
        with e.loop(e.index(self._layout.rows[tile])) as row:
            e.store(e.load_masked(e.add(address, e.b.mul(row, stride)), VECTOR, mask), self._row(tile, row))

    def store(self, tile: int, address: Value, stride: Value | int) -> None:
        """Write a tile's rows, `stride` bytes apart."""
        e, stride = self._e, self._index(stride)
        if not self._layout.emulated:
            self._call("tilestored64", [self._number(tile), e.pointer(address, I8), stride])
            return
        mask = e.lanes_below(e.index(self._layout.row_bytes[tile] // 4), LANES)
        with e.loop(e.index(self._layout.rows[tile])) as row:
            value = e.load(self._row(tile, row), VECTOR)
            e.store_masked(value, e.add(address, e.b.mul(row, stride)), mask)

    def multiply_add(self, total: int, a: int, b: int) -> None:
        """total[m][n] += sum over k of a[m][k] * b[k][n]: f32, and bf16 in pairs along k.

        Raises:
            ValueError: the CPU would refuse the instruction: shapes do not fit, or two of the tiles are one.
        """
        rows, row_bytes = self._layout.rows, self._layout.row_bytes
        fits = (rows[total], row_bytes[total], 4 * rows[b]) == (rows[a], row_bytes[b], row_bytes[a])
        if not fits or len({total, a, b}) < 3:
            raise ValueError(f"tiles {total} += {a} x {b} of {rows=} {row_bytes=}: shapes do not fit")
        if not self._layout.emulated:
            self._call("tdpbf16ps", [self._number(tile) for tile in (total, a, b)])
            return
        e = self._e
        with e.loop(e.index(self._layout.rows[a])) as m:
            at = self._row(total, m)
            result = e.local(VECTOR, e.load(at, VECTOR))
            with e.loop(e.index(self._layout.row_bytes[a] // 4)) as k:
                pair = e.splat(e.load(e.add(self._row(a, m), e.mul(k, 4)), I32), LANES)
                row = e.load(self._row(b, k), WORDS)
                for half in (low_half, high_half):
                    e.b.store(e.fma(half(e, pair), half(e, row), e.b.load(result)), result)
            e.store(e.b.load(result), at)

    def _call(self, name: str, args: list[Value]) -> None:
        fnty = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        self._e.b.call(cgutils.get_or_insert_function(self._e.b.module, fnty, f"llvm.x86.{name}"), args)

    def _number(self, tile: int) -> Value:
        return ir.Constant(I8, tile)

    def _index(self, value: Value | int) -> Value:
        return self._e.index(value) if isinstance(value, int) else value

    def _row(self, tile: int, row: Value) -> Value:
        return self._e.add(self._e.add(self._state, TILE_BYTES * tile), self._e.mul(row, 64))


def low_half(e: Emit, pairs: Value) -> Value:
    """The first bf16 of each pair, as f32."""
    return e.b.bitcast(e.b.shl(pairs, e.consti(16, LANES)), VECTOR)


def high_half(e: Emit, pairs: Value) -> Value:
    """The second bf16 of each pair, as f32."""
    return e.b.bitcast(e.b.and_(pairs, e.consti(HIGH_HALF, LANES)), VECTOR)


def make_configure(layout: TileLayout) -> Any:
    """Build (address of 64 bytes to use): set the shapes of this thread's tiles."""
    words = layout.words()

    @intrinsic  # type: ignore[untyped-decorator]
    def configure(tc: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not layout.emulated:
                e = Emit(builder)
                for i, word in enumerate(words):
                    e.store(ir.Constant(I64, word), e.add(args[0], 8 * i))
                fnty = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
                function = cgutils.get_or_insert_function(builder.module, fnty, "llvm.x86.ldtilecfg")
                builder.call(function, [e.pointer(args[0], I8)])
            return context.get_dummy_value()

        return void(int64), codegen

    return configure


def make_release(layout: TileLayout) -> Any:
    """Build (): give this thread's tiles back, so that the system need not save them."""

    @intrinsic  # type: ignore[untyped-decorator]
    def release(tc: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not layout.emulated:
                fnty = ir.FunctionType(ir.VoidType(), [])
                builder.call(cgutils.get_or_insert_function(builder.module, fnty, "llvm.x86.tilerelease"), [])
            return context.get_dummy_value()

        return void(), codegen

    return release


__all__ = ["LANES", "TILE_BYTES", "TileLayout", "Tiles", "high_half", "low_half", "make_configure", "make_release"]
