"""A batch for FlashInfer: cut into parts, each planned by a wrapper with its lists of pages, and run layer by layer."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import flashinfer
import numpy as np
import torch

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.contract.dtypes import is_quantised

from .batch import Batch, Csr, page_lists, part_of
from .flashinfer_wrappers import Making, fixed, leased, mark
from .layer import Owned
from .step import Arrays, Step
from .store import Store

__all__ = [
    "InferStep",
    "Part",
    "decode_arguments",
    "mixed_arguments",
    "parts_of",
    "prefill_arguments",
    "ragged_arguments",
]

_LN2 = math.log(2.0)

_running = threading.Lock()
"""Two threads' kernels on one stream must not come between each other: they share a workspace."""


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences for one wrapper.

    Attributes:
        kind: "decode": each has one query; "prefill": any; "mixed": both, for `BatchAttention`.
        sequences: first and last + 1.
        rows: first and last + 1 of q.
    """

    kind: Literal["decode", "prefill", "mixed"]
    sequences: tuple[int, int]
    rows: tuple[int, int]


def parts_of(batch: Batch, *, fixed: bool, one_kernel: bool = False) -> list[Part]:
    """Cut a batch into decodes and the rest, where each is one run of neighbours; else it is one of the rest.

    Args:
        batch: the sequences.
        fixed: of a fixed plan, whose parts have to stay what they are: one.
        one_kernel: a batch with both is one part, mixed (not of a fixed plan: FlashInfer does not say that
            BatchAttention can be captured).
    """
    count, rows = batch.num_seqs, batch.num_tokens
    if not count:
        return []
    single = np.diff(batch.query_start) == 1
    changes = np.flatnonzero(np.diff(single)) + 1
    if len(changes) and one_kernel and not fixed:
        return [Part("mixed", (0, count), (0, rows))]
    if len(changes) > 1 or (fixed and len(changes)):
        return [Part("prefill", (0, count), (0, rows))]
    bounds = [0, *changes.tolist(), count]
    starts = batch.query_start
    return [
        Part("decode" if single[a] else "prefill", (a, b), (int(starts[a]), int(starts[b])))
        for a, b in pairwise(bounds)
    ]


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


def mixed_arguments(
    spec: AttentionSpec, query_start: torch.Tensor, lens: torch.Tensor, csr: dict[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `BatchAttention.plan` is given; it takes no window, and lengths instead of the last pages'."""
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_size, spec.value_head_size, spec.block_size)
    return (query_start, csr["indptr"], csr["indices"], lens, *heads), {
        "causal": _window(spec)[0],
        "sm_scale": spec.scale,
        "logits_soft_cap": spec.logits_soft_cap or 0.0,
        "q_data_type": getattr(torch, spec.dtype),
        "kv_data_type": getattr(torch, spec.kv_cache_dtype),
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
        one_kernel: bool = False,
    ) -> None:
        self._csr = Csr(*(np.zeros(0, np.int32) for _ in range(3)))
        self.layout = layout
        self.kernels = kernels
        self.one_kernel = one_kernel and paged
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
        return plain and not self.fixed and batch.idle is None and view.side.writes_all

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
        room = self.batch.tables.size
        for part in parts_of(self.batch, fixed=self.fixed, one_kernel=self.one_kernel):
            kind = part.kind if self.paged else "ragged"
            made = Making(kind, self.device, self.spec, self.layout, self.kernels)
            wrapper = fixed(made, self.batch.num_seqs, room) if self.fixed else leased(made, self)
            self._planned.append((part, wrapper))
        self._plan()

    def rebound(self) -> None:
        """Plan the same wrappers anew: FlashInfer copies into the buffers that were captured."""
        self._plan()

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
                if part.kind == "decode":
                    given = decode_arguments(self.spec, lists)
                elif part.kind == "prefill":
                    given = prefill_arguments(self.spec, queries, lists)
                else:
                    given = mixed_arguments(self.spec, queries, torch.from_numpy(some.lens), lists)
            wrapper.plan(*given[0], **given[1])
            mark(self.device, wrapper)

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
        scales: dict[str, float] = {}
        if self.paged and is_quantised(spec.kv_cache_dtype):
            scales = {"k_scale": owned.k_scale, "v_scale": owned.v_scale}
        with _running:
            for part, wrapper in self._planned:
                rows = slice(*part.rows)
                given = {"out": out[rows], "lse": None if lse is None else lse[rows], **scales}
                if part.kind == "mixed":
                    wrapper.run(q[rows], pair, **given, logits_soft_cap=spec.logits_soft_cap or 0.0)
                    continue
                given["return_lse"] = wants_lse
                if self.paged:
                    wrapper.run(q[rows], pair, **given)
                else:
                    wrapper.run(q[rows], *pair, **given)
        return out, None if lse is None else lse.mul_(_LN2)
