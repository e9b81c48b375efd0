"""`BlockSparse`: a query block attends to some key blocks only, and costs what they cost.

Each query block becomes a sequence whose block table holds the key blocks that it keeps, its own (the diagonal) last:
causal is bottom-right aligned, and so the same as in the whole sequence. A kernel never sees what is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend, Refusal
from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch.contract.side import I32
from attn_dispatch.dispatch import choose
from attn_dispatch.errors import MetadataError, SpecError
from attn_dispatch.variants.block_mask import Bools, Pattern
from attn_dispatch.variants.head_folding import cannot_fold, fold_cache, fold_rows, folded_spec, unfold_rows
from attn_dispatch.variants.pieces import I64, Pieces, cut, starts
from attn_dispatch.variants.rows import put
from attn_dispatch.variants.variant import (
    Group,
    LayerOptions,
    Pass,
    Variant,
    VariantCall,
    VariantPlan,
    attend,
    is_scaled,
    refuse_fields,
    scales_of,
)
from attn_dispatch.variants.writing import Writer

__all__ = ["BlockSparse", "BlockSparsePlan"]


@dataclass(frozen=True, eq=False)
class BlockSparsePlan(VariantPlan):
    """A step of a block-sparse layer.

    Attributes:
        patterns: how many page tables each query block has.
        kept_blocks, dense_blocks: (query block, key block) pairs that are computed, and that a dense layer would.
    """

    patterns: int = 1
    kept_blocks: int = 0
    dense_blocks: int = 0


class BlockSparse(Variant):
    """A layer with a block mask.

    Attributes:
        pattern: the layer's mask (a step may have one of its own).
        sparse_block: tokens in a block of the mask, a multiple of the spec's block size.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        pattern: Pattern,
        sparse_block: int | None = None,
        backend: str | Backend | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        """Choose a backend for the layer.

        Args:
            spec: the layer; a decoder (causal), or an encoder with a cache (not causal).
            pattern: which blocks are kept.
            sparse_block: tokens in a block of the mask (None: the spec's block size).
            backend: the one to use (strict); None: chosen.
            options: sinks (only with a pattern that all heads share), k_scale, v_scale: see `ad.attention`.

        Raises:
            SpecError: sizes that do not fit, or a field that means nothing here (a window, ALiBi: positions change).
            NoBackendError: no backend runs the passes.
        """
        self.spec = spec
        self.pattern = pattern
        self.sparse_block = spec.block_size if sparse_block is None else sparse_block
        refuse_fields("BlockSparse", spec, "window", "alibi")
        if spec.kind == "cross" or self.sparse_block < 1 or self.sparse_block % spec.block_size:
            raise SpecError(
                f"BlockSparse: kind={spec.kind}, sparse_block={self.sparse_block}: needs a decoder or an encoder, and "
                f"a multiple of block_size={spec.block_size}"
            )
        self._patterns = pattern.num_patterns
        head = replace(spec, kind="decoder", causal=spec.causal, writes_kv=False)
        if self._patterns > 1:
            if spec.sinks:
                raise SpecError("BlockSparse: sinks differ from head to head, and so cannot go with a pattern per head")
            head = folded_spec(head, self._patterns)
        self._everything = replace(head, causal=False)
        self._diagonal = head if spec.causal else self._everything
        store = replace(spec, kind="decoder", causal=True, sinks=False)
        scaled = is_scaled(options)
        needs = [self._diagonal, Writer.spec_for(store)]
        self.backend = choose(needs, backend, scaled=scaled, purpose="BlockSparse", refuses=self._refuses)
        self._attn = attention(self._diagonal, self.backend, **options)
        self._options = options
        self._writer: Writer = Writer(store, self.backend, **scales_of(options))
        self._cache_attn = self._writer.attn

    def _refuses(self, backend: Backend) -> Refusal | None:
        """Refuse a backend whose cache has no heads that a page table per head could name."""
        return None if self._patterns == 1 else cannot_fold(backend, self.spec, self._diagonal)

    def plan(self, batch: AttentionMetadata, pattern: Pattern | Sequence[Pattern] | None = None) -> BlockSparsePlan:
        """Prepare a step.

        Args:
            batch: as for a plain layer.
            pattern: this step's mask, or one for each sequence (None: the layer's).

        Raises:
            MetadataError, SpecError: the batch has no blocks, or a mask does not fit it.
            BackendRefusedError: a mask leaves out diagonal blocks, and the backend cannot do without them.
        """
        spec, view = self.spec, batch.view(self.spec.kind)
        if batch.block_size != spec.block_size or (view.max_kv_len and not view.side.has_blocks):
            raise MetadataError(
                f"the batch has block_size={batch.block_size} or no block tables; needs {spec.block_size}"
            )
        pieces = cut(view, self.sparse_block)
        keep = self._kept(pieces, view.kv_lens.astype(np.int64), self.pattern if pattern is None else pattern)
        lens, table = self._tables(pieces, view.kv_lens.astype(np.int64), view.side.table, keep)
        rows = np.tile(pieces.rows, self._patterns)
        # Where the diagonal is kept, and where rows see all that they are given.
        ends_at_diagonal = self._has_diagonal(pieces, keep) | (lens == 0)
        groups = []
        for chosen, attn_spec in ((ends_at_diagonal, self._diagonal), (~ends_at_diagonal, self._everything)):
            if chosen.any() or (not len(chosen) and attn_spec is self._diagonal):
                groups.append(self._group(chosen, attn_spec, rows, lens, table))
        blocks = -(-pieces.end // self.sparse_block)
        return BlockSparsePlan(
            spec=spec,
            num_tokens=view.num_tokens,
            groups=tuple(groups),
            write=self._writer.plan(view) if spec.writes_kv else None,
            highest_block=view.side.highest_block,
            patterns=self._patterns,
            kept_blocks=int(keep.sum()),
            dense_blocks=int(blocks.sum()) * self._patterns,
        )

    def _kept(self, pieces: Pieces, lens: I64, pattern: Pattern | Sequence[Pattern]) -> Bools:
        """Return which key blocks each piece attends to, bool[patterns, P, key blocks]."""
        size = self.sparse_block
        query_blocks = pieces.begin // size
        blocks = -(-lens // size)
        most = int(blocks.max(initial=0))
        keep = np.zeros((self._patterns, len(pieces), most), np.bool_)
        if isinstance(pattern, Sequence):
            if len(pattern) != len(lens):
                raise MetadataError(f"{len(pattern)} patterns for {len(lens)} sequences")
            for s, own_pattern in enumerate(pattern):
                own = pieces.sequence == s
                keep[:, own, : blocks[s]] = self._checked(own_pattern).keeps(query_blocks[own], int(blocks[s]))
        elif most:
            keep[:] = self._checked(pattern).keeps(query_blocks, most)
        key = np.arange(most)
        # Of the sequence's own, and not above the diagonal.
        last = query_blocks + 1 if self.spec.causal else blocks[pieces.sequence]
        keep &= (key < np.where(pieces.padding, 0, last)[:, None])[None]
        return keep

    def _checked(self, pattern: Pattern) -> Pattern:
        if pattern.num_patterns != self._patterns:
            raise SpecError(f"a mask with {pattern.num_patterns} patterns was given, the layer has {self._patterns}")
        return pattern

    def _has_diagonal(self, pieces: Pieces, keep: Bools) -> Bools:
        if not self.spec.causal or not keep.shape[2]:
            return np.ones(self._patterns * len(pieces), np.bool_)
        own = np.minimum(pieces.begin // self.sparse_block, keep.shape[2] - 1)
        return np.take_along_axis(keep, own[None, :, None], axis=2).ravel()

    def _tables(self, pieces: Pieces, lens: I64, table: I32, keep: Bools) -> tuple[I64, I32]:
        """Return the length and the pages of every (pattern, piece), i64[patterns * P] and i32[patterns * P, M]."""
        size, ratio = self.sparse_block, self.sparse_block // self.spec.block_size
        patterns, count, _ = keep.shape
        pattern, piece, block = np.nonzero(keep)
        row = pattern * count + piece
        kept = np.bincount(row, minlength=patterns * count)
        # A kept block is full unless the sequence (of a causal piece: the piece) ends in it.
        end = pieces.end if self.spec.causal else lens[pieces.sequence]
        tokens = np.bincount(row, np.minimum(end[piece] - block * size, size), patterns * count).astype(np.int64)
        place = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
        pages = np.zeros((patterns * count, int(kept.max(initial=0)) * ratio), np.int32)
        for part in range(ratio):
            at = block * ratio + part
            inside = at < table.shape[1]  # of a block that is not full, the rest is not there
            block_ids = table[pieces.sequence[piece[inside]], at[inside]]
            pages[row[inside], place[inside] * ratio + part] = self._page(block_ids, pattern[inside])
        return tokens, pages

    def _page(self, block: I32, pattern: I64) -> Any:
        if self._patterns == 1:
            return block
        heads = self.spec.num_kv_heads
        return block.astype(np.int64) * heads + pattern * heads // self._patterns

    def _group(self, chosen: Bools, spec: AttentionSpec, rows: I64, lens: I64, table: I32) -> Group:
        attn = self._attn if spec == self._attn.spec else attention(spec, self.backend, **self._options)
        batch = AttentionMetadata.read_only(rows[chosen], lens[chosen], table[chosen], self.spec.block_size)
        if chosen.all():
            return Group((Pass(attn, attn.plan(batch)),))
        start = starts(rows).astype(np.int64)
        picked = [np.arange(start[i], start[i + 1]) for i in np.flatnonzero(chosen)]
        return Group((Pass(attn, attn.plan(batch)),), np.concatenate(picked))

    def _attend(self, call: VariantCall) -> Any:
        plan = call.plan
        if plan.patterns == 1:
            return super()._attend(call)
        spec = self._attn.spec
        pages = fold_cache(call.cache, spec, self.backend.layout(spec))
        rows = (fold_rows(call.queries[0], plan.patterns),)
        folded = attend(spec, plan.groups, VariantCall(plan, rows, None, None, pages, return_lse=call.return_lse))
        result, lse = folded if call.return_lse else (folded, None)
        result = unfold_rows(result, plan.patterns)
        if call.out is not None:
            result = put(call.out, None, result)
        return result if lse is None else (result, unfold_rows(lse, plan.patterns))
