"""The plan of `torch/sdpa`: which sequences one call attends for, and every index and mask that no layer changes.

Decodes (and other steps of a few tokens) of similar length are gathered into one padded batch, with the query-head
group folded into the query length: each key is then read once for all the heads that share it. Long prefills go one by
one, cut into chunks of queries, so that a mask is never larger than a chunk and no work is done above the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch import AttentionSpec, Plan
from attn_dispatch.contract import BatchView

__all__ = ["Group", "OnDevice", "SdpaPlan", "make_plan"]

I64 = npt.NDArray[np.int64]

FEW_TOKENS = 16
"""Steps of up to so many tokens are folded and batched; longer ones go alone."""
CHUNK_TOKENS = 512
"""Queries of a prefill that are attended for in one call."""


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences that one call attends for: G of them, n query tokens each, up to L gathered tokens.

    Attributes:
        sequences: their indices.
        rows: which rows of q: a slice, or i64[G * n].
        num_queries: n.
        first: the first gathered token of each, i64[G], a multiple of the block size.
        lens: keys of each, i64[G].
        blocks: gathered blocks, i64[G, nb].
        begin, end: what is used of the gathered tokens, the same for all.
        padding: gathered rows of [G, L] that are not the sequence's own, i64[...].
        masked: a mask is needed (lengths differ, several queries, or a window that cuts a block).
    """

    sequences: I64
    rows: slice | I64
    num_queries: int
    first: I64
    lens: I64
    blocks: I64
    begin: int
    end: int
    padding: I64
    masked: bool


@dataclass(eq=False)
class OnDevice:
    """What a plan has on one device, made at its first run there: one copy per plan."""

    write_rows: torch.Tensor | None = None
    written: torch.Tensor | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True, eq=False, kw_only=True)
class SdpaPlan(Plan):
    """A step for every layer of a spec."""

    groups: list[Group]
    alone: list[int]
    nothing: list[int]
    on_device: dict[torch.device, OnDevice] = field(default_factory=dict)
    covers_all: bool = True


def make_plan(spec: AttentionSpec, view: BatchView) -> SdpaPlan:
    """Sort a batch's sequences into groups, prefills and such as attend to nothing."""
    lens, new = view.kv_lens.astype(np.int64), view.query_lens
    nothing = np.flatnonzero((lens == 0) & (new > 0)).tolist()
    paged = view.pages.exist
    few = (lens > 0) & (new > 0) & (new <= FEW_TOKENS) & paged
    alone = np.flatnonzero((lens > 0) & (new > 0) & ~few).tolist()
    groups: list[Group] = []
    for n in np.unique(new[few]).tolist():
        members = np.flatnonzero(few & (new == n))
        first = _first_tokens(spec, lens[members], n, view.pages.block_size)
        order = np.argsort(lens[members] - first, kind="stable")
        members, first = members[order], first[order]
        widths = lens[members] - first
        start = 0
        for i in range(1, len(members) + 1):
            # Padding costs as much as keys do: a group is closed where it would be more than a quarter.
            if i == len(members) or widths[i] > 1.25 * widths[start] + view.pages.block_size:
                groups.append(_group(spec, view, members[start:i], first[start:i], n))
                start = i
    return SdpaPlan(spec=spec, view=view, groups=groups, alone=alone, nothing=nothing)


def _first_tokens(spec: AttentionSpec, lens: I64, n: int, block_size: int) -> I64:
    """Return the first token that the first of n queries can see, rounded down to a block."""
    left = spec.window[0]
    if left < 0:
        return np.zeros_like(lens)
    first: I64 = np.maximum(lens - n - left, 0) // block_size * block_size
    return first


def _group(spec: AttentionSpec, view: BatchView, members: npt.NDArray[np.intp], first: I64, n: int) -> Group:
    # In the batch's own order, so that rows of neighbours stay neighbours.
    order = np.argsort(members)
    members, first = members[order], first[order]
    size = view.pages.block_size
    lens = view.kv_lens[members].astype(np.int64)
    widths = lens - first
    count = -(-int(widths.max()) // size)
    at = first[:, None] // size + np.arange(count)
    inside = at * size < lens[:, None]
    table = view.pages.block_table[members].astype(np.int64)
    blocks = np.where(inside, np.take_along_axis(table, np.minimum(at, table.shape[1] - 1), axis=1), 0)
    begins = view.query_start_loc[members].astype(np.int64)
    together = len(members) == 1 or bool((np.diff(begins) == n).all())
    rows: slice | I64
    rows = slice(int(begins[0]), int(begins[-1]) + n) if together else (begins[:, None] + np.arange(n)).ravel()
    same = bool((lens == lens[0]).all())
    begin, end = 0, int(widths.max())
    if same and n == 1 and spec.window[0] >= 0:
        begin = max(int(lens[0]) - 1 - spec.window[0], 0) - int(first[0])
    # One query per sequence, at its last key: all that is gathered is seen, whatever the mask's rules.
    masked = not same or (n > 1 and (spec.causal or spec.has_window))
    tokens = np.arange(count * size)
    padding = np.flatnonzero((tokens >= widths[:, None]).ravel()) if not same else np.zeros(0, np.int64)
    return Group(members, rows, n, first, lens, blocks, begin, end, padding, masked)
