"""`Longformer`: a sliding window and some global tokens (Beltagy et al., arXiv 2004.05150).

A token attends to its window and to the global tokens; a global token attends to everything, and everything attends to
it. In a decoder both are cut at the diagonal. With the first tokens as global ones that is StreamingLLM's attention
sinks (Xiao et al., arXiv 2309.17453).

One pass sees the window (with a page table that begins where the window does), another the global tokens outside it;
their keys are disjoint, so that the merged result is exact to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, BatchView
from attn_dispatch.contract.side import I32
from attn_dispatch.dispatch import choose
from attn_dispatch.errors import MetadataError, SpecError
from attn_dispatch.variants.pieces import I64, cut, shifted
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
from attn_dispatch.variants.writing import Writer

__all__ = ["Longformer"]

_LEAST_ROWS = 256
"""A prefill is cut into pieces of at least so many rows: each reads its own window, so that rows and window balance."""


@dataclass(frozen=True, eq=False)
class _Globals:
    """The global tokens of each sequence, and where a page table finds them in a row.

    Attributes:
        positions: per sequence, in order.
        forth: i32[S, M], pages that hold them in this order.
        back: i32[S, M], pages that hold them in the opposite order (encoders need both).
        copies: slots to copy to make it so.
    """

    positions: list[I64]
    forth: I32
    back: I32
    copies: tuple[list[int], list[int]]


class Longformer(Variant):
    """A layer with a window (`spec.window`) and global tokens, which each step names."""

    def __init__(
        self,
        spec: AttentionSpec,
        backend: str | Backend | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        """Choose a backend for the layer.

        Args:
            spec: a decoder with a window `(W - 1, 0)`, or an encoder with a cache and a window `(left, right)`.
            backend: the one to use (strict); None: chosen. It has to return the log-sum-exp.
            options: sinks (learned logits, not the tokens of that name), k_scale, v_scale: see `ad.attention`.

        Raises:
            SpecError: no window, or a field that means nothing here.
            NoBackendError: no backend runs the passes.
        """
        self.spec = spec
        refuse_fields("Longformer", spec, "alibi")
        if (
            spec.kind == "cross"
            or not spec.has_window
            or spec.window[0] < 0
            or (not spec.causal and spec.window[1] < 0)
        ):
            raise SpecError(
                f"Longformer: kind={spec.kind}, window={spec.window}: needs window[0] >= 0, "
                "and window[1] >= 0 if it is not causal"
            )
        reads = replace(spec, writes_kv=False, returns_lse=True)
        globals_ = replace(reads, kind="decoder", causal=False, window=(-1, -1), sinks=False)
        full = replace(reads, window=(-1, -1)) if spec.causal else replace(globals_, sinks=spec.sinks)
        store = replace(spec, kind="decoder", causal=True, window=(-1, -1), sinks=False)
        scaled = is_scaled(options)
        needs = [reads, globals_, full, Writer.spec_for(store)]
        self.backend = choose(needs, backend, scaled=scaled, purpose="Longformer")
        scales = scales_of(options)
        self._window = attention(reads, self.backend, **options)
        self._globals = attention(globals_, self.backend, **scales)
        self._full = attention(full, self.backend, **options)
        self._writer: Writer = Writer(store, self.backend, **scales)
        self._cache_attn = self._writer.attn

    def plan(
        self,
        batch: AttentionMetadata,
        global_tokens: int | Sequence[Sequence[int]] = 0,
        global_blocks: Sequence[Sequence[int]] | None = None,
    ) -> VariantPlan:
        """Prepare a step.

        Args:
            batch: as for a plain layer.
            global_tokens: how many of the first tokens of every sequence are global, or for each sequence the positions
                of those that are.
            global_blocks: for positions that are not the first ones (and for encoders): blocks of the same cache in
                which their keys and values are laid side by side, for each sequence; `blocks_for` says how many.

        Raises:
            MetadataError: a position that is not in its sequence, or blocks that are missing.
        """
        spec, view = self.spec, batch.view(self.spec.kind)
        if batch.block_size != spec.block_size or (view.max_kv_len and not view.side.has_blocks):
            raise MetadataError(
                f"the batch has block_size={batch.block_size} or no block tables; needs {spec.block_size}"
            )
        globals_at = self._locate(view, global_tokens, global_blocks)
        passes = [Pass(self._window, self._window.plan(self._window_batch(batch, view)))]
        for side, table in ((0, globals_at.forth), (1, globals_at.back)):
            seen = self._global_batch(view, globals_at.positions, table, side)
            if seen is not None:
                passes.append(Pass(self._globals, self._globals.plan(seen)))
        groups = [Group(tuple(passes))]
        everything = self._everything_group(view, globals_at.positions)
        blocks = [view.side.highest_block, int(globals_at.forth.max(initial=-1)), int(globals_at.back.max(initial=-1))]
        return VariantPlan(
            spec=spec,
            num_tokens=view.num_tokens,
            groups=(*groups, *([everything] if everything else [])),
            write=self._writer.plan(view) if spec.writes_kv else None,
            copies=globals_at.copies if globals_at.copies[0] else None,
            highest_block=max(blocks),
        )

    def blocks_for(self, num_globals: int) -> int:
        """Return how many `global_blocks` a sequence with so many global tokens needs, unless they are its first."""
        return (1 if self.spec.causal else 2) * -(-num_globals // self.spec.block_size)

    def _locate(
        self, view: BatchView, tokens: int | Sequence[Sequence[int]], blocks: Sequence[Sequence[int]] | None
    ) -> _Globals:
        size, table, lens = self.spec.block_size, view.side.table, view.kv_lens
        if isinstance(tokens, int):
            positions = [np.arange(min(tokens, int(n))) for n in lens]
        else:
            positions = [np.unique(np.asarray(listed, np.int64)) for listed in tokens]
        if len(positions) != view.num_seqs or any(
            len(p) and (p[0] < 0 or p[-1] >= n) for p, n in zip(positions, lens, strict=True)
        ):
            raise MetadataError(f"global tokens are positions in each of the {view.num_seqs} sequences, found {tokens}")
        most = max((-(-len(p) // size) for p in positions), default=0)
        sides = [np.zeros((view.num_seqs, most), np.int32) for _ in range(2)]
        source: list[int] = []
        target: list[int] = []
        for s, own in enumerate(positions):
            count = -(-len(own) // size)
            leading = bool((own == np.arange(len(own))).all())
            orders = [own] if self.spec.causal else [own, own[::-1]]
            if leading:
                sides[0][s, :count] = table[s, :count]
            own_blocks = [] if blocks is None else list(blocks[s])
            for side, order in enumerate(orders):
                if not len(own) or (leading and side == 0):
                    continue
                start = (side - leading) * count if leading else side * count
                mine = np.asarray(own_blocks[start : start + count], np.int64)
                if len(mine) < count:
                    raise MetadataError(
                        f"sequence {s}: {len(own)} global tokens need {self.blocks_for(len(own))} global_blocks, "
                        f"{len(own_blocks)} were given"
                    )
                sides[side][s, :count] = mine
                at = np.arange(len(own))
                source += (table[s, order // size].astype(np.int64) * size + order % size).tolist()
                target += (mine[at // size] * size + at % size).tolist()
        return _Globals(positions, sides[0], sides[1], (source, target))

    def _window_batch(self, batch: AttentionMetadata, view: BatchView) -> AttentionMetadata:
        """Return every row with the pages that its window can reach."""
        if not self.spec.causal:
            # The rows of an encoder look both ways: the backend leaves out what the window hides.
            return batch
        left, size = self.spec.window[0], self.spec.block_size
        pieces = cut(view, max(left + 1, _LEAST_ROWS))
        first = np.maximum(pieces.begin - left, 0) // size
        first[pieces.padding] = 0
        lens = pieces.end - first * size
        table = shifted(view.side.table, pieces.sequence, first, -(-lens // size))
        return AttentionMetadata.read_only(pieces.rows, lens, table, size)

    def _global_batch(self, view: BatchView, positions: list[I64], table: I32, side: int) -> AttentionMetadata | None:
        """Return every row with the global tokens before its window (side 0), or after it (1); None if there are none.

        Rows that see equally many are one sequence: of the tokens in order, or in the opposite order, it is the first
        so many that they see.
        """
        left, right = self.spec.window
        sequence, rows, seen = [], [], []
        for s, own in enumerate(positions):
            new, length = int(view.query_lens[s]), int(view.kv_lens[s])
            at = np.arange(length - new, length)
            counts = np.zeros(new, np.int64)
            if length and side == 0:
                counts = np.searchsorted(own, at - left)
            elif length and not self.spec.causal:
                counts = len(own) - np.searchsorted(own, at + right, side="right")
            changes = np.flatnonzero(np.diff(counts, prepend=-1))
            sequence += [s] * len(changes)
            rows.append(np.diff(changes, append=new))
            seen.append(counts[changes])
        if not rows or not any(counts.any() for counts in seen):
            return None
        return AttentionMetadata.read_only(
            np.concatenate(rows), np.concatenate(seen), table[sequence], self.spec.block_size
        )

    def _everything_group(self, view: BatchView, positions: list[I64]) -> Group | None:
        """Return the rows that are global tokens, which see everything."""
        sequence, rows, ends, picked = [], [], [], []
        for s, own in enumerate(positions):
            new, length = int(view.query_lens[s]), int(view.kv_lens[s])
            mine = own[own >= length - new]
            if self.spec.causal:
                mine = mine[mine > self.spec.window[0]]  # the others' windows reach the beginning
            if not len(mine):
                continue
            runs = np.split(mine, np.flatnonzero(np.diff(mine) > 1) + 1)
            for run in runs:
                sequence.append(s)
                rows.append(len(run))
                ends.append(int(run[-1]) + 1 if self.spec.causal else length)
            picked.append(mine - (length - new) + int(view.query_start_loc[s]))
        if not picked:
            return None
        table = view.side.table[sequence]
        batch = AttentionMetadata.read_only(np.array(rows), np.array(ends), table, self.spec.block_size)
        return Group((Pass(self._full, self._full.plan(batch)),), np.concatenate(picked).astype(np.int64))
