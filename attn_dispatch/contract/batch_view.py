"""`BatchView`: a batch as one kind of layer sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from attn_dispatch.contract.host_arrays import I32
from attn_dispatch.contract.side import Side

__all__ = ["BatchView"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchView:
    """The batch as one kind of layer sees it: rows of queries, and the side that has the keys.

    A decoder layer reads the sequences' own side, a cross layer the encoder's, an encoder layer its own tokens. What
    differs is resolved here, so that a backend has one shape of input for all three.
    """

    query_start_loc: I32  # i32[S + 1], rows of q per sequence
    kv_lens: I32  # i32[S], keys that each sequence attends to
    side: Side

    @property
    def new_start_loc(self) -> I32:
        """Rows of k and v per sequence, i32[S + 1]."""
        return self.side.start_loc

    @cached_property
    def query_lens(self) -> I32:
        """Query rows of each sequence, i32[S]."""
        return self.query_start_loc[1:] - self.query_start_loc[:-1]

    @cached_property
    def max_query_len(self) -> int:
        """The longest of `query_lens`."""
        return int(self.query_lens.max(initial=0))

    @cached_property
    def max_kv_len(self) -> int:
        """The longest of `kv_lens`."""
        return int(self.kv_lens.max(initial=0))

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.kv_lens)

    @property
    def num_tokens(self) -> int:
        """Rows of q, T."""
        return int(self.query_start_loc[-1])

    @property
    def num_new(self) -> int:
        """Rows of k and v."""
        return self.side.num_rows
