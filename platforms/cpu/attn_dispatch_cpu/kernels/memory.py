"""Raw memory inside Numba kernels: addresses are int64 bytes, arguments are records of 8-byte words."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, float64, int32, int64, njit, void
from numba.core import cgutils
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.vector import F32, I32, I64, Emit


def _reader(result: Any, llvm_type: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def read(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return Emit(builder).load(args[0], llvm_type)

        return result(int64), codegen

    return read


def _writer(kind: Any, llvm_type: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def write(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            Emit(builder).store(args[1], args[0])
            return context.get_dummy_value()

        return void(int64, kind), codegen

    return write


read_i64 = _reader(int64, I64)
read_i32 = _reader(int32, I32)
read_f32 = _reader(float32, F32)
read_f64 = _reader(float64, ir.DoubleType())
write_i32 = _writer(int32, I32)
write_i64 = _writer(int64, I64)
write_f32 = _writer(float32, F32)


@intrinsic  # type: ignore[untyped-decorator]
def add_atomic(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, atomically and in order with other memory; return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = Emit(builder).pointer(args[0], I64)
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return int64(int64, int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def peek(typing_context: Any, address: Any) -> Any:
    """Return the int64 at `address` as it is now, whoever wrote it: read anew each time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = Emit(builder).pointer(args[0], I64)
        return builder.load_atomic(pointer, "acquire", 8)

    return int64(int64), codegen


@njit  # type: ignore[untyped-decorator]
def take_item(counter: int) -> int:
    """Return the number of the next item of work, which nobody else gets."""
    return add_atomic(counter, 1)  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def fill_zero(typing_context: Any, address: Any, size: Any) -> Any:
    """Set `size` bytes to 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, Emit(builder).pointer(args[0], ir.IntType(8)), args[1], 0)
        return context.get_dummy_value()

    return void(int64, int64), codegen
