"""A kernel that does nothing but multiply: how fast a code path is on this CPU (see `code_path`)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int64, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.amx import TileLayout, Tiles, make_configure, make_release
from attn_dispatch_cpu.kernels.arguments import RATE_CHAINS
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.memory import read_i64
from attn_dispatch_cpu.kernels.vector import F32, I16, I32, Emit, vec


def make_rate_kernel(isa: Isa, path: str) -> Any:
    """Build the kernel `(record, call, worker)`: so many rounds of products; the record has room for 16 words."""
    layout = TileLayout((16,) * 8, (64,) * 8, emulated=False)
    configure, release = make_configure(layout), make_release(layout)

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(tc: Any, rounds: Any, record: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e, b = Emit(builder), builder
            rounds, record = args
            if path == "amx":
                tiles = Tiles(e, layout, record)
                for tile in range(8):
                    tiles.zero(tile)
                with e.loop(rounds):
                    for tile in range(4):
                        tiles.multiply_add(tile, 4 + tile % 2, 6 + tile // 2)
                return context.get_dummy_value()
            lanes = isa.lanes
            row = vec(F32, lanes)
            sums = [e.local(row, e.const(float(i), lanes)) for i in range(RATE_CHAINS)]
            factor = e.splat(b.sitofp(rounds, F32), lanes)
            pairs = b.bitcast(factor, vec(I16, 2 * lanes))
            with e.loop(rounds):
                for total in sums:
                    old = b.load(total)
                    new = e.dot_bf16(old, pairs, pairs) if path == "bf16-dot" else e.fma(old, factor, factor)
                    b.store(new, total)
            result = b.load(sums[0])
            for total in sums[1:]:
                result = b.fadd(result, b.load(total))
            e.store(b.extract_element(result, ir.Constant(I32, 0)), e.add(record, 8))
            return context.get_dummy_value()

        return void(int64, int64), codegen

    def rate(record: int, call: int, worker: int) -> None:
        if path == "amx":
            configure(record + 64)
            multiply(read_i64(record), record)
            release()
        else:
            multiply(read_i64(record), record)

    return rate


__all__ = ["make_rate_kernel"]
