"""`Writer`: new keys and values go into their slots, and nothing attends.

A variant that cuts a batch into pieces writes first and reads afterwards: a piece may read what another one's tokens
have brought, and writing happens exactly once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, BatchView, KVCache
from attn_dispatch.variants.choosing import refusal
from attn_dispatch.variants.rows import take

__all__ = ["Writer"]


class Writer:
    """Writes the tokens of a step. Made of what the contract has anyway.

    A cross layer writes an encoder's tokens and attends with the decoder's: with no decoder tokens it only writes. A
    backend that refuses cross layers is given a decoder layer with a window of one token instead, whose output nobody
    looks at.
    """

    def __init__(self, spec: AttentionSpec, backend: Backend, *, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        self.spec = self.choose(spec, backend)
        self.attn: Attention = attention(self.spec, backend, k_scale=k_scale, v_scale=v_scale)

    @staticmethod
    def specs(spec: AttentionSpec) -> tuple[AttentionSpec, AttentionSpec]:
        """Return what would do, the better one first."""
        plain = replace(
            spec,
            kind="cross",
            causal=False,
            window=(-1, -1),
            logits_soft_cap=None,
            alibi=False,
            sinks=False,
            returns_lse=False,
            writes_kv=True,
        )
        return plain, replace(plain, kind="decoder", causal=True, window=(0, 0))

    @classmethod
    def choose(cls, spec: AttentionSpec, backend: str | Backend) -> AttentionSpec:
        """Return the spec that a backend accepts (the first one if it accepts neither), and that shares the cache."""
        return next((option for option in cls.specs(spec) if refusal(backend, [option]) is None), cls.specs(spec)[0])

    def plan(self, view: BatchView) -> Plan | None:
        """Prepare a step's writes; None when there are none."""
        pages = view.pages
        if not pages.writes:
            return None
        if self.spec.kind == "decoder":
            return self.attn.plan(
                AttentionMetadata(
                    query_start_loc=view.new_start_loc,
                    seq_lens=view.kv_lens,
                    block_table=pages.block_table,
                    slot_mapping=pages.slot_mapping,
                    block_size=pages.block_size,
                )
            )
        none = np.zeros(view.num_seqs, np.int32)
        return self.attn.plan(
            AttentionMetadata(
                query_start_loc=np.zeros(view.num_seqs + 1, np.int32),
                seq_lens=none,
                block_table=np.zeros((view.num_seqs, 0), np.int32),
                slot_mapping=np.zeros(0, np.int64),
                block_size=pages.block_size,
                encoder_start_loc=view.new_start_loc,
                encoder_seq_lens=view.kv_lens,
                encoder_block_table=pages.block_table,
                encoder_slot_mapping=pages.slot_mapping,
            )
        )

    def write(self, plan: Plan, q: Array, k: Array | None, v: Array | None, cache: KVCache) -> None:
        """Write k [T, K, D] and v [T, K, Dv]. Raises as `Attention.run` does."""
        self.attn.run(plan, take(q, slice(0, plan.num_tokens)), k, v, cache)
