"""What this CPU can do at best, measured: bytes read per second from memory, f32 multiply-adds per second.

Both run on the same threads as the kernels that are compared with them, in the same process, so that a ratio says
something on a busy machine too. The larger of the two times is the roofline of a piece of work.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import int64, njit, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.calls import guarded
from attn_dispatch_cpu.kernels.memory import read_i64, take_item, write_i64
from attn_dispatch_cpu.kernels.vector import F32, I32, I64, Emit, vec
from attn_dispatch_cpu.threads import POOL

READ_BYTES = 1 << 28
PIECE_BYTES = 1 << 20
FMA_STEPS = 200_000
FMA_LANES = 16
FMA_CHAINS = 16


@intrinsic  # type: ignore[untyped-decorator]
def _read(typing_context: Any, address: Any, size: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        ty = vec(I64, 8)
        sums = [e.local(ty, ir.Constant(ty, None)) for _ in range(8)]
        with e.loop(builder.udiv(args[1], e.index(512))) as i:
            at = e.add(args[0], e.mul(i, 512))
            for j, total in enumerate(sums):
                builder.store(builder.xor(builder.load(total), e.load(e.add(at, 64 * j), ty)), total)
        result = builder.load(sums[0])
        for total in sums[1:]:
            result = builder.xor(result, builder.load(total))
        return builder.extract_element(result, ir.Constant(I32, 0))

    return int64(int64, int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _multiply_add(typing_context: Any, steps: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        ty = vec(F32, FMA_LANES)
        sums = [e.local(ty, e.const(float(j), FMA_LANES)) for j in range(FMA_CHAINS)]
        factor = e.splat(builder.sitofp(args[0], F32), FMA_LANES)
        with e.loop(args[0]):
            for total in sums:
                builder.store(e.fma(builder.load(total), factor, factor), total)
        result = builder.load(sums[0])
        for total in sums[1:]:
            result = builder.fadd(result, builder.load(total))
        bits = builder.extract_element(builder.bitcast(result, vec(I32, FMA_LANES)), ir.Constant(I32, 0))
        return builder.sext(bits, I64)

    return int64(int64), codegen


KERNEL = njit(void(int64, int64, int64), nogil=True)


# Arguments: [items, address, result]; a call: [next item, state].
@KERNEL
@guarded
def _read_all(args: int, call: int, worker: int) -> None:
    item = take_item(call)
    while item < read_i64(args):
        write_i64(args + 16, _read(read_i64(args + 8) + item * PIECE_BYTES, PIECE_BYTES))
        item = take_item(call)


@KERNEL
@guarded
def _multiply_all(args: int, call: int, worker: int) -> None:
    item = take_item(call)
    while item < read_i64(args):
        write_i64(args + 16, _multiply_add(FMA_STEPS // 20))
        item = take_item(call)


class Roofline:
    """Best times of both measurements so far, on a number of threads; `measure` is called between the rivals' turns."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.read_seconds = self.multiply_seconds = float("inf")
        self._memory = np.ones(READ_BYTES, np.uint8)

    def measure(self) -> None:
        """Measure once and keep what is better than before."""
        items = 20 * self.threads
        seconds = self._seconds(_read_all, READ_BYTES // PIECE_BYTES, self._memory.ctypes.data)
        self.read_seconds = min(self.read_seconds, seconds)
        seconds = self._seconds(_multiply_all, items, 0) / items * 20 * self.threads
        self.multiply_seconds = min(self.multiply_seconds, seconds)

    def _seconds(self, kernel: Any, items: int, address: int) -> float:
        words = np.array([items, address, 0, 0, 0], np.int64)
        start = time.perf_counter()
        POOL.run(kernel, words.ctypes.data, words.ctypes.data + 24, self.threads, words)
        return time.perf_counter() - start

    @property
    def bytes_per_second(self) -> float:
        """Read bandwidth of memory."""
        return READ_BYTES / self.read_seconds

    @property
    def operations_per_second(self) -> float:
        """f32 operations, two to a multiply-add."""
        return 2.0 * self.threads * FMA_STEPS * FMA_CHAINS * FMA_LANES / self.multiply_seconds

    def seconds(self, read_bytes: float, operations: float) -> float:
        """The least time that work of this size takes."""
        return max(read_bytes / self.bytes_per_second, operations / self.operations_per_second)
