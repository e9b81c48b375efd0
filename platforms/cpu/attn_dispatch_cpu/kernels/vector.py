"""A small vocabulary of vector operations, emitted as LLVM IR inside Numba intrinsics.

Numba's own vectoriser decides per loop and gives no register tiles, so the inner loops are built here from explicit
LLVM vector types: `<16 x float>` and the like, fused multiply-add, shuffles, masked loads, prefetch, and the bf16 dot
product where the CPU has it. LLVM legalises the same IR for AVX-512, AVX2 and NEON. Addresses are plain i64 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

Value = Any  # an llvmlite IR value: llvmlite ships no types

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
F16 = ir.HalfType()

LOG2E = math.log2(math.e)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite does not name. No kernel has a constant of it."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


BF16 = _BFloat()


def vec(element: Any, lanes: int) -> Any:
    """The LLVM vector type `<lanes x element>`."""
    return ir.VectorType(element, lanes)


class Emit:
    """Emits vector instructions at the builder's present position."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    # -- scalars and control -------------------------------------------------------------------------------------
    def index(self, value: int) -> Value:
        """An i64 constant."""
        return ir.Constant(I64, value)

    def add(self, a: Value, b: Value | int) -> Value:
        """a + b, i64."""
        return self.b.add(a, b if not isinstance(b, int) else self.index(b))

    def mul(self, a: Value, b: Value | int) -> Value:
        """a * b, i64."""
        return self.b.mul(a, b if not isinstance(b, int) else self.index(b))

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """Emit `for i in range(count)`; yields i as i64."""
        with cgutils.for_range(self.b, count, intp=I64) as it:
            yield it.index

    def local(self, ty: Any, value: Value) -> Value:
        """A stack variable that LLVM promotes to a register, holding `value`."""
        slot = cgutils.alloca_once(self.b, ty)
        self.b.store(value, slot)
        return slot

    # -- memory --------------------------------------------------------------------------------------------------
    def pointer(self, address: Value, ty: Any) -> Value:
        """An address as a pointer to a type."""
        return self.b.inttoptr(address, ty.as_pointer())

    def load(self, address: Value, ty: Any, align: int = 1) -> Value:
        """Read a value of a type."""
        return self.b.load(self.pointer(address, ty), align=align)

    def store(self, value: Value, address: Value, align: int = 1) -> None:
        """Write a value."""
        self.b.store(value, self.pointer(address, value.type), align=align)

    def lanes_below(self, count: Value, lanes: int) -> Value:
        """Mask `<lanes x i1>`: lane < count (i64)."""
        iota = ir.Constant(vec(I32, lanes), list(range(lanes)))
        return self.b.icmp_signed("<", iota, self.splat(self.b.trunc(count, I32), lanes))

    def load_masked(self, address: Value, ty: Any, mask: Value) -> Value:
        """Load the lanes of `mask`; the others are zero and their memory is not touched."""
        name = f"llvm.masked.load.{_mangle(ty)}.p0"
        fnty = ir.FunctionType(ty, [ty.as_pointer(), I32, mask.type, ty])
        return self._call(name, fnty, [self.pointer(address, ty), ir.Constant(I32, 1), mask, ir.Constant(ty, None)])

    def store_masked(self, value: Value, address: Value, mask: Value) -> None:
        """Write the lanes of `mask`; the memory of the others is not touched."""
        ty = value.type
        name = f"llvm.masked.store.{_mangle(ty)}.p0"
        fnty = ir.FunctionType(ir.VoidType(), [ty, ty.as_pointer(), I32, mask.type])
        self._call(name, fnty, [value, self.pointer(address, ty), ir.Constant(I32, 1), mask])

    def prefetch(self, address: Value, locality: int) -> None:
        """Ask for one line for reading: locality 3 = into every level, 2 = from the second level on."""
        ptr = self.pointer(address, I8)
        fnty = ir.FunctionType(ir.VoidType(), [ptr.type, I32, I32, I32])
        self._call(
            "llvm.prefetch.p0", fnty, [ptr, ir.Constant(I32, 0), ir.Constant(I32, locality), ir.Constant(I32, 1)]
        )

    # -- vectors -------------------------------------------------------------------------------------------------
    def const(self, value: float, lanes: int) -> Value:
        """A constant in every lane, f32."""
        return ir.Constant(vec(F32, lanes), [value] * lanes)

    def consti(self, value: int, lanes: int, ty: Any = I32) -> Value:
        """A constant in every lane, an integer."""
        return ir.Constant(vec(ty, lanes), [value] * lanes)

    def splat(self, scalar: Value, lanes: int) -> Value:
        """A scalar in every lane."""
        ty = vec(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(ty, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(ty, ir.Undefined), ir.Constant(vec(I32, lanes), [0] * lanes))

    def shuffle(self, a: Value, b: Value, pattern: Sequence[int]) -> Value:
        """Lanes of `a` and then of `b`, by number."""
        return self.b.shuffle_vector(a, b, ir.Constant(vec(I32, len(pattern)), list(pattern)))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, in one instruction where the CPU has one."""
        ty = a.type
        return self._call(f"llvm.fmuladd.{_mangle(ty)}", ir.FunctionType(ty, [ty] * 3), [a, b, c])

    def maximum(self, a: Value, b: Value) -> Value:
        """a > b ? a : b, one instruction everywhere; a NaN in `a` gives `b`."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def dot_bf16(self, acc: Value, a: Value, b: Value) -> Value:
        """acc + the sum over bf16 pairs of a * b: f32[16] + bf16[32] . bf16[32] (VDPBF16PS), or a quarter (BFDOT)."""
        lanes = acc.type.count
        name = {16: "llvm.x86.avx512bf16.dpbf16ps.512", 4: "llvm.aarch64.neon.bfdot.v4f32.v8bf16"}[lanes]
        pairs = vec(BF16, 2 * lanes)
        fnty = ir.FunctionType(acc.type, [acc.type, pairs, pairs])
        return self._call(name, fnty, [acc, self.b.bitcast(a, pairs), self.b.bitcast(b, pairs)])

    def exp2(self, x: Value) -> Value:
        """2 ** x for x <= 0 (rounding error aside), 1e-7 relative; below -126, and for -inf, it is 0.

        Degree-6 polynomial on [-0.5, 0.5] (Chebyshev nodes), the integer part added into the exponent.
        """
        lanes = x.type.count
        low = self.b.fcmp_ordered("<", x, self.const(-126.0, lanes))
        x = self.b.select(low, self.const(-126.0, lanes), x)
        ty = x.type
        whole = self._call(f"llvm.nearbyint.{_mangle(ty)}", ir.FunctionType(ty, [ty]), [x])
        part = self.b.fsub(x, whole)
        result = self.const(EXP2_COEFFICIENTS[-1], lanes)
        for coefficient in EXP2_COEFFICIENTS[-2::-1]:
            result = self.fma(result, part, self.const(coefficient, lanes))
        exponent = self.b.shl(self.b.fptosi(whole, vec(I32, lanes)), self.consti(23, lanes))
        bits = self.b.add(self.b.bitcast(result, vec(I32, lanes)), exponent)
        scaled = self.b.bitcast(bits, ty)
        return self.b.select(low, self.const(0.0, lanes), scaled)

    def round_bf16(self, x: Value) -> Value:
        """f32 lanes to bf16 bits (i16 lanes), to nearest even, NaN kept."""
        lanes = x.type.count
        bits = self.b.bitcast(x, vec(I32, lanes))
        odd = self.b.and_(self.b.lshr(bits, self.consti(16, lanes)), self.consti(1, lanes))
        rounded = self.b.add(self.b.add(bits, self.consti(0x7FFF, lanes)), odd)
        quiet = self.b.or_(bits, self.consti(0x400000, lanes))
        nan = self.b.fcmp_unordered("uno", x, x)
        chosen = self.b.lshr(self.b.select(nan, quiet, rounded), self.consti(16, lanes))
        return self.b.trunc(chosen, vec(I16, lanes))

    def round_bf16_fast(self, x: Value) -> Value:
        """The same by the CPU's own instruction (which flushes denormals): for probabilities only."""
        return self.b.bitcast(self.b.fptrunc(x, vec(BF16, x.type.count)), vec(I16, x.type.count))

    def _call(self, name: str, fnty: Any, args: list[Value]) -> Value:
        return self.b.call(cgutils.get_or_insert_function(self.b.module, fnty, name), args)


def _mangle(ty: Any) -> str:
    return f"v{ty.count}{ty.element.intrinsic_name}"


def _exp2_coefficients(degree: int) -> list[float]:
    """Polynomial of 2**x on [-0.5, 0.5], constant term exactly 1, from Chebyshev nodes (float64)."""
    import numpy as np

    nodes = 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    rest = (np.exp2(nodes) - 1.0) / nodes
    fit = np.polynomial.chebyshev.Chebyshev.fit(nodes, rest, degree - 1, domain=[-0.5, 0.5])
    return [1.0, *(float(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef)]


EXP2_COEFFICIENTS = _exp2_coefficients(6)

Codegen = Callable[..., Value]
