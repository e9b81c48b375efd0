"""Keys and values as rows of bf16 that tiles can be loaded from: in place where they lie so, else copied."""

from __future__ import annotations

from typing import Any

from numba import int64, njit, void
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.addressing import locate
from attn_dispatch_cpu.kernels.elements import load_widened, round_to
from attn_dispatch_cpu.kernels.isa import Isa
from attn_dispatch_cpu.kernels.kinds import ITEM_BYTES, KIND_BF16
from attn_dispatch_cpu.kernels.memory import fill_zero, read_f32, read_i64, write_f32, write_i64
from attn_dispatch_cpu.kernels.rows import in_pieces
from attn_dispatch_cpu.kernels.scratch import AMX_GROUP, VECTOR
from attn_dispatch_cpu.kernels.vector import I16, Emit, Value, vec


def make_copy_row(isa: Isa, kind: int) -> Any:
    """Build (source, count, target): a row as bf16, which holds every value of `kind` exactly."""
    lanes = isa.lanes

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_row(tc: Any, source: Any, count: Any, target: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(builder)
            source, count, target = args

            def piece(first: Value, mask: Value | None) -> None:
                at = e.add(source, e.mul(first, ITEM_BYTES[kind]))
                if kind == KIND_BF16:
                    ty = vec(I16, lanes)
                    bits = e.load(at, ty) if mask is None else e.load_masked(at, ty, mask)
                else:
                    bits = round_to(e, KIND_BF16, load_widened(e, kind, at, lanes, mask))
                to = e.add(target, e.mul(first, 2))
                if mask is None:
                    e.store(bits, to)
                else:
                    e.store_masked(bits, to, mask)

            in_pieces(e, count, lanes, piece)
            return context.get_dummy_value()

        return void(int64, int64, int64), codegen

    return copy_row


def make_place_chunk(isa: Isa, kind: int, values: bool) -> Any:
    """Build what finds the keys (or values) of a chunk: for every 16 tokens their address and the bytes between two.

    Where they lie in a whole block, groups of whole rows are used in place. Else a group is copied to `buffer`, rows
    padded with zeros, and so are tokens outside `begin` to `end`: what no token was ever written to may be NaN, and
    0 x NaN is NaN inside a tile.
    """
    copy_row = make_copy_row(isa, kind)
    size_word = A.VALUE_HEAD_SIZE if values else A.HEAD_SIZE
    token_word = A.VALUE_TOKEN if values else A.KEY_TOKEN
    head_word = A.VALUE_HEAD if values else A.KEY_HEAD

    @njit  # type: ignore[untyped-decorator]
    def place_chunk(
        args: int, sequence: int, head: int, first: int, groups: int, begin: int, end: int, buffer: int, table: int
    ) -> None:
        size = read_i64(args + 8 * size_word)
        in_head = head * read_i64(args + 8 * head_word)
        in_blocks = read_i64(args + 8 * A.TABLE) != 0
        block_size = read_i64(args + 8 * A.BLOCK_SIZE)
        direct = kind == KIND_BF16 and size % VECTOR == 0 and (not in_blocks or block_size % AMX_GROUP == 0)
        pitch = (size + VECTOR - 1) // VECTOR * VECTOR * 2
        token_bytes = read_i64(args + 8 * token_word)
        g = 0
        while g < groups:
            position = first + g * AMX_GROUP
            if direct and position >= begin and position + AMX_GROUP <= end:
                run = end
                if in_blocks:
                    run = min(end, (position // block_size + 1) * block_size)
                key, value, _ = locate(args, sequence, position)
                address = (value if values else key) + in_head
                while g < groups and position + AMX_GROUP <= run:
                    write_i64(table + 16 * g, address)
                    write_i64(table + 16 * g + 8, token_bytes)
                    address += AMX_GROUP * token_bytes
                    position += AMX_GROUP
                    g += 1
            else:
                target = buffer + g * AMX_GROUP * pitch
                write_i64(table + 16 * g, target)
                write_i64(table + 16 * g + 8, pitch)
                for t in range(position, position + AMX_GROUP):
                    if pitch != 2 * size or t < begin or t >= end:
                        fill_zero(target, pitch)
                    if t >= begin and t < end:
                        key, value, _ = locate(args, sequence, t)
                        copy_row((value if values else key) + in_head, size, target)
                    target += pitch
                g += 1

    return place_chunk


@njit  # type: ignore[untyped-decorator]
def read_scales(
    args: int, sequence: int, head: int, first: int, count: int, begin: int, end: int, keys: int, values: int
) -> None:
    """Write the scales of `count` tokens' keys and values, f32; 0 outside `begin` to `end`."""
    block_size = read_i64(args + 8 * A.BLOCK_SIZE)
    for t in range(count):
        key = 0.0
        value = 0.0
        if first + t >= begin and first + t < end:
            _, _, entry = locate(args, sequence, first + t)
            entry = 4 * (entry + head * block_size)
            key = read_f32(read_i64(args + 8 * A.KEY_SCALES) + entry)
            value = read_f32(read_i64(args + 8 * A.VALUE_SCALES) + entry)
        write_f32(keys + 4 * t, key)
        write_f32(values + 4 * t, value)


__all__ = ["make_place_chunk", "read_scales"]
