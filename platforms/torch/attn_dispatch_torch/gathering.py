"""A cache's memory as rows that can be copied: writing tokens, gathering blocks, widening what is stored narrowly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from threading import get_ident

import torch

from attn_dispatch.adapters.torch.cache_tensors import FP8, as_bytes, round_to
from attn_dispatch.errors import CacheError

from .launch_plan import DecodeLaunch, LaunchPlan, PrefillLaunch

__all__ = ["CacheRows", "TokenRows", "gather"]


class TokenRows:
    """The keys, or the values, of one cache: [N, K, B, D] as rows.

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
        elements = as_bytes(array)
        self.tokens: torch.Tensor = elements.view(-1, self.width)
        self.blocks: torch.Tensor = elements.view(-1, self.block_size * self.width)

    def write(self, launch: LaunchPlan, new: torch.Tensor, scale: torch.Tensor | None) -> None:
        """CacheRows rows [rows, K, D] in the step's slots: round(x / scale), saturated, where the type is quantised."""
        if launch.written is not None:
            new = new.index_select(0, launch.written)
        if new.dtype != self.dtype:
            new = as_bytes(round_to(new, self.dtype, scale))
        self.tokens.index_copy_(0, launch.write_rows, new.reshape(-1, self.width))


class CacheRows:
    """A cache's keys and values as rows, and where they are."""

    __slots__ = ("device", "key", "value")

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = TokenRows("key", key), TokenRows("value", value)
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

    def __init__(self, role: str, side: TokenRows, call: DecodeLaunch | PrefillLaunch, compute: torch.dtype) -> None:
        rows = len(call.index)  # type: ignore[arg-type]  # a call that gathers has one
        elements = rows * side.blocks.shape[1]
        # One element more: bytes are widened in pairs.
        whole = _scratch.take(role, elements + elements % 2, side.blocks.dtype)
        self.picked: torch.Tensor = whole[:elements].view(rows, -1)
        self.widen: Callable[[], object] | None = None
        result = whole
        if side.dtype in FP8:
            result = _scratch.take(role + " wide", whole.numel(), compute)
            self.widen = _pair_lookup(whole, result, side.dtype, role)
        elif side.dtype != compute:
            result = _scratch.take(role + " wide", whole.numel(), compute)
            self.widen = lambda: result.copy_(whole)
        self.tokens: torch.Tensor = result[:elements].view(-1, side.width)
        self.result: torch.Tensor = _shaped(self.tokens, call)

    def fill(self, side: TokenRows, call: DecodeLaunch | PrefillLaunch) -> torch.Tensor:
        torch.index_select(side.blocks, 0, call.index, out=self.picked)
        if self.widen is not None:
            self.widen()
        if call.blank is not None:
            self.tokens.index_fill_(0, call.blank, 0)
        return self.result


def _shaped(tokens: torch.Tensor, call: DecodeLaunch | PrefillLaunch) -> torch.Tensor:
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


def gather(
    launch: LaunchPlan, call: DecodeLaunch | PrefillLaunch, cache: CacheRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys [*call.shape, L, D] and the values of a call, in the type that is computed with.

    On a CPU they lie in the thread's scratch memory, until its next call.
    """
    if not launch.cpu:
        return _copied(launch, cache.key, call), _copied(launch, cache.value, call)
    views = call.views.get(get_ident())
    if views is None:
        with torch.inference_mode(False):
            views = call.views[get_ident()] = (
                _Gathered("key", cache.key, call, launch.compute),
                _Gathered("value", cache.value, call, launch.compute),
            )
    key, value = views
    return key.fill(cache.key, call), value.fill(cache.value, call)


def _copied(launch: LaunchPlan, side: TokenRows, call: DecodeLaunch | PrefillLaunch) -> torch.Tensor:
    picked = side.blocks.index_select(0, call.index)
    if side.dtype in FP8:
        picked = picked.view(side.dtype)
    tokens = picked.to(launch.compute).view(-1, side.width)
    if call.blank is not None:
        tokens.index_fill_(0, call.blank, 0)
    return _shaped(tokens, call)
