"""`Writer`: new keys and values go into their slots, and nothing attends.

A variant that cuts a batch into pieces writes first and reads afterwards: a piece may read what another one's tokens
have brought, and writing happens exactly once.
"""

from __future__ import annotations

from dataclasses import replace

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, BatchView, KVCache
from attn_dispatch.variants.rows import take

__all__ = ["Writer"]


class Writer:
    """A layer that only writes: a plain decoder layer over the same cache, given batches without queries."""

    def __init__(self, spec: AttentionSpec, backend: Backend, *, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        self.spec = self.spec_for(spec)
        self.attn: Attention = attention(self.spec, backend, k_scale=k_scale, v_scale=v_scale)

    @staticmethod
    def spec_for(spec: AttentionSpec) -> AttentionSpec:
        """Return the plain decoder layer whose cache is that of `spec`."""
        return replace(
            spec,
            kind="decoder",
            causal=True,
            window=(-1, -1),
            logits_soft_cap=None,
            alibi=False,
            sinks=False,
            returns_lse=False,
            writes_kv=True,
        )

    def plan(self, view: BatchView) -> Plan | None:
        """Prepare a step's writes; None when there are none."""
        return self.attn.plan(AttentionMetadata.write_only(view.side)) if view.side.num_written else None

    def write(self, plan: Plan, q: Array, k: Array | None, v: Array | None, cache: KVCache) -> None:
        """Write k [T, K, D] and v [T, K, Dv]. Raises as `Attention.run` does."""
        self.attn.run(plan, take(q, slice(0, 0)), k, v, cache)
