"""A batch for FlashInfer: cut into parts, each planned by a wrapper with its lists of pages, and run layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import flashinfer
import numpy as np
import torch

from attn_dispatch.adapters.batch import HostBatch, page_lists
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBatch, PreparedBatch, planning_on
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.contract.dtypes import is_quantised

from .flashinfer_wrappers import Kind, WrapperKey, decode_on_tensor_cores, workspace_of

__all__ = ["InferBatch", "Part", "merge", "parts_of", "plan_arguments"]

_LN2 = math.log(2.0)
_MOST_DRAFTS = 8


class Part(NamedTuple):
    """Neighbouring sequences for one wrapper.

    `kind`: "decode": equally many queries each, `queries`; "prefill": any; "mixed": both, for `BatchAttention`;
    "ragged": keys outside of a cache. `sequences` and `rows` of q: the first, and the last + 1.
    """

    kind: Kind
    sequences: tuple[int, int]
    rows: tuple[int, int]
    queries: int = 1


def parts_of(batch: HostBatch, *, fixed: bool, one_kernel: bool = False, drafts: bool = False) -> list[Part]:
    """Cut a batch into decodes and the rest, where each is one run of neighbours; else it is all one of the rest.

    Args:
        batch: the sequences.
        fixed: of a fixed plan, whose parts have to stay what they are: one.
        one_kernel: a batch of both is one part, mixed (not in a fixed plan: FlashInfer does not say that it can be).
        drafts: sequences with equally many queries, a few, are decodes too.
    """
    count, starts = batch.num_seqs, batch.query_start.tolist()
    lens = np.diff(batch.query_start)
    most = _MOST_DRAFTS if drafts else 1
    uniform = np.where(lens <= most, lens, 0)  # 0: a prefill
    changes = (np.flatnonzero(np.diff(uniform)) + 1).tolist()
    whole = (0, count), (0, starts[-1])
    if changes and one_kernel and not fixed:
        return [Part("mixed", *whole)]
    if len(changes) > 1 or (fixed and changes):
        return [Part("prefill", *whole)]
    return [
        Part("decode" if uniform[a] else "prefill", (a, b), (starts[a], starts[b]), int(uniform[a]) or 1)
        for a, b in pairwise([0, *changes, count] if count else [])
    ]


def plan_arguments(spec: AttentionSpec, part: Part, *arrays: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the `plan` of a part's wrapper is given; lengths stay on the host, where it reads them.

    Args:
        spec: the layers.
        part: of the batch.
        arrays: where each sequence's queries begin i32[s + 1], lengths i32[s], page lists (indptr, indices, last page's
            length); of a ragged part where queries begin, lengths, where keys begin.
    """
    query_start, lens, indptr, *pages = arrays
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_size)
    causal = spec.causal or spec.window[1] == 0
    dtype, stored = getattr(torch, spec.dtype), getattr(torch, spec.kv_cache_dtype if pages else spec.dtype)
    cap = spec.logits_soft_cap or 0.0
    scores: dict[str, Any] = {
        "sm_scale": spec.scale,
        "logits_soft_cap": cap,
        "q_data_type": dtype,
        "kv_data_type": stored,
    }
    if part.kind == "mixed":
        arguments = (query_start, indptr, pages[0], lens, *heads, spec.value_head_size, spec.block_size)
        return arguments, {"causal": causal, **scores}
    scores |= {"o_data_type": dtype, "window_left": spec.window[0]}
    if part.kind == "decode":
        return (indptr, *pages, *heads, spec.block_size), {"q_len_per_req": part.queries, **scores}
    scores |= {"head_dim_vo": spec.value_head_size, "causal": causal}
    return (query_start, indptr, *pages, *heads, *([spec.block_size] if pages else [])), scores


