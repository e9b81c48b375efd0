"""A cache's memory as rows that can be copied: writing tokens, gathering blocks, widening what is stored narrowly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from threading import get_ident

import torch

from attn_dispatch.contract.dtypes import FINITE_MAX
from attn_dispatch.errors import CacheError

from .step import FoldStep, LongStep, Step

__all__ = ["Side", "Store", "gather"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Side:
    """The keys, or the values, of one cache: [N, K, B, D] seen as rows.

    Attributes:
        dtype: what is stored.
        tokens: [N * K * B, D], one token of one head each; fp8 as bytes, which every device can index.
        blocks: [N * K, B * D], one block of one head each.
        block_size, width: B and D.
    """

    __slots__ = ("block_size", "blocks", "dtype", "tokens", "width")

    def __init__(self, name: str, array: torch.Tensor) -> None:
        if not array.is_contiguous():
            raise CacheError(f"the cache's {name} array has strides {array.stride()}: rows of it cannot be indexed")
        self.dtype: torch.dtype = array.dtype
        self.block_size, self.width = array.shape[2:]
        plain = array.view(torch.uint8) if array.dtype in _FP8 else array
        self.tokens: torch.Tensor = plain.view(-1, self.width)
        self.blocks: torch.Tensor = plain.view(-1, self.block_size * self.width)

    def write(self, step: Step, new: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Store rows [rows, K, D] in the step's slots: round(x / scale), saturated, where the type is quantised."""
        if step.written is not None:
            new = new.index_select(0, step.written)
        if new.dtype != self.dtype:
            new = self._narrowed(new, scale)
        self.tokens.index_copy_(0, step.write_rows, new.reshape(-1, self.width))

    def _narrowed(self, new: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        limit = FINITE_MAX.get(str(self.dtype).removeprefix("torch."))
        if limit is None:
            return new.to(self.dtype)
        wide = new.float()
        if scale is not None:
            # By a tensor: some devices divide by a number as a product with its reciprocal, which rounds otherwise.
            wide = wide / scale
        wide = wide.clamp(-limit, limit)
        if self.dtype == torch.int8:
            return wide.round_().to(self.dtype)
        return wide.to(self.dtype).view(torch.uint8)


class Store:
    """A cache, bound: the two sides of it, and where they are."""

    __slots__ = ("device", "key", "value")

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = Side("key", key), Side("value", value)
        self.device: torch.device = key.device


class _Scratch(threading.local):
    """A thread's memory for gathered keys and values on a CPU: fresh pages from the system cost ten times the copy."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, role: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        size = elements * dtype.itemsize
        buffer = self.buffers.get(role)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[role] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return buffer[:size].view(dtype)


_scratch = _Scratch()


class _Gathered:
    """One side's gathered blocks in a thread's scratch memory, as the views that a call needs."""

    __slots__ = ("picked", "result", "tokens", "widen")

    def __init__(self, role: str, side: Side, call: FoldStep | LongStep, compute: torch.dtype) -> None:
        rows = len(call.index)  # type: ignore[arg-type]  # a call that gathers has one
        elements = rows * side.blocks.shape[1]
        # One element more: bytes are widened in pairs.
        whole = _scratch.take(role, elements + elements % 2, side.blocks.dtype)
        self.picked: torch.Tensor = whole[:elements].view(rows, -1)
        self.widen: Callable[[], object] | None = None
        result = whole
        if side.dtype in _FP8:
            result = _scratch.take(role + " wide", whole.numel(), compute)
            self.widen = _pair_lookup(whole, result, side.dtype, role)
        elif side.dtype != compute:
            result = _scratch.take(role + " wide", whole.numel(), compute)
            self.widen = lambda: result.copy_(whole)
        self.tokens: torch.Tensor = result[:elements].view(-1, side.width)
        self.result: torch.Tensor = _shaped(self.tokens, call)

    def fill(self, side: Side, call: FoldStep | LongStep) -> torch.Tensor:
        torch.index_select(side.blocks, 0, call.index, out=self.picked)
        if self.widen is not None:
            self.widen()
        if call.blank is not None:
            self.tokens.index_fill_(0, call.blank, 0)
        return self.result


def _shaped(tokens: torch.Tensor, call: FoldStep | LongStep) -> torch.Tensor:
    """Return gathered tokens [rows * B, D] as a call wants them: [*shape, L, D]."""
    shaped = tokens.view(*call.shape, -1, tokens.shape[-1])
    return shaped if call.end is None else shaped[..., call.begin : call.end, :]


def _pair_lookup(stored: torch.Tensor, result: torch.Tensor, dtype: torch.dtype, role: str) -> Callable[[], object]:
    """Return what widens fp8 bytes: two at a time through a table of 65536, a tenth of what torch's cast costs."""
    table = _pairs(dtype, result.dtype)
    pairs, wide = stored.view(torch.uint16), result.view(table.dtype)
    index = _scratch.take(role + " index", pairs.numel(), torch.int32)

    def widen() -> None:
        index.copy_(pairs)
        torch.index_select(table, 0, index, out=wide)

    return widen


@cache
def _pairs(dtype: torch.dtype, wide: torch.dtype) -> torch.Tensor:
    """Return what each two bytes stand for, as one element of twice the width of `wide`."""
    with torch.inference_mode(False):
        every = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.uint8).view(dtype)
        double = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[wide.itemsize]
        return every.to(wide).view(double)


def gather(step: Step, call: FoldStep | LongStep, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys [*call.shape, L, D] and the values of a call, in the type that is computed with.

    On a CPU they lie in the thread's scratch memory, until its next call.
    """
    if not step.cpu:
        return _copied(step, store.key, call), _copied(step, store.value, call)
    views = call.views.get(get_ident())
    if views is None:
        with torch.inference_mode(False):
            views = call.views[get_ident()] = (
                _Gathered("key", store.key, call, step.compute),
                _Gathered("value", store.value, call, step.compute),
            )
    key, value = views
    return key.fill(store.key, call), value.fill(store.value, call)


def _copied(step: Step, side: Side, call: FoldStep | LongStep) -> torch.Tensor:
    picked = side.blocks.index_select(0, call.index)
    if side.dtype in _FP8:
        picked = picked.view(side.dtype)
    tokens = picked.to(step.compute).view(-1, side.width)
    if call.blank is not None:
        tokens.index_fill_(0, call.blank, 0)
    return _shaped(tokens, call)
