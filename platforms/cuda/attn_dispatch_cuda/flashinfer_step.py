"""FlashInfer's wrappers: leased, planned with a batch's lists of pages, and run layer by layer.

A wrapper owns memory (8 MB on the device, 8 MB pinned) and one plan. Plans of ours lease wrappers and give them back
when they are gone. The float workspace is one per device: a device's layers run one after the other, on one stream.
"""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import flashinfer
import numpy as np
import torch

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.contract.dtypes import is_quantised

from .batch import Batch, Csr, page_lists, part_of
from .flashinfer import decode_kernel
from .layer import Owned
from .step import Arrays, Step
from .store import Store

__all__ = ["InferStep", "Part", "decode_arguments", "forget", "parts_of", "prefill_arguments", "ragged_arguments"]

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends; zeroed, as its first use wants it."""

_LN2 = math.log(2.0)


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences for one wrapper.

    Attributes:
        decode: each has one query.
        sequences: first and last + 1.
        rows: first and last + 1 of q.
    """

    decode: bool
    sequences: tuple[int, int]
    rows: tuple[int, int]


def parts_of(batch: Batch, *, fixed: bool) -> list[Part]:
    """Cut a batch into decodes and the rest, where each is one run of neighbours; else it is one of the rest."""
    count, rows = batch.num_seqs, batch.num_tokens
    if not count:
        return []
    single = np.diff(batch.query_start) == 1
    changes = np.flatnonzero(np.diff(single)) + 1
    if len(changes) > 1 or (fixed and len(changes)):
        return [Part(False, (0, count), (0, rows))]
    bounds = [0, *changes.tolist(), count]
    starts = batch.query_start
    return [Part(bool(single[a]), (a, b), (int(starts[a]), int(starts[b]))) for a, b in pairwise(bounds)]


def _window(spec: AttentionSpec) -> tuple[bool, int]:
    """Return whether the right side is closed at the query, and the left side."""
    return spec.causal or spec.window[1] == 0, spec.window[0]


def _types(spec: AttentionSpec, paged: bool) -> dict[str, Any]:
    stored = spec.kv_cache_dtype if paged else spec.dtype
    return {
        "q_data_type": getattr(torch, spec.dtype),
        "kv_data_type": getattr(torch, stored),
        "o_data_type": getattr(torch, spec.dtype),
        "sm_scale": spec.scale,
        "logits_soft_cap": spec.logits_soft_cap or 0.0,
        "window_left": _window(spec)[1],
    }


