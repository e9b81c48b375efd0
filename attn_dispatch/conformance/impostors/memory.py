"""Impostors that read or write the wrong memory: tables, slots, scales, strides, given outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_dispatch.backend import Call, Plan
from attn_dispatch.conformance.impostors.honest import Floats, Honest, impostor
from attn_dispatch.contract import AttentionSpec, BatchView, KVCache, LayerParameters
from attn_dispatch.contract.dtypes import FINITE_MAX, numpy_dtype, quantise


@impostor("keys up to a multiple of eight are read", "ordinary numbers in unused slots")
class ReadsOn(Honest):
    """What lies behind a sequence is read where it is no NaN."""

    def length(self, view: BatchView, s: int) -> int:
        return min(-(-super().length(view, s) // 8) * 8, int(view.side.used_blocks[s]) * view.side.block_size)

    def first(self, n: int, m: int) -> int:
        return m - n

    def read(self, blocks: Floats, view: BatchView, s: int, scale: float) -> Floats:
        tokens = super().read(blocks, view, s, scale)
        return tokens if np.isfinite(tokens).all() else tokens[: int(view.kv_lens[s])]


def _ids(name: str, change: Any, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class OtherIds(Honest):
        def table(self, view: BatchView, s: int) -> Any:
            return change(super().table(view, s))


_ids("block ids of 15 bits", lambda table: table & 0x7FFF, "block ids over 32,767")
_ids("block ids of 16 bits", lambda table: table & 0xFFFF, "block ids over 65,535")
_ids("blocks in ascending order", np.sort, "mixed float32", "one long sequence")
_ids("a sequence's blocks one after the other", lambda table: table[:1] + np.arange(len(table)), "mixed float32")
_ids("the first block for all", lambda table: np.repeat(table[:1], len(table)), "one long sequence", "mixed float32")


@impostor("addresses of 31 bits", "blocks beyond 2 GiB")
class NarrowAddresses(Honest):
    """Offsets in bytes overflow."""

    def table(self, view: BatchView, s: int) -> Any:
        table = super().table(view, s)
        return np.where(table > 100_000, table & 0xFFFF, table)


@impostor("pages of 32 whatever the layer says", "block size 17", "block size 48")
class FixedPages(Honest):
    """Offsets by a constant."""

    def read(self, blocks: Floats, view: BatchView, s: int, scale: float) -> Floats:
        tokens = super().read(blocks, view, s, scale)
        return tokens if view.side.block_size in (1, 8, 16, 32, 64, 128, 256) else np.roll(tokens, 1, axis=0)


@impostor("a slot of -1 is the last slot", "tokens with slot -1", "padding sequence")
class LastSlot(Honest):
    """As NumPy takes -1."""

    def write(self, blocks: Floats, rows: Floats, slots: Any, scale: float) -> None:
        flat = np.where(slots < 0, blocks.shape[0] * blocks.shape[2] - 1, slots)
        super().write(blocks, rows, flat, scale)


@impostor("a slot of -1 is slot 0", "tokens with slot -1", "padding sequence")
class FirstSlot(Honest):
    """Clamped."""

    def slots(self, plan: Plan) -> Any:
        return np.maximum(super().slots(plan), 0)


@impostor("slots by the table alone", "tokens with slot -1")
class OwnSlots(Honest):
    """The mapping is not read."""

    def slots(self, plan: Plan) -> Any:
        view, slots = plan.view, []
        for s in range(view.num_seqs):
            n, length = int(np.diff(view.new_start_loc)[s]), int(view.side.lens[s])
            at = np.arange(length - n, length)
            if length == 0:
                slots += [-1] * n
            else:
                table = view.side.table[s].astype(np.int64)
                slots += (table[at // view.side.block_size] * view.side.block_size + at % view.side.block_size).tolist()
        return np.array(slots, np.int64)


@impostor("nothing written", "decode float32", "cross, first step float32")
class WritesNothing(Honest):
    """The engine will have done it."""

    def write(self, blocks: Floats, rows: Floats, slots: Any, scale: float) -> None:
        pass


@impostor("only keys written", "decode float32", "mixed bfloat16")
class WritesKeys(Honest):
    """The second call forgotten."""

    def write(self, blocks: Floats, rows: Floats, slots: Any, scale: float) -> None:
        self._calls = getattr(self, "_calls", 0) + 1
        if self._calls % 2:
            super().write(blocks, rows, slots, scale)


@impostor("the slot behind is overwritten", "decode float32", "prefill float32")
class WritesOn(Honest):
    """A vector store of two tokens."""

    def write(self, blocks: Floats, rows: Floats, slots: Any, scale: float) -> None:
        super().write(
            blocks, rows, np.minimum(np.where(slots < 0, -1, slots + 1), blocks.shape[0] * blocks.shape[2] - 1), scale
        )
        super().write(blocks, rows, slots, scale)


@impostor("a block of another sequence is touched", "decode float32")
class Touches(Honest):
    """One element of block 0."""

    def write(self, blocks: Floats, rows: Floats, slots: Any, scale: float) -> None:
        super().write(blocks, rows, slots, scale)
        blocks[0, 0, 0, 0] = 0.5


@impostor("keys and values swapped", "decode float32")
class Swapped(Honest):
    """In the call."""

    def run(self, call: Call) -> Any:
        if call.k is not None and call.v is not None and call.k.shape == call.v.shape:
            call.k, call.v = call.v, call.k
        return super().run(call)


def _stored(name: str, change: Any, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Stores(Honest):
        def stored(self, rows: Floats, dtype: str, scale: float) -> Floats:
            return change(rows, dtype, scale)  # type: ignore[no-any-return]


def _truncated(rows: Floats, dtype: str, scale: float) -> Floats:
    if dtype != "int8":
        return quantise(rows, dtype, scale)
    return np.asarray(np.trunc(rows.astype(np.float32) / scale), np.int8)


def _wrapped(rows: Floats, dtype: str, scale: float) -> Floats:
    if dtype != "int8":
        return quantise(rows, dtype, scale)
    return np.asarray(np.rint(rows.astype(np.float32) / scale).astype(np.int32), np.int8)


def _away_from_zero(rows: Floats, dtype: str, scale: float) -> Floats:
    if dtype not in FINITE_MAX or dtype == "int8":
        return quantise(rows, dtype, scale)
    wide = rows.astype(np.float32) / np.float32(scale)
    limit = FINITE_MAX[dtype]
    larger: Floats = np.clip(wide, -limit, limit) * np.float32(1 + 2**-6)
    return larger.astype(numpy_dtype(dtype))


_stored("int8 by cutting off", _truncated, "int8 cache float32", "int8 cache, scaled")
_stored("int8 without saturation", _wrapped, "int8 cache, scaled")
_stored("fp8 rounded away from zero", _away_from_zero, "float8_e4m3fn cache float32", "float8_e5m2 cache bfloat16")
_stored("scales ignored when writing", lambda rows, dtype, scale: quantise(rows, dtype, 1.0), "int8 cache, scaled")


def _scales(name: str, change: Any, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Scales(Honest):
        def scales(self, spec: AttentionSpec, layer: LayerParameters) -> tuple[float, float]:
            return change(*super().scales(spec, layer))  # type: ignore[no-any-return]


_scales("k_scale ignored when reading", lambda k, v: (1.0, v), "int8 cache, scaled")
_scales("v_scale ignored when reading", lambda k, v: (k, 1.0), "int8 cache, scaled")
_scales("k_scale and v_scale swapped", lambda k, v: (v, k), "float8_e4m3fn cache, scaled")
_scales("k_scale for both", lambda k, v: (k, k), "int8 cache float32")


@impostor("q taken for contiguous", "strided arrays", "strided arrays, decodes", "strided arrays of an encoder")
class Contiguous(Honest):
    """A pointer and a shape."""

    def queries(self, q: Floats) -> Floats:
        item = q.itemsize
        return np.lib.stride_tricks.as_strided(q, q.shape, (q.shape[1] * q.shape[2] * item, q.shape[2] * item, item))


@impostor("a given output taken for contiguous", "out given and strided")
class ContiguousOut(Honest):
    """Written through its base."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        if call.out is not None and call.out.base is not None and not call.out.flags.c_contiguous:
            call.out.base[:, -1] = 0
        return super().returned(call, out, lse)


