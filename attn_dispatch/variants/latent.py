"""`Latent`: multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434), in its absorbed form.

Keys and values of all heads are projections of one latent vector per token. With the projections moved into the queries
and the output, what is cached and attended to is that vector and a rotary part: one kv head, D = latent + rotary, and
the values are the keys' first `latent` columns. So they are one array, of which the value array is a view.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Refusal
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.arrays import permute
from attn_dispatch.dispatch import choose, verdict_of
from attn_dispatch.errors import ArrayError, SpecError
from attn_dispatch.variants.rows import concatenate, put
from attn_dispatch.variants.strided import OneArrayCache, key_and_value, why_not
from attn_dispatch.variants.variant import Group, Pass, Variant, VariantCall, VariantPlan

__all__ = ["Latent"]


class Latent(Variant):
    """An MLA layer over a cache that holds each token's latent vector once.

    Attributes:
        spec: what the backend runs: one kv head, `head_size` latent + rotary.
        backend: who runs it.
        latent_size, rotary_size: 512 and 64 in DeepSeek's models.
        values_are: "view" (of the keys' first columns), or "alias": where a backend cannot read such a view, the whole
            keys are given as values, and the columns beyond `latent_size` of the result are dropped.
        note: why not "view", where it was refused.
    """

    def __init__(
        self,
        num_heads: int,
        latent_size: int = 512,
        rotary_size: int = 64,
        *,
        scale: float,
        dtype: str = "bfloat16",
        block_size: int = 32,
        backend: str | Backend | None = None,
    ) -> None:
        """Choose a backend for the layer.

        Args:
            num_heads: query heads, H.
            latent_size: the compressed vector's.
            rotary_size: of the part with positions, shared by all heads.
            scale: 1 / sqrt(of a head's size before absorption), which the latent's does not tell.
            dtype: of queries, cache and output.
            block_size: B.
            backend: the one to use (strict); None: chosen.

        Raises:
            SpecError: sizes that make no sense.
            NoBackendError: no backend runs either form.
        """
        if latent_size < 1 or rotary_size < 0:
            raise SpecError(f"latent_size={latent_size}, rotary_size={rotary_size} must be positive")
        self.latent_size, self.rotary_size = latent_size, rotary_size
        width = latent_size + rotary_size
        view = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=1,
            head_size=width,
            value_head_size=latent_size,
            dtype=dtype,
            block_size=block_size,
            scale=scale,
        )
        alias = replace(view, value_head_size=width)
        self.backend = choose(
            [(view, alias)], backend, purpose="Latent", refuses=lambda other: _refuses_views(other, view, alias)
        )
        verdict = verdict_of(self.backend, view)
        self.note = self._why_not(attention(view, self.backend)) if verdict else str(verdict)
        self.values_are = "alias" if self.note else "view"
        self._attn = attention(alias if self.note else view, self.backend)
        self.spec = self._attn.spec
        if self.note and (worse := self._why_not(self._attn)):
            raise SpecError(f"{self.backend.name} cannot read values that are its keys: {worse}")

    def _why_not(self, attn: Attention) -> str:
        return why_not(attn, lambda num_blocks: self._joined(attn, num_blocks))

    def _joined(self, attn: Attention, num_blocks: int, device: str | None = None) -> KVCache | None:
        """Return a cache whose value array is the key array, or its first columns."""
        made = attn.allocate(num_blocks, device)
        apart = key_and_value(made)
        if apart is None:
            return None
        key = apart[0]
        value = key if attn.spec.value_head_size == attn.spec.head_size else key[..., : self.latent_size]
        arrays = {"key": key, "value": value}
        return OneArrayCache(made.owner, made.geometry, made.layout, num_blocks, arrays, made.device)

    def allocate(self, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache: one vector of `latent_size + rotary_size` numbers per token."""
        joined = self._joined(self._attn, num_blocks, device)
        assert joined is not None  # it was tried
        return joined

    def plan(self, batch: AttentionMetadata) -> VariantPlan:
        """Prepare a step; see `Attention.plan`."""
        plan = self._attn.plan(batch)
        group = Group((Pass(self._attn, plan, writes=True),))
        return VariantPlan(self.spec, plan.num_tokens, (group,), highest_block=plan.highest_block)

    def run(
        self,
        plan: VariantPlan,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        out: Array | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Write the new tokens, then attend.

        Args:
            plan: of this step.
            q: [T, H, latent + rotary]: the key projection's transpose applied to each head's query (`absorb`), then its
                rotary part.
            k: the latent vectors [T, latent], normalised, as they are cached.
            v: the rotary parts [T, rotary], turned to their positions (None when `rotary_size` is 0).
            cache: the layer's.
            out: [T, H, latent] to write into.
            return_lse: also return the log-sum-exp, natural log, f32[T, H].

        Returns:
            [T, H, latent], which the value projection makes a head's output of; or that and the LSE.
        """
        latent, rotary = k, v
        if latent is None or (rotary is None) != (self.rotary_size == 0):
            names = [name for name, x in (("latent", latent), ("rotary", rotary)) if x is not None]
            raise ArrayError(f"rotary_size={self.rotary_size} needs other arrays; found {' and '.join(names)}")
        row = (latent if rotary is None else concatenate([latent, rotary], 1))[:, None, :]
        value = row if self.values_are == "alias" else latent[:, None, :]
        result = self._run(VariantCall(plan, (q,), row, value, cache, return_lse=return_lse))
        attended, lse = result if return_lse else (result, None)
        attended = attended[..., : self.latent_size]
        if out is not None:
            attended = put(out, None, attended)
        return (attended, lse) if return_lse else attended

    @staticmethod
    def absorb(q: Array, projection: Array) -> Array:
        """Return queries in latent space, [T, H, latent], of q [T, H, d] and the key projection [H, d, latent]."""
        return permute(permute(q, (1, 0, 2)) @ projection, (1, 0, 2))

    def __repr__(self) -> str:
        return f"Latent({self.spec}, backend={self.backend.name}, values_are={self.values_are!r})"


def _refuses_views(backend: Backend, *specs: AttentionSpec) -> Refusal | None:
    """Refuse a backend whose layout has no array of keys, of which the values are a view."""
    spec = next(spec for spec in specs if backend.verdict(spec))
    layout = backend.layout(spec)
    if not layout.is_joint:
        return None
    accepts = f"values that are its keys need arrays of their own, and layout {layout.name} has one array for both"
    return Refusal("value_head_size", spec.value_head_size, accepts, "Use another backend")
