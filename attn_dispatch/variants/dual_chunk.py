"""`DualChunk`: dual-chunk attention (An et al., arXiv 2402.17463), for contexts far beyond the training length.

Positions are those within a chunk, so that none is larger than what the model was trained on. A query has three forms,
by where the key is: in its own chunk, in the one before, further back. Each form attends to its keys in a pass of its
own, and one softmax goes over all of them: the passes are merged by their LSE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.side import I64
from attn_dispatch.dispatch import choose
from attn_dispatch.errors import ArrayError, MetadataError, SpecError
from attn_dispatch.variants.pieces import cut, shifted, starts
from attn_dispatch.variants.variant import (
    Group,
    Pass,
    Scales,
    Variant,
    VariantCall,
    VariantPlan,
    is_scaled,
    refuse_fields,
)

__all__ = ["ChunkPositions", "DualChunk"]


class ChunkPositions(NamedTuple):
    """Where a rotary embedding turns each token to, i64[T] each.

    Attributes:
        key: for keys.
        intra: for queries, towards keys of the same chunk.
        successive: towards keys of the chunk before.
        inter: towards keys further back.
    """

    key: I64
    intra: I64
    successive: I64
    inter: I64


class DualChunk(Variant):
    """A causal decoder layer whose queries come in three forms.

    Attributes:
        chunk_tokens: tokens of a chunk, s in the paper; a multiple of the block size.
        trained_tokens: positions that the model knows, c in the paper; larger than `chunk_tokens`.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        chunk_tokens: int,
        trained_tokens: int,
        backend: str | Backend | None = None,
        **options: Unpack[Scales],
    ) -> None:
        """Choose a backend for the layer.

        Args:
            spec: a causal decoder without a window.
            chunk_tokens: see above. (Qwen's configuration has `chunk_size - local_size`.)
            trained_tokens: see above. (Qwen's `chunk_size`.)
            backend: the one to use (strict); None: chosen. It has to return the log-sum-exp.
            options: k_scale, v_scale: see `ad.attention`.

        Raises:
            SpecError: a field that means nothing here, or chunks that are not whole blocks.
            NoBackendError: no backend runs the passes.
        """
        self.spec = spec
        refuse_fields("DualChunk", replace(spec, kind="decoder"), "window", "alibi", "causal", "sinks")
        if chunk_tokens < 1 or chunk_tokens % spec.block_size or trained_tokens <= chunk_tokens:
            raise SpecError(
                f"chunk_tokens={chunk_tokens}, trained_tokens={trained_tokens}: a chunk is a multiple of "
                f"block_size={spec.block_size}, and shorter than what the model was trained on"
            )
        self.chunk_tokens, self.trained_tokens = chunk_tokens, trained_tokens
        own = replace(spec, returns_lse=True)
        back = replace(own, causal=False, writes_kv=False)
        scaled = is_scaled(options)
        self.backend = choose([own, back], backend, scaled=scaled, purpose="DualChunk")
        self._own = attention(own, self.backend, **options)
        self._back = attention(back, self.backend, **options)
        self._cache_attn = self._own

    def positions(self, positions: I64, furthest: int | None = None) -> ChunkPositions:
        """Return the rotary positions of tokens.

        Args:
            positions: i64[T], where the tokens are in their sequences.
            furthest: the largest position that a query is given (None: `trained_tokens - 1` as in the paper; Qwen's own
                code goes one further).
        """
        last = self.trained_tokens - 1 if furthest is None else furthest
        within = positions % self.chunk_tokens
        return ChunkPositions(
            key=within,
            intra=within,
            successive=np.minimum(within + self.chunk_tokens, last),
            inter=np.full_like(within, last),
        )

    def plan(self, batch: AttentionMetadata) -> VariantPlan:
        """Prepare a step.

        Raises:
            MetadataError: the batch has another block size.
        """
        view, size, chunk = batch.view("decoder"), self.spec.block_size, self.chunk_tokens
        if batch.block_size != size:
            raise MetadataError(f"the batch has block_size={batch.block_size}, the layer {size}")
        pieces = cut(view, chunk)
        number = pieces.begin // chunk
        table = view.side.table

        def pages(first_chunk: I64, lens: I64) -> Any:
            return shifted(table, pieces.sequence, first_chunk * (chunk // size), -(-lens // size))

        lens = np.where(pieces.padding, 0, pieces.end - number * chunk)
        own = AttentionMetadata(
            query_start_loc=starts(pieces.rows),
            seq_lens=lens.astype(np.int32),
            block_table=pages(number, lens),
            slot_mapping=view.side.slots,
            block_size=size,
            shared_writes=True,  # asked of the whole batch already
        )
        # First the pass that writes: what it writes, the others read.
        passes = [Pass(self._own, self._own.plan(own), query=0, writes=True)]
        for query, first, lens in (
            (1, np.maximum(number - 1, 0), np.where(number >= 1, chunk, 0)),
            (2, np.zeros_like(number), np.maximum(number - 1, 0) * chunk),
        ):
            if lens.any():
                seen = AttentionMetadata.read_only(pieces.rows, lens, pages(first, lens), size)
                passes.append(Pass(self._back, self._back.plan(seen), query=query))
        return VariantPlan(
            spec=self.spec,
            num_tokens=view.num_tokens,
            groups=(Group(tuple(passes)),),
            highest_block=view.side.highest_block,
        )

    def run(
        self,
        plan: VariantPlan,
        q: Any,
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        out: Array | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """See `Variant.run`; q is three forms of the queries, [T, H, D] each, turned as `positions` says, and so is k.

        The forms are turned to the `intra`, the `successive` and the `inter` positions, k to the `key` positions.

        Raises:
            ArrayError, CacheError, PlanError: before anything has been written.
        """
        queries = tuple(q) if isinstance(q, tuple | list) else ()
        if len(queries) != 3:
            raise ArrayError("DualChunk takes three forms of q: (intra, successive, inter), [T, H, D] each")
        return self._run(VariantCall(plan, queries, k, v, cache, out, return_lse))