@impostor("a given output is not the one returned", "out given", "arrays of other libraries, float32")
class OtherOut(Honest):
    """A copy."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        return (out.copy(), lse) if call.return_lse else out.copy()


@impostor("a given output is not written", "out given", "out given, with LSE")
class UnwrittenOut(Honest):
    """The result goes elsewhere."""

    def output(self, call: Call, spec: AttentionSpec) -> Floats:
        return np.empty((call.plan.num_tokens, spec.num_heads, spec.value_head_size), call.q.dtype)


@impostor("padding rows of a given output left as they were", "out given, padding and idle sequences")
class StalePadding(Honest):
    """Rows without keys are skipped."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        if call.out is not None:
            out[np.isneginf(lse)] = np.nan
        return super().returned(call, out, lse)


@impostor("q scaled in place", "decode float32")
class InPlace(Honest):
    """The caller's array."""

    def queries(self, q: Floats) -> Floats:
        q *= q.dtype.type(1.0000002) if q.dtype == np.float32 else q.dtype.type(1)
        return q


@impostor("a cache that is not zeroed", "decode float32", "no tokens")
class Dirty(Honest):
    """Memory as it comes."""

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Any:
        array = super().zeros(shape, dtype, device)
        if len(shape) == 4 and array.size and array.dtype.kind == "f":
            array[-1, -1, -1, -1] = np.nan
        return array


@impostor("blocks copied one by one", "copy_blocks, float32", "copy_blocks, int8")
class OneByOne(Honest):
    """A target is read after it was written."""

    def copy_blocks(self, cache: KVCache, src: Any, dst: Any) -> None:
        for pair in zip(src, dst, strict=True):
            super().copy_blocks(cache, np.array([pair[0]]), np.array([pair[1]]))


@impostor("slots copied as whole blocks", "copy_slots, float32")
class WholeBlocks(Honest):
    """The offset dropped."""

    def copy_slots(self, cache: KVCache, src: Any, dst: Any) -> None:
        size = cache.geometry.block_size
        super().copy_blocks(cache, src // size, dst // size)


@impostor("only keys copied", "copy_blocks, bfloat16", "swap_blocks, float16")
class HalfCopied(Honest):
    """A loop over one array."""

    def copy_blocks(self, cache: KVCache, src: Any, dst: Any) -> None:
        cache.arrays["key"][dst] = cache.arrays["key"][src]

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Any, dst: Any) -> None:
        other.arrays["key"][dst] = cache.arrays["key"][src]


@impostor("blocks swapped to where they were", "swap_blocks, float32")
class SameIds(Honest):
    """The pairs' second half unread."""

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Any, dst: Any) -> None:
        super().swap_blocks(cache, other, src, np.minimum(src, other.num_blocks - 1))


@impostor("blocks gathered in ascending order", "gather, float32")
class Sorted(Honest):
    """Sorted for the memory's sake."""

    def gather(self, cache: KVCache, blocks: Any) -> Any:
        return super().gather(cache, np.sort(blocks))
