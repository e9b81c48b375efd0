"""IPEX's CPU ops, called so that none of their faults can be reached. Imports torch and IPEX.

What the ops take on trust, and what is therefore done here:
- tables, lengths and slots are int32 and contiguous (others are read as if they were);
- no slot is -1 (the process aborts), no sequence is empty (NaN), no slot is beyond int32;
- the heads of a query lie together, and so do its elements (strides of the two are ignored);
- float32 is rounded to fp8 twice on its way into the cache, and too large numbers become infinity: torch stores fp8.

With four or more leading sequences that share their first block (a shared prefix) the decode op takes them for a beam
search and chooses a kernel that always raises "Sliding window unsupported". The environment variable
PAGED_ATTENTION_SINGLE_QUERY_KERNEL=1, read by the op at each call, names the other kernel. It is set for the process
when this module is imported, and again by each batch should somebody have changed it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBatch
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import CacheError

from .availability import INSTALL_CPU, load
from .paged_cpu_batch import DecodeGroup, PrefillGroup, cacheless_tables, cut, usable_ops

__all__ = ["PagedCpuBatch", "attend", "write"]

_PAGED: Any = load("intel_extension_for_pytorch", INSTALL_CPU).llm.modules.PagedAttention
_KERNEL, _FLASH_DECODING = "PAGED_ATTENTION_SINGLE_QUERY_KERNEL", "1"
_SLOT_LIMIT = 1 << 31
_CACHELESS_BLOCK = 128
"""Block size of the pages that keys and values without a cache are put into."""

_NO_MAPPING = torch.zeros(1, dtype=torch.int32)
"""Which kv head a query head reads: an argument that the decode op ignores."""


def _pin_kernel() -> None:
    if os.environ.get(_KERNEL) != _FLASH_DECODING:
        os.environ[_KERNEL] = _FLASH_DECODING


_pin_kernel()


@dataclass(frozen=True, eq=False, slots=True)
class _Group:
    """Sequences for one op: their rows of q, and their tensors by name."""

    rows: slice | torch.Tensor
    tensors: dict[str, torch.Tensor]
    group: Any


class PagedCpuBatch(DeviceBatch):
    """The step's batch, cut up for the two ops; without a cache, over pages of its own.

    Attributes:
        decode: what the decode op is given (None: nothing).
        prefill: what the prefill op is given (None: nothing).
        slots: i32[rows that are written].
        page_shape: of pages for keys that are in no cache.
    """

    def __init__(self, spec: AttentionSpec, view: BatchView, device: torch.device, *, paged: bool) -> None:
        _pin_kernel()
        self._groups: dict[str, DecodeGroup | PrefillGroup] = {}
        self.page_shape = (0, spec.num_kv_heads, _CACHELESS_BLOCK, spec.head_size)
        super().__init__(spec, view, device, paged=paged)
        self.slots = self.tensors["slots"]
        self.decode, self.prefill = self._group("decode"), self._group("prefill")

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return the arrays of both groups, and the slots as the writing op takes them."""
        spec, side = self.spec, view.side
        if self.paged:
            if side.num_written and (side.highest_block + 1) * spec.block_size > _SLOT_LIMIT:
                raise CacheError(
                    f"block {side.highest_block} of {spec.block_size} tokens: slots of {_SLOT_LIMIT} and more do not "
                    f"fit IPEX's 32-bit slots. Use blocks below {_SLOT_LIMIT // spec.block_size}"
                )
            tables, size, stored = host.tables, spec.block_size, spec.kv_cache_dtype
            slots = side.slots[side.slots >= 0].astype(np.int32)
        else:
            size, stored = _CACHELESS_BLOCK, spec.dtype
            tables, slots, num_blocks = cacheless_tables(host, size)
            self.page_shape = (num_blocks, *self.page_shape[1:])
        groups = zip(("decode", "prefill"), cut(spec, host, tables, size, usable_ops(spec, size, stored)), strict=True)
        self._groups = {name: group for name, group in groups if group is not None}
        arrays = {
            f"{op}_{name}": array
            for op, group in self._groups.items()
            for name, array in vars(group).items()
            if isinstance(array, np.ndarray)
        }
        return arrays | {"slots": slots}

    def _group(self, op: str) -> _Group | None:
        group = self._groups.get(op)
        if group is None:
            return None
        tensors = {name: self.tensors[f"{op}_{name}"] for name in vars(group) if f"{op}_{name}" in self.tensors}
        return _Group(tensors.get("rows", group.rows), tensors, group)


def write(call: DeviceCall) -> None:
    """Store the new keys and values: by IPEX's op in the layer's own type, by torch in fp8."""
    batch, cache, k, v = call.batch, call.cache, call.k, call.v
    assert cache is not None
    assert k is not None
    assert v is not None
    if cache.dtype != k.dtype:
        cache.write(batch.writes, k, v, call.layer)
        return
    rows = batch.writes.rows
    if rows is not None:
        k, v = k.index_select(0, rows), v.index_select(0, rows)
    _PAGED.reshape_and_cache(k, v, cache.key, cache.value, batch.slots)


def attend(call: DeviceCall) -> torch.Tensor:
    """Attend; return the output [T, H, D]."""
    batch, out = call.batch, call.output()
    if call.cache is None:
        key, value = (call.key.new_empty(batch.page_shape) for _ in range(2))
        _PAGED.reshape_and_cache(call.k, call.v, key, value, batch.slots)
    else:
        key, value = call.key, call.value
    q = call.q if call.q.stride(1) == call.q.shape[2] else call.q.contiguous()
    for group, op in ((batch.decode, _decode), (batch.prefill, _prefill)):
        if group is None:
            continue
        if isinstance(group.rows, slice):
            op(call, group, q[group.rows], key, value, out[group.rows])
        else:
            part = out.new_empty((len(group.rows), *out.shape[1:]))
            op(call, group, q.index_select(0, group.rows), key, value, part)
            out.index_copy_(0, group.rows, part)
    if key.dtype != q.dtype and call.layer.v_scale != 1:
        out.mul_(call.layer.v_scale)
    return out


def _decode(call: DeviceCall, group: _Group, q: Any, key: Any, value: Any, out: Any) -> None:
    spec, tensors = call.spec, group.tensors
    _PAGED.single_query_cached_kv_attention(
        out,
        q,
        key,
        value,
        _NO_MAPPING,
        _scale(call, key),
        tensors["tables"],
        tensors["lens"],
        key.shape[2],
        group.group.max_keys,
        call.layer.slopes,
        window_size=spec.window[0] + 1 if spec.window[0] >= 0 else -1,  # of tokens, the query's own included
        softcap=spec.logits_soft_cap or -1.0,
    )


def _prefill(call: DeviceCall, group: _Group, q: Any, key: Any, value: Any, out: Any) -> None:
    spec, tensors = call.spec, group.tensors
    _PAGED.flash_attn_varlen_func(
        out,
        q,
        key,
        value,
        tensors["query_start"],
        tensors["key_start"],
        group.group.max_query,
        group.group.max_keys,
        _scale(call, key),
        spec.causal,
        tensors["tables"],
        None,
        window_size_left=spec.window[0],  # of tokens before the query's own
        window_size_right=spec.window[1],
        kv_cache_dtype="auto" if key.dtype == q.dtype else "fp8_e5m2",
        softcap=spec.logits_soft_cap or -1.0,
    )


def _scale(call: DeviceCall, key: torch.Tensor) -> float:
    """Return the softmax's scale, with the keys' where they are quantised: the ops ignore scales of a cache."""
    return call.spec.scale if key.dtype == call.q.dtype else call.spec.scale * call.layer.k_scale
