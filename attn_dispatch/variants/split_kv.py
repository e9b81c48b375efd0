"""`SplitKV`: a long context in parts that can be computed side by side (FlashDecoding).

One decode with few heads leaves most of a processor idle. Here its context is cut into parts, each a sequence of its
own (so that the backend's own parallelism over sequences applies), and the partial results are merged by their LSE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch.dispatch import choose
from attn_dispatch.errors import MetadataError, SpecError
from attn_dispatch.variants.pieces import shifted
from attn_dispatch.variants.rows import concatenate, put
from attn_dispatch.variants.variant import (
    Group,
    LayerOptions,
    Pass,
    Variant,
    VariantCall,
    VariantPlan,
    is_scaled,
    refuse_fields,
    scales_of,
)

__all__ = ["SplitKV", "SplitPlan"]


@dataclass(frozen=True, eq=False)
class SplitPlan(VariantPlan):
    """A step in parts.

    Attributes:
        parts: of the longest context, the last one apart.
    """

    parts: int = 0


class SplitKV(Variant):
    """A decoder layer that attends to its context in parts.

    Attributes:
        part_blocks: blocks of a part.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        part_blocks: int,
        backend: str | Backend | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        """Choose a backend for the layer.

        Args:
            spec: a causal decoder without a window.
            part_blocks: blocks of a part, 1 or more.
            backend: the one to use (strict); None: chosen. It has to return the log-sum-exp.
            options: sinks, k_scale, v_scale: see `ad.attention`.

        Raises:
            SpecError: a field that means nothing here, or no blocks.
            NoBackendError: no backend runs the passes.
        """
        self.spec = spec
        refuse_fields("SplitKV", replace(spec, kind="decoder"), "window", "alibi", "causal")
        if part_blocks < 1:
            raise SpecError(f"part_blocks={part_blocks} must be 1 or more")
        self.part_blocks = part_blocks
        last = replace(spec, returns_lse=True)
        part = replace(last, causal=False, sinks=False, writes_kv=False)
        scaled = is_scaled(options)
        self.backend = choose([last, part], backend, scaled=scaled, purpose="SplitKV")
        scales = scales_of(options)
        self._last = attention(last, self.backend, **options)
        self._part = attention(part, self.backend, **scales)
        self._cache_attn = self._last

    def plan(self, batch: AttentionMetadata) -> SplitPlan:
        """Prepare a step.

        Raises:
            MetadataError: the batch has another block size.
        """
        spec, view = self.spec, batch.view("decoder")
        size = spec.block_size
        if batch.block_size != size:
            raise MetadataError(f"the batch has block_size={batch.block_size}, the layer {size}")
        table, new = view.side.table, view.query_lens
        context = np.maximum(view.kv_lens - new, 0).astype(np.int64)
        # The last part has the new tokens and is never empty; the others are of full blocks before them.
        parts = np.maximum(-(-context // (size * self.part_blocks)) - 1, 0)
        begun = parts * self.part_blocks
        every = np.arange(view.num_seqs)
        lens = (view.kv_lens - begun * size).astype(np.int32)
        own = AttentionMetadata(
            query_start_loc=view.query_start_loc,
            seq_lens=lens,
            block_table=shifted(table, every, begun, -(-lens // size)),
            slot_mapping=view.side.slots,
            block_size=size,
            shared_writes=True,  # asked of the whole batch already
        )
        passes = [Pass(self._last, self._last.plan(own), writes=True)]
        most = int(parts.max(initial=0))
        if most:
            # Part i of every sequence, then part i + 1: each part's rows are all the rows, in order.
            number = np.repeat(np.arange(most), view.num_seqs)
            sequence = np.tile(every, most)
            there = number < parts[sequence]
            blocks = np.where(there, self.part_blocks, 0)
            pages = shifted(table, sequence, number * self.part_blocks, blocks)
            together = AttentionMetadata.read_only(np.tile(new, most), blocks * size, pages, size)
            passes.append(Pass(self._part, self._part.plan(together)))
        return SplitPlan(
            spec=spec,
            num_tokens=view.num_tokens,
            groups=(Group(tuple(passes)),),
            highest_block=view.side.highest_block,
            parts=most,
        )

    def _attend(self, call: VariantCall) -> Any:
        plan, (q,), passes = call.plan, call.queries, call.plan.groups[0].passes
        states = [passes[0].attn.run(passes[0].plan, q, call.k, call.v, call.cache, return_lse=True)]
        if plan.parts:
            rows = concatenate([q] * plan.parts, 0)
            parts, lse = passes[1].attn.run(passes[1].plan, rows, None, None, call.cache, return_lse=True)
            tokens = plan.num_tokens
            states += [(parts[i : i + tokens], lse[i : i + tokens]) for i in range(0, plan.parts * tokens, tokens)]
        result, total = self.backend.merge_states(states)
        result = result if call.out is None else put(call.out, None, result)
        return (result, total) if call.return_lse else result
