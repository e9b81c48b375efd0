"""`Cascade`: sequences that begin with the same blocks read them once, together.

A plain step reads a prefix that S sequences share S times. Here their queries, side by side, attend to it as one
sequence, each attends to the rest of its own, and the two are merged (Ye et al., cascade inference; Juravsky et al.,
Hydragen, arXiv 2402.05099).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, BatchView
from attn_dispatch.dispatch import choose
from attn_dispatch.errors import MetadataError
from attn_dispatch.variants.pieces import I64, shifted
from attn_dispatch.variants.variant import (
    Group,
    LayerOptions,
    Pass,
    Variant,
    VariantPlan,
    is_scaled,
    refuse_fields,
    scales_of,
)

__all__ = ["Cascade"]


class Cascade(Variant):
    """A decoder layer whose steps look for shared blocks in their own block tables."""

    def __init__(
        self,
        spec: AttentionSpec,
        backend: str | Backend | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        """Choose a backend for the layer.

        Args:
            spec: a causal decoder without a window.
            backend: the one to use (strict); None: chosen. It has to return the log-sum-exp.
            options: sinks, k_scale, v_scale: see `ad.attention`.

        Raises:
            SpecError: a field that means nothing here.
            NoBackendError: no backend runs the passes.
        """
        self.spec = spec
        refuse_fields("Cascade", replace(spec, kind="decoder"), "window", "alibi", "causal")
        own = replace(spec, returns_lse=True)
        # The sink counts once: with each sequence's own part.
        shared = replace(own, causal=False, sinks=False, writes_kv=False)
        scaled = is_scaled(options)
        self.backend = choose([own, shared], backend, scaled=scaled, purpose="Cascade")
        scales = scales_of(options)
        self._own = attention(own, self.backend, **options)
        self._shared = attention(shared, self.backend, **scales)
        self._cache_attn = self._own

    def plan(self, batch: AttentionMetadata) -> VariantPlan:
        """Prepare a step: neighbouring sequences with the same first blocks read those together.

        Raises:
            MetadataError: the batch has no block tables, or of another block size.
        """
        spec, view = self.spec, batch.view("decoder")
        if batch.block_size != spec.block_size:
            raise MetadataError(f"the batch has block_size={batch.block_size}, the layer {spec.block_size}")
        shared, sequence, rows = self._shared_blocks(view)
        passes = [Pass(self._own, self._own.plan(self._own_batch(batch, view, shared)), writes=True)]
        if shared.any():
            table = shifted(view.side.table, sequence, np.zeros_like(sequence), shared[sequence])
            together = AttentionMetadata.read_only(rows, shared[sequence] * spec.block_size, table, spec.block_size)
            passes.append(Pass(self._shared, self._shared.plan(together)))
        return VariantPlan(
            spec=spec,
            num_tokens=view.num_tokens,
            groups=(Group(tuple(passes)),),
            highest_block=view.side.highest_block,
        )

    def _shared_blocks(self, view: BatchView) -> tuple[I64, I64, I64]:
        """Return the blocks that each sequence shares, i64[S], and runs of neighbours that do: a member, and rows."""
        table, size = view.side.table, self.spec.block_size
        lens, new = view.kv_lens.astype(np.int64), view.query_lens.astype(np.int64)
        # Only what was there before the step, in whole blocks: every row of the run sees all of it.
        whole = np.maximum(lens - new, 0) // size
        shared = np.zeros(len(lens), np.int64)
        member, rows = [], []
        start = 0
        while start < len(lens):
            stop = start + 1
            while whole[start] and stop < len(lens) and whole[stop] and table[stop, 0] == table[start, 0]:
                stop += 1
            if stop - start > 1:
                most = int(whole[start:stop].min())
                same = (table[start:stop, :most] == table[start, :most]).all(axis=0)
                shared[start:stop] = most if same.all() else int(np.argmin(same))
            member.append(start)
            rows.append(int(new[start:stop].sum()))
            start = stop
        return shared, np.array(member, np.int64), np.array(rows, np.int64)

    def _own_batch(self, batch: AttentionMetadata, view: BatchView, shared: I64) -> AttentionMetadata:
        """Return the batch without the shared blocks: its last rows stay at its last keys, its slots in place."""
        if not shared.any():
            return batch
        lens = (view.kv_lens - shared * self.spec.block_size).astype(np.int32)
        every = np.arange(view.num_seqs)
        return AttentionMetadata(
            query_start_loc=view.query_start_loc,
            seq_lens=lens,
            block_table=shifted(view.side.table, every, shared, -(-lens // self.spec.block_size)),
            slot_mapping=view.side.slots,
            block_size=self.spec.block_size,
            shared_writes=True,  # asked of the whole batch already
        )
