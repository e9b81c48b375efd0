"""A batch as tiles of query rows, on the host, in NumPy. No vendor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.adapters.batch import split_decodes
from attn_dispatch.contract import AttentionSpec, BatchView

__all__ = ["DECODE_TOKENS", "TiledRows", "decodes_and_prefills", "longest_span", "num_splits", "tile_rows"]

I32 = npt.NDArray[np.int32]
Sequences = npt.NDArray[np.intp]

DECODE_TOKENS = 8
"""A sequence with at most so many new tokens (drafts to verify) is decoded: its keys are split, not its rows."""


@dataclass(frozen=True, eq=False)
class TiledRows:
    """The query rows of some sequences, cut into tiles.

    Attributes:
        sequence: i32[tiles].
        row: i32[tiles], each tile's first row in its sequence.
    """

    sequence: I32
    row: I32

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.sequence)


def decodes_and_prefills(view: BatchView) -> tuple[Sequences, Sequences]:
    """Return the sequences that are decoded and those that are prefilled; without new tokens one is neither."""
    return split_decodes(view.query_lens, DECODE_TOKENS)


def tile_rows(sequences: Sequences, view: BatchView, group: int, block_rows: int) -> TiledRows:
    """Cut sequences into tiles of `block_rows` rows; a row is one token of one of `group` heads."""
    counts = -(-view.query_lens[sequences] * group // block_rows)
    owner = np.repeat(sequences, counts).astype(np.int32)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    row = (np.arange(len(owner)) - first) * block_rows
    return TiledRows(owner, row.astype(np.int32))


def longest_span(sequences: Sequences, view: BatchView, spec: AttentionSpec, capacity: int | None = None) -> int:
    """Return the most keys that one of these sequences reads: all that it has, or what its window leaves.

    Args:
        sequences: of the batch.
        view: the batch.
        spec: the layers.
        capacity: the most keys that any may have later; None: they stay as they are.
    """
    keys = int(view.kv_lens[sequences].max(initial=0)) if capacity is None else capacity
    left, right = spec.window
    if left < 0 or not (spec.causal or right >= 0):
        return keys
    return min(keys, left + max(right, 0) + int(view.query_lens[sequences].max(initial=0)))


def num_splits(span: int, block_keys: int, programs: int, processors: int) -> int:
    """Return into how many parts keys are split so that every processor has two programs.

    Args:
        span: keys of the longest sequence.
        block_keys: keys of one step of the kernel; a part has two at least.
        programs: what runs without splitting.
        processors: of the GPU.
    """
    wanted = -(-2 * processors // max(programs, 1))
    return max(1, min(wanted, span // (2 * block_keys), 128))
