"""Pieces of a batch: query rows cut where a page table changes, each to become a sequence of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import BatchView
from attn_dispatch.contract.side import I32

__all__ = ["I64", "Pieces", "cut", "shifted", "starts"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Neighbouring rows of q that share a page table. All pieces together are all the rows, in order.

    Attributes:
        sequence: i64[P], whose rows they are.
        rows: i64[P], how many.
        begin: i64[P], position of the first of them in its sequence (0 of padding).
        end: i64[P], one past the last one's (0 of padding, which attends to nothing).
    """

    sequence: I64
    rows: I64
    begin: I64
    end: I64

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def padding(self) -> npt.NDArray[np.bool_]:
        """Which pieces are padding."""
        nothing: npt.NDArray[np.bool_] = self.end == 0
        return nothing


def cut(view: BatchView, size: int) -> Pieces:
    """Cut the rows of every sequence at the positions that are multiples of `size`."""
    new, lens = view.query_lens.astype(np.int64), view.kv_lens.astype(np.int64)
    first = lens - new
    real = (lens > 0) & (new > 0)
    low = np.where(real, first // size, 0)
    count = np.where(real, (lens - 1) // size - low + 1, (new > 0).astype(np.int64))
    sequence = np.repeat(np.arange(len(lens)), count)
    at = low[sequence] + np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count)
    begin = np.where(real[sequence], np.maximum(first[sequence], at * size), 0)
    end = np.where(real[sequence], np.minimum(lens[sequence], (at + 1) * size), 0)
    rows = np.where(real[sequence], end - begin, new[sequence])
    return Pieces(sequence, rows, begin, end)


def starts(lens: npt.NDArray[np.signedinteger]) -> I32:
    """Return where each of neighbouring runs begins, and where the last one ends."""
    start = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=start[1:])
    return start


def shifted(table: npt.NDArray[np.int32], sequence: I64, first_block: I64, count: npt.NDArray[np.signedinteger]) -> I32:
    """Return block tables that begin further on: row i is `table[sequence[i], first_block[i]:]`, `count[i]` blocks."""
    width = int(count.max(initial=0))
    at = first_block[:, None] + np.arange(width)
    inside = np.arange(width) < count[:, None]
    if not table.shape[1]:
        return np.zeros((len(sequence), width), np.int32)
    rows = table[sequence[:, None], np.minimum(at, table.shape[1] - 1)]
    return np.where(inside, rows, 0).astype(np.int32)