class InferBatch(DeviceBatch):
    """A batch for FlashInfer: its parts, each with a wrapper that has planned it."""

    def __init__(
        self, plan: DevicePlan, device: torch.device, *, paged: bool, layout: str, kernels: str, one_kernel: bool
    ) -> None:
        super().__init__(plan.spec, plan.view, device, paged=paged, max_seq_len=plan.max_seq_len)
        self._layout, spec = layout, plan.spec
        # A decode sees the keys before it: not of what has more queries than keys, and not what sees all keys.
        drafts = (spec.causal or spec.window[1] == 0) and plan.num_new == plan.num_tokens
        drafts = drafts and decode_on_tensor_cores(spec)
        self.parts = parts_of(self.host, fixed=self.fixed, one_kernel=one_kernel and paged, drafts=drafts)
        if not paged:
            self.parts = [part._replace(kind="ragged") for part in self.parts]
        self._workspace = workspace_of(device, graphs=self.fixed)
        room = (self.host.num_seqs, self.host.tables.size) if self.fixed else None
        keys = [WrapperKey(part.kind, spec, layout, kernels, room) for part in self.parts]
        self._wrappers = [self._workspace.lease(key, self) for key in keys]
        self._plan()

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return the lists of pages, in a fixed plan with room for all that may come; and what an append is told."""
        if not self.paged:
            return {}
        spec, lists = self.spec, page_lists(host, self.spec.block_size)
        indices = lists.indices
        if self.fixed:
            indices = np.zeros(host.tables.size, np.int32)
            indices[: len(lists.indices)] = lists.indices
        arrays: Arrays = {"indices": indices, "indptr": lists.indptr, "last_page_len": lists.last_page_len}
        plain = spec.kind == "decoder" and spec.writes_kv and spec.kv_cache_dtype == spec.dtype and not self.fixed
        # FlashInfer appends every row of q's sequences, at the end of each, as it is.
        if plain and host.idle is None and view.side.writes_all and host.num_tokens == view.num_new:
            queries = np.diff(host.query_start)
            sequence = np.repeat(np.arange(host.num_seqs, dtype=np.int32), queries)
            first = host.lens - queries - host.query_start[:-1]
            positions = np.arange(host.num_tokens, dtype=np.int32) + first[sequence]
            arrays |= {"sequence": sequence, "positions": positions.astype(np.int32)}
        return arrays

    def renew(self, prepared: PreparedBatch) -> None:
        """Plan the same wrappers anew: FlashInfer copies into the buffers that were captured."""
        super().renew(prepared)
        with planning_on(self.device):
            self._plan()

    def _plan(self) -> None:
        for part, wrapper in zip(self.parts, self._wrappers, strict=True):
            first, last = part.sequences
            batch = self.host.part(first, last)
            lists = [torch.from_numpy(batch.key_start)]
            if self.paged:
                indptr, last_pages = self.arrays["indptr"][first : last + 1], self.arrays["last_page_len"][first:last]
                pages = self.tensors["indices"][int(indptr[0]) : int(indptr[-1])]
                lists = [torch.from_numpy(indptr - indptr[0]), pages, torch.from_numpy(last_pages)]
            starts = torch.from_numpy(batch.query_start), torch.from_numpy(batch.lens)
            arguments, named = plan_arguments(self.spec, part, *starts, *lists)
            wrapper.plan(*arguments, **named)

    def append(self, call: DeviceCall) -> bool:
        """Write by FlashInfer's kernel, if the batch was prepared for that."""
        tensors, cache = self.tensors, call.cache
        if "positions" not in tensors or cache is None:
            return False
        rows, pair = (tensors["sequence"], tensors["positions"]), (cache.key, cache.value)
        lists = [tensors[name] for name in ("indices", "indptr", "last_page_len")]
        flashinfer.append_paged_kv_cache(call.k, call.v, *rows, pair, *lists, self._layout)
        return True

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, part by part, into one output; the LSE is turned from base 2 into natural."""
        q, out, layer = call.q, call.output(), call.layer
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if call.return_lse else None
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
        scales = scales if self.paged and is_quantised(self.spec.kv_cache_dtype) else {}
        keys = ((call.key, call.value),) if self.paged else (call.key, call.value)
        with self._workspace.running():
            for part, wrapper in zip(self.parts, self._wrappers, strict=True):
                rows = slice(*part.rows)
                named: dict[str, Any] = {"out": out[rows], "lse": None if lse is None else lse[rows], **scales}
                if part.kind == "mixed":
                    named["logits_soft_cap"] = self.spec.logits_soft_cap or 0.0
                else:
                    named["return_lse"] = call.return_lse
                wrapper.run(q[rows], *keys, **named)
        return out, None if lse is None else lse.mul_(_LN2)


def merge(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two results, or more, by one kernel that rounds once; its LSE is of base 2.

    A row that attended to nothing in every part stays 0 with an LSE of -inf: the kernels of 0.7.2 see to that.

    Args:
        states: (out [T, H, D], lse f32[T, H], natural) as `flashinfer.mergeable` accepts them.
    """
    outs = [out.contiguous() for out, _ in states]
    lses = [(lse / _LN2).contiguous() for _, lse in states]
    if len(states) == 2:
        out, lse = flashinfer.merge_state(outs[0], lses[0], outs[1], lses[1])
    else:
        out, lse = flashinfer.merge_states(torch.stack(outs, 1), torch.stack(lses, 1))
    return out, lse.mul_(_LN2)