def decode_arguments(spec: AttentionSpec, csr: dict[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `BatchDecodeWithPagedKVCacheWrapper.plan` is given; lengths stay on the host, where it reads them."""
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_size, spec.block_size)
    return (csr["indptr"], csr["indices"], csr["last_page_len"], *heads), _types(spec, True)


def prefill_arguments(
    spec: AttentionSpec, query_start: torch.Tensor, csr: dict[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `BatchPrefillWithPagedKVCacheWrapper.plan` is given."""
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_size, spec.block_size)
    pages = (csr["indptr"], csr["indices"], csr["last_page_len"])
    return (query_start, *pages, *heads), {
        "head_dim_vo": spec.value_head_size,
        "causal": _window(spec)[0],
        **_types(spec, True),
    }


def ragged_arguments(
    spec: AttentionSpec, query_start: torch.Tensor, key_start: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `BatchPrefillWithRaggedKVCacheWrapper.plan` is given: keys outside of a cache."""
    return (query_start, key_start, spec.num_heads, spec.num_kv_heads, spec.head_size), {
        "head_dim_vo": spec.value_head_size,
        "causal": _window(spec)[0],
        **_types(spec, False),
    }


class InferStep(Step):
    """A batch for FlashInfer: its parts, each with a wrapper that has planned it."""

    def __init__(
        self,
        spec: AttentionSpec,
        view: BatchView,
        device: torch.device,
        *,
        paged: bool,
        capacity: int | None,
        layout: str,
        kernels: str,
    ) -> None:
        self._csr = Csr(*(np.zeros(0, np.int32) for _ in range(3)))
        self.layout = layout
        self.kernels = kernels
        self._planned: list[tuple[Part, Any]] = []
        super().__init__(spec, view, device, paged=paged, capacity=capacity)

    def more(self, batch: Batch, view: BatchView) -> Arrays:
        """The lists of pages; of a fixed plan with room for all that may come."""
        if not self.paged:
            return {}
        csr = self._csr = page_lists(batch.lens, batch.tables, self.spec.block_size)
        indices = csr.indices
        if self.fixed:
            indices = np.zeros(batch.tables.size, np.int32)
            indices[: len(csr.indices)] = csr.indices
        arrays: Arrays = {"indices": indices}
        if self._appends(batch, view):
            queries = np.diff(batch.query_start)
            sequence = np.repeat(np.arange(batch.num_seqs, dtype=np.int32), queries)
            first = batch.lens - queries - batch.query_start[:-1]
            positions = np.arange(batch.num_tokens, dtype=np.int32) + first[sequence]
            arrays |= {"sequence": sequence, "positions": positions.astype(np.int32)}
            arrays |= {"indptr": csr.indptr, "last_page_len": csr.last_page_len}
        return arrays

    def _appends(self, batch: Batch, view: BatchView) -> bool:
        """Whether what is written fits FlashInfer's model: every row, at the end of its sequence, as it is."""
        spec = self.spec
        plain = spec.kind == "decoder" and spec.writes_kv and spec.kv_cache_dtype == spec.dtype
        return plain and not self.fixed and batch.idle is None and view.pages.writes_all

    def write(self, store: Store, k: torch.Tensor, v: torch.Tensor, owned: Owned) -> None:
        """By FlashInfer's one kernel for keys and values where its model fits."""
        named = self._tensors
        if "positions" not in named:
            super().write(store, k, v, owned)
            return
        flashinfer.append_paged_kv_cache(
            k,
            v,
            named["sequence"],
            named["positions"],
            (store.key, store.value),
            named["indices"],
            named["indptr"],
            named["last_page_len"],
            self.layout,
        )

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        """Lease wrappers and plan them."""
        self._tensors = tensors
        for part in parts_of(self.batch, fixed=self.fixed):
            wrapper = self._fixed_wrapper(part) if self.fixed else _leased(self, self._key(part), part)
            self._planned.append((part, wrapper))
        self._plan()

    def rebound(self) -> None:
        """Plan the same wrappers anew: FlashInfer copies into the buffers that were captured."""
        self._plan()

    def _key(self, part: Part) -> tuple[Any, ...]:
        kind = "ragged" if not self.paged else "decode" if part.decode else "prefill"
        return (self.device, kind, self.spec, self.layout, self.kernels)

    def _plan(self) -> None:
        for part, wrapper in self._planned:
            some = part_of(self.batch, *part.sequences)
            queries = torch.from_numpy(some.query_start)
            if not self.paged:
                given = ragged_arguments(self.spec, queries, torch.from_numpy(some.key_start))
            else:
                first, last = part.sequences
                indptr = self._csr.indptr[first : last + 1]
                lists = {
                    "indptr": torch.from_numpy(indptr - indptr[0]),
                    "indices": self._tensors["indices"][int(indptr[0]) : int(indptr[-1])],
                    "last_page_len": torch.from_numpy(self._csr.last_page_len[first:last]),
                }
                given = decode_arguments(self.spec, lists)
                if not part.decode:
                    given = prefill_arguments(self.spec, queries, lists)
            wrapper.plan(*given[0], **given[1])
            _mark(self.device, wrapper)

    def _fixed_wrapper(self, part: Part) -> Any:
        """Return a wrapper whose buffers stay; it is not given back."""
        count, room = self.batch.num_seqs, self.batch.tables.size

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self.device)

        work = workspace(self.device)
        if part.decode:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                work,
                self.layout,
                use_cuda_graph=True,
                use_tensor_cores=decode_kernel(self.spec.group_size),
                paged_kv_indptr_buffer=zeros(count + 1),
                paged_kv_indices_buffer=zeros(room),
                paged_kv_last_page_len_buffer=zeros(count),
                backend="fa2",
            )
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            work,
            self.layout,
            use_cuda_graph=True,
            qo_indptr_buf=zeros(count + 1),
            paged_kv_indptr_buf=zeros(count + 1),
            paged_kv_indices_buf=zeros(room),
            paged_kv_last_page_len_buf=zeros(count),
            backend="fa2" if is_quantised(self.spec.kv_cache_dtype) else self.kernels,
        )

    def run(
        self,
        q: torch.Tensor,
        pair: tuple[torch.Tensor | None, torch.Tensor | None],
        owned: Owned,
        out: torch.Tensor | None,
        *,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, part by part, into one output; the LSE is turned from base 2 into natural."""
        spec = self.spec
        if out is None:
            out = q.new_empty((q.shape[0], spec.num_heads, spec.value_head_size))
        lse = q.new_empty((q.shape[0], spec.num_heads), dtype=torch.float32) if wants_lse else None
        scales = {}
        if self.paged and is_quantised(spec.kv_cache_dtype):
            scales = {"k_scale": owned.k_scale, "v_scale": owned.v_scale}
        with _running:
            for part, wrapper in self._planned:
                rows = slice(*part.rows)
                given = {"out": out[rows], "lse": None if lse is None else lse[rows], "return_lse": wants_lse, **scales}
                if self.paged:
                    wrapper.run(q[rows], pair, **given)
                else:
                    wrapper.run(q[rows], *pair, **given)
        return out, None if lse is None else lse.mul_(_LN2)


_running = threading.Lock()
"""Two threads' kernels on one stream must not come between each other: they share a workspace."""
_lock = threading.Lock()
_workspaces: dict[torch.device, torch.Tensor] = {}
_free: dict[tuple[Any, ...], list[Any]] = {}
_planned_at: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def workspace(device: torch.device) -> torch.Tensor:
    """Return the device's workspace, made once."""
    with _lock:
        found = _workspaces.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return found


def _leased(step: InferStep, key: tuple[Any, ...], part: Part) -> Any:
    """Return a wrapper that no living plan has, to be given back when the step is gone."""
    with _lock:
        ready = _free.setdefault(key, [])
        at = next((i for i, wrapper in enumerate(ready) if _copied(wrapper)), None)
        wrapper = None if at is None else ready.pop(at)
    if wrapper is None:
        wrapper = _made(step, key[1])
    weakref.finalize(step, _give_back, key, wrapper)
    return wrapper


def _give_back(key: tuple[Any, ...], wrapper: Any) -> None:
    """Without the lock: this runs whenever a step happens to be collected, also while the lock is held."""
    _free[key].append(wrapper)


def forget(device: torch.device) -> None:
    """Drop a device's workspace and the wrappers that no plan has."""
    with _lock:
        _workspaces.pop(device, None)
        for key, ready in _free.items():
            if key[0] == device:
                ready.clear()


def _made(step: InferStep, kind: str) -> Any:
    work = workspace(step.device)
    if kind == "decode":
        tensor_cores = decode_kernel(step.spec.group_size)
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            work, step.layout, use_tensor_cores=tensor_cores, backend="fa2"
        )
    kernels = "fa2" if is_quantised(step.spec.kv_cache_dtype) else step.kernels
    if kind == "ragged":
        return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(work, "NHD", backend=step.kernels)
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(work, step.layout, backend=kernels)


def _mark(device: torch.device, wrapper: Any) -> None:
    """Remember when the wrapper's pinned memory will have been read: until then it cannot plan another batch."""
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record()
        _planned_at[wrapper] = event


def _copied(wrapper: Any) -> bool:
    event = _planned_at.get(wrapper)
    return event is None or bool(event.query())
