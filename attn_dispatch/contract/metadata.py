"""`AttentionMetadata`: what one step's batch looks like, checked once, here, before any backend sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.pages import I32, I64, Pages, as_lengths, as_table, check_array, table_slots
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE, Kind
from attn_dispatch.errors import MetadataError

__all__ = ["AttentionMetadata", "BatchPart", "BatchView"]


# (The block tables are copied when their unused entries are cleared.)
_GIVEN = (
    "query_start_loc", "seq_lens", "slot_mapping", "encoder_start_loc", "encoder_seq_lens", "encoder_slot_mapping",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchView:
    """The batch as one kind of layer sees it: who asks (query rows) and what is there to be read (keys).

    A decoder layer reads the sequence's own blocks, a cross layer the encoder's, an encoder layer its own tokens. What
    differs is resolved here, so that a backend has one shape of input for all three.
    """

    query_start_loc: I32  # i32[S + 1], rows of q per sequence
    kv_lens: I32  # i32[S], keys that each sequence attends to
    new_start_loc: I32  # i32[S + 1], rows of k and v per sequence
    pages: Pages

    @cached_property
    def query_lens(self) -> I32:
        """Query rows of each sequence, i32[S]."""
        return np.diff(self.query_start_loc)

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
        return int(self.new_start_loc[-1])


class BatchPart(NamedTuple):
    """Some sequences of a batch as a batch of their own.

    `tokens` picks their rows out of q, k, v and the output: a slice (no copy) when they are neighbours, else indices.
    """

    metadata: AttentionMetadata
    sequences: slice | npt.NDArray[np.intp]
    tokens: slice | npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMetadata:
    """One step's batch. Made by `build` from plain facts; making one by hand is checked all the same.

    A sequence of length 0 whose tokens have slot -1 is padding: its rows attend to nothing (output 0, LSE -inf).
    Entries of a block table beyond a sequence's last used block may hold anything; they are stored as 0, so that a
    kernel which reads ahead stays inside the cache.

    Attributes:
        query_start_loc: i32[S + 1], where each sequence's rows begin in q; the last entry is T.
        seq_lens: i32[S], tokens that are in the cache after this step, this step's included.
        block_table: i32[S, M], the blocks of each sequence in order.
        slot_mapping: i64[T], where each new token goes, `block * block_size + offset`; -1: not written.
        block_size: tokens in a block, B.
        max_query_len, max_seq_len: the largest of each.
        num_decodes, num_prefills: sequences with at most one new token, and the others; `split` gives each as a batch.
        query_lens: i32[S], new tokens of each sequence.
        encoder_start_loc: i32[S + 1], rows of encoder tokens that run through encoder layers, and are written by cross
            layers, in this step (None: no encoder in this batch).
        encoder_seq_lens: i32[S], encoder tokens that each sequence's cross layers attend to.
        encoder_block_table: i32[S, Me], their blocks.
        encoder_slot_mapping: i64[Te], where cross layers write the new encoder tokens.

    Raises:
        MetadataError: naming the sequence, the value and the limit.
    """

    query_start_loc: I32
    seq_lens: I32
    block_table: I32
    slot_mapping: I64
    block_size: int = DEFAULT_BLOCK_SIZE
    encoder_start_loc: I32 | None = None
    encoder_seq_lens: I32 | None = None
    encoder_block_table: I32 | None = None
    encoder_slot_mapping: I64 | None = None
    max_query_len: int = field(init=False)
    max_seq_len: int = field(init=False)
    num_decodes: int = field(init=False)
    num_prefills: int = field(init=False)
    query_lens: I32 = field(init=False, repr=False)
    _pages: Pages = field(init=False, repr=False)
    _encoder_pages: Pages | None = field(init=False, repr=False, default=None)
    _views: dict[Kind, BatchView] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        # The caller may fill its buffers for the next step while this one is planned: kernels get what was checked.
        for name in _GIVEN:
            if isinstance(given := getattr(self, name), np.ndarray):
                object.__setattr__(self, name, given.copy())
        query_lens = _check_start_loc("query_start_loc", self.query_start_loc)
        pages = Pages.checked(
            "", self.block_size, self.seq_lens, self.block_table, self.slot_mapping, self.query_start_loc, query_lens
        )
        num_decodes = int(np.count_nonzero(query_lens <= 1))
        for name, value in (
            ("block_table", pages.block_table),
            ("max_query_len", int(query_lens.max(initial=0))),
            ("max_seq_len", int(self.seq_lens.max(initial=0))),
            ("num_decodes", num_decodes),
            ("num_prefills", len(query_lens) - num_decodes),
            ("query_lens", query_lens),
            ("_pages", pages),
        ):
            object.__setattr__(self, name, value)
        self._check_encoder(len(query_lens))

    def _check_encoder(self, num_seqs: int) -> None:
        given = (self.encoder_start_loc, self.encoder_seq_lens, self.encoder_block_table, self.encoder_slot_mapping)
        if all(array is None for array in given):
            return
        if any(array is None for array in given):
            raise MetadataError(
                "encoder_start_loc, _seq_lens, _block_table and _slot_mapping come together or not at all"
            )
        start, lens, table, slots = given
        assert start is not None
        new = _check_start_loc("encoder_start_loc", start)
        if len(new) != num_seqs:
            raise MetadataError(f"encoder_start_loc speaks of {len(new)} sequences, query_start_loc of {num_seqs}")
        pages = Pages.checked("encoder_", self.block_size, lens, table, slots, start, new)
        object.__setattr__(self, "encoder_block_table", pages.block_table)
        object.__setattr__(self, "_encoder_pages", pages)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int] | I32,
        seq_lens: Sequence[int] | I32,
        block_tables: Sequence[Sequence[int]] | I32 | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        *,
        slot_mapping: Sequence[int] | I64 | None = None,
        num_blocks: int | None = None,
        encoder_query_lens: Sequence[int] | I32 | None = None,
        encoder_seq_lens: Sequence[int] | I32 | None = None,
        encoder_block_tables: Sequence[Sequence[int]] | I32 | None = None,
    ) -> Self:
        """Make a batch from what an engine knows of each sequence.

        Args:
            query_lens: new tokens of each sequence in this step.
            seq_lens: its tokens in the cache after this step (those computed before plus the new ones).
            block_tables: its blocks, in order; more than it needs is fine. None for a batch without a cache (encoders).
            block_size: B.
            slot_mapping: i64[T] when some new tokens must not be written (-1); otherwise it follows from the tables.
            num_blocks: the cache's size, to have block ids checked against it here rather than at `run`.
            encoder_query_lens: encoder tokens of each sequence that are new in this step (default: all of
                `encoder_seq_lens`; 0 once they are in the cache).
            encoder_seq_lens: encoder tokens that its cross layers attend to.
            encoder_block_tables: the blocks that hold their keys and values.

        Raises:
            MetadataError: naming the sequence, the value and the limit.
        """
        block_size = _block_size(block_size)
        lens = as_lengths("query_lens", query_lens)
        totals = as_lengths("seq_lens", seq_lens)
        _same_count("seq_lens", len(totals), len(lens))
        start = _start_loc(lens)
        table = as_table("block_tables", block_tables, totals, block_size)
        if slot_mapping is not None:
            slots = check_array("slot_mapping", np.asarray(slot_mapping, dtype=np.int64), np.int64, 1)
        elif block_tables is None:
            slots = np.full(int(start[-1]), -1, dtype=np.int64)
        else:
            slots = table_slots("", block_size, start, lens, totals, table)
        encoder: dict[str, npt.NDArray[np.signedinteger]] = {}
        if encoder_seq_lens is not None:
            totals_e = as_lengths("encoder_seq_lens", encoder_seq_lens)
            _same_count("encoder_seq_lens", len(totals_e), len(lens))
            new_e = totals_e if encoder_query_lens is None else as_lengths("encoder_query_lens", encoder_query_lens)
            _same_count("encoder_query_lens", len(new_e), len(lens))
            start_e = _start_loc(new_e)
            table_e = as_table("encoder_block_tables", encoder_block_tables, totals_e, block_size)
            slots_e = (
                np.full(int(start_e[-1]), -1, dtype=np.int64)
                if encoder_block_tables is None
                else table_slots("encoder_", block_size, start_e, new_e, totals_e, table_e)
            )
            encoder = {
                "encoder_start_loc": start_e,
                "encoder_seq_lens": totals_e,
                "encoder_block_table": table_e,
                "encoder_slot_mapping": slots_e,
            }
        elif encoder_query_lens is not None or encoder_block_tables is not None:
            raise MetadataError("encoder_query_lens and encoder_block_tables need encoder_seq_lens beside them")
        batch = cls(
            query_start_loc=start,
            seq_lens=totals,
            block_table=table,
            slot_mapping=slots,
            block_size=block_size,
            **encoder,
        )
        if num_blocks is not None:
            batch.view("decoder").pages.check_fits(num_blocks)
            if encoder_seq_lens is not None:
                batch.view("cross").pages.check_fits(num_blocks)
        return batch

    @property
    def num_seqs(self) -> int:
        """Sequences, S."""
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """Query tokens of the whole batch, T."""
        return int(self.query_start_loc[-1])

    @property
    def context_lens(self) -> I32:
        """Tokens that were in the cache before this step, i32[S]."""
        context: I32 = np.maximum(self.seq_lens - self.query_lens, 0)
        return context

    @property
    def highest_block(self) -> int:
        """The highest block id that a sequence uses (-1: none)."""
        return self._pages.highest_block

    def view(self, kind: Kind) -> BatchView:
        """Return the batch as a layer of this kind sees it (made once).

        Raises:
            MetadataError: a cross layer, and the batch has no encoder lengths; an encoder layer, and a sequence has
                tokens before this step's.
        """
        found = self._views.get(kind)
        if found is None:
            found = self._views[kind] = self._make_view(kind)
        return found

    def _make_view(self, kind: Kind) -> BatchView:
        pages = self._pages
        if kind == "decoder":
            return BatchView(
                query_start_loc=self.query_start_loc,
                kv_lens=self.seq_lens,
                new_start_loc=self.query_start_loc,
                pages=pages,
            )
        if self.encoder_start_loc is not None:
            assert self.encoder_seq_lens is not None
            assert self._encoder_pages is not None
            pages = self._encoder_pages
            start, lens = self.encoder_start_loc, self.encoder_seq_lens
        elif kind == "cross":
            raise MetadataError("a cross layer needs a batch with encoder_seq_lens and encoder_block_tables")
        else:
            start, lens = self.query_start_loc, self.seq_lens
        if kind == "cross":
            return BatchView(query_start_loc=self.query_start_loc, kv_lens=lens, new_start_loc=start, pages=pages)
        new = np.diff(start)
        # Encoder tokens that were encoded in an earlier step have no row in this one: they take no part.
        partial = np.flatnonzero((new != lens) & (new > 0) & (lens > 0))
        if len(partial):
            s = int(partial[0])
            raise MetadataError(
                f"sequence {s}: an encoder layer sees {int(lens[s])} tokens but {int(new[s])} are in this step; "
                "encoders cannot be computed in chunks: give all tokens at once"
            )
        return BatchView(
            query_start_loc=start, kv_lens=np.minimum(lens, new).astype(np.int32), new_start_loc=start, pages=pages
        )

    def split(self, decode_query_len: int = 1) -> tuple[BatchPart, BatchPart]:
        """Return the decodes (at most `decode_query_len` new tokens) and the prefills, each as a batch of its own.

        An engine that puts its decodes first (or last) gets slices: nothing is copied on either side.
        """
        is_decode = self.query_lens <= decode_query_len
        return self._part(np.flatnonzero(is_decode)), self._part(np.flatnonzero(~is_decode))

    def _part(self, sequences: npt.NDArray[np.intp]) -> BatchPart:
        chosen: slice | npt.NDArray[np.intp] = sequences
        tokens: slice | npt.NDArray[np.intp]
        start, lens = self.query_start_loc, self.query_lens[sequences]
        if not len(sequences) or sequences[-1] - sequences[0] + 1 == len(sequences):
            first = int(sequences[0]) if len(sequences) else 0
            chosen = slice(first, first + len(sequences))
            tokens = slice(int(start[first]), int(start[first + len(sequences)]))
        else:
            tokens = np.concatenate([np.arange(start[s], start[s + 1], dtype=np.intp) for s in sequences])
        encoder: dict[str, npt.NDArray[np.signedinteger]] = {}
        if self.encoder_start_loc is not None:
            assert self.encoder_seq_lens is not None
            assert self.encoder_block_table is not None
            assert self.encoder_slot_mapping is not None
            new = np.diff(self.encoder_start_loc)
            rows = np.repeat(np.isin(np.arange(self.num_seqs), sequences), new)
            encoder = {
                "encoder_start_loc": _start_loc(new[sequences]),
                "encoder_seq_lens": self.encoder_seq_lens[chosen],
                "encoder_block_table": self.encoder_block_table[chosen],
                "encoder_slot_mapping": self.encoder_slot_mapping[rows],
            }
        part = AttentionMetadata(
            query_start_loc=_start_loc(lens),
            seq_lens=self.seq_lens[chosen],
            block_table=self.block_table[chosen],
            slot_mapping=self.slot_mapping[tokens],
            block_size=self.block_size,
            **encoder,
        )
        return BatchPart(part, chosen, tokens)


def _block_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise MetadataError(f"block_size={value!r} must be a positive integer")
    return int(value)


def _same_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise MetadataError(f"{name} speaks of {found} sequences, query_lens of {expected}")


def _start_loc(lens: I32) -> I32:
    start = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=start[1:])
    return start


def _check_start_loc(name: str, start: object) -> I32:
    """Check an array of offsets and return the lengths between them, i32[S]."""
    offsets = check_array(name, start, np.int32, 1)
    if len(offsets) < 1 or offsets[0] != 0:
        raise MetadataError(f"{name} must begin with 0 and have one entry more than there are sequences")
    lens = np.diff(offsets)
    if len(lens) and lens.min() < 0:
        s = int(np.argmax(lens < 0))
        raise MetadataError(
            f"{name}: sequence {s} ends at {int(offsets[s + 1])}, before it begins at {int(offsets[s])}"
        )
    return lens
