"""`AttentionMetadata`: what one step's batch looks like, checked once, here, before any backend sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.batch_view import BatchView
from attn_dispatch.contract.host_arrays import I32, I64, as_lengths, as_slots, as_table, exact, start_loc_of
from attn_dispatch.contract.side import Side
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE, Kind
from attn_dispatch.errors import MetadataError

__all__ = ["AttentionMetadata"]

Lengths = Sequence[int] | npt.NDArray[np.integer]
Tables = Sequence[Sequence[int]] | npt.NDArray[np.integer]


@dataclass(frozen=True, init=False, eq=False)
class AttentionMetadata:
    """One step's batch. Made by `build` from plain facts; making one by hand is checked all the same.

    A sequence of length 0 whose tokens have slot -1 is padding: its rows attend to nothing (output 0, LSE -inf).
    Entries of a block table beyond a sequence's last used block may hold anything; they are stored as 0, so that a
    kernel which reads ahead stays inside the cache. All arrays are copies, and locked.

    Attributes:
        query_start_loc: i32[S + 1], where each sequence's rows begin in q; the last entry is T.
        own: the sequences' own tokens: what decoder layers write and read.
        encoder: the encoder's tokens: what encoder layers compute and cross layers write and read (None: no encoder).
        block_size: tokens in a block, B.
    """

    query_start_loc: I32
    own: Side
    encoder: Side | None
    block_size: int

    def __init__(
        self,
        *,
        query_start_loc: I32,
        seq_lens: I32,
        block_table: I32,
        slot_mapping: I64,
        block_size: int = DEFAULT_BLOCK_SIZE,
        new_start_loc: I32 | None = None,
        encoder_start_loc: I32 | None = None,
        encoder_seq_lens: I32 | None = None,
        encoder_block_table: I32 | None = None,
        encoder_slot_mapping: I64 | None = None,
        shared_writes: bool = False,
    ) -> None:
        """Check a batch that an engine has as arrays, and copy them: the engine may fill its buffers for the next step.

        Args:
            query_start_loc: i32[S + 1], rows of q per sequence.
            seq_lens: i32[S], tokens that are in the cache after this step, this step's included.
            block_table: i32[S, M], the blocks of each sequence in order.
            slot_mapping: i64[T], where each new token goes, `block * block_size + offset`; -1: not written.
            block_size: B.
            new_start_loc: i32[S + 1], rows of k and v per sequence, where they are not those of q (None: they are).
            encoder_start_loc: i32[S + 1], rows of encoder tokens that run through encoder layers, and are written by
                cross layers, in this step (None: no encoder in this batch).
            encoder_seq_lens: i32[S], encoder tokens that each sequence's cross layers attend to.
            encoder_block_table: i32[S, Me], their blocks.
            encoder_slot_mapping: i64[Te], where cross layers write the new encoder tokens.
            shared_writes: a sequence may write tokens that another one reads in this same step (an engine that hands
                out the blocks of a prefix while they are computed). Otherwise that is refused as a copy-on-write that
                was forgotten.

        Raises:
            MetadataError: naming the sequence, the value and the limit.
        """
        size = _block_size(block_size)
        start = _check_start_loc("query_start_loc", query_start_loc)
        new = start if new_start_loc is None else _check_start_loc("new_start_loc", new_start_loc)
        _same_count("new_start_loc", len(new) - 1, len(start) - 1)
        own = _checked_side("", size, new, seq_lens, block_table, slot_mapping, shared_writes)
        arrays = (encoder_start_loc, encoder_seq_lens, encoder_block_table, encoder_slot_mapping)
        encoder = None
        if any(array is not None for array in arrays):
            if any(array is None for array in arrays):
                raise MetadataError(
                    "encoder_start_loc, _seq_lens, _block_table and _slot_mapping must be given together or not at all"
                )
            start_e = _check_start_loc("encoder_start_loc", encoder_start_loc)
            _same_count("encoder_start_loc", len(start_e) - 1, len(start) - 1)
            encoder = _checked_side("encoder_", size, start_e, *arrays[1:], shared_writes)
        self._fill(start, own, encoder, size)

    def _fill(self, query_start_loc: I32, own: Side, encoder: Side | None, block_size: int) -> None:
        query_start_loc.flags.writeable = False
        self.__dict__.update(
            query_start_loc=query_start_loc, own=own, encoder=encoder, block_size=block_size, _views={}
        )

    @classmethod
    def _of(cls, query_start_loc: I32, own: Side, encoder: Side | None = None) -> Self:
        batch = cls.__new__(cls)
        batch._fill(query_start_loc, own, encoder, own.block_size)
        return batch

    @classmethod
    def build(
        cls,
        query_lens: Lengths,
        seq_lens: Lengths,
        block_tables: Tables | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        *,
        slot_mapping: Sequence[int] | I64 | None = None,
        num_blocks: int | None = None,
        encoder_query_lens: Lengths | None = None,
        encoder_seq_lens: Lengths | None = None,
        encoder_block_tables: Tables | None = None,
        shared_writes: bool = False,
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
            shared_writes: a sequence may write what another one reads in this step; see the constructor.

        Raises:
            MetadataError: naming the sequence, the value and the limit.
        """
        block_size = _block_size(block_size)
        lens = as_lengths("query_lens", query_lens)
        totals = as_lengths("seq_lens", seq_lens)
        _same_count("seq_lens", len(totals), len(lens))
        start = start_loc_of(lens)
        table = as_table("block_tables", block_tables, totals, block_size)
        slots = None if slot_mapping is None else as_slots("slot_mapping", slot_mapping)
        own = Side.of("", block_size, start, totals, table, slots, shared_writes=shared_writes)
        encoder = None
        if encoder_seq_lens is not None:
            totals_e = as_lengths("encoder_seq_lens", encoder_seq_lens)
            _same_count("encoder_seq_lens", len(totals_e), len(lens))
            new_e = totals_e if encoder_query_lens is None else as_lengths("encoder_query_lens", encoder_query_lens)
            _same_count("encoder_query_lens", len(new_e), len(lens))
            table_e = as_table("encoder_block_tables", encoder_block_tables, totals_e, block_size)
            start_e = start_loc_of(new_e)
            encoder = Side.of("encoder_", block_size, start_e, totals_e, table_e, None, shared_writes=shared_writes)
        elif encoder_query_lens is not None or encoder_block_tables is not None:
            raise MetadataError("encoder_query_lens and encoder_block_tables need encoder_seq_lens beside them")
        if num_blocks is not None:
            for side in (own, encoder):
                if side is not None:
                    side.check_fits(num_blocks)
        return cls._of(start, own, encoder)

    @classmethod
    def read_only(
        cls,
        query_lens: Lengths,
        kv_lens: Lengths,
        block_tables: Tables,
        block_size: int = DEFAULT_BLOCK_SIZE,
    ) -> Self:
        """Make a batch that writes nothing: queries [T, H, D] over keys that are in the cache, and no k and v.

        A causal layer's last query sits at the last key, as always; one that is not causal has every query see every
        key, however many queries there are.

        Args:
            query_lens: queries of each sequence.
            kv_lens: keys that they attend to.
            block_tables: the blocks that hold them, in order.
            block_size: B.

        Raises:
            MetadataError: naming the sequence, the value and the limit.
        """
        size = _block_size(block_size)
        lens, totals = as_lengths("query_lens", query_lens), as_lengths("kv_lens", kv_lens)
        _same_count("kv_lens", len(totals), len(lens))
        table = as_table("block_tables", block_tables, totals, size)
        own = Side.of("", size, np.zeros(len(lens) + 1, np.int32), totals, table, np.zeros(0, np.int64))
        return cls._of(start_loc_of(lens), own)

    @classmethod
    def write_only(cls, side: Side) -> Self:
        """Make a batch that writes one side of another batch and attends to nothing: k and v, and no rows of q."""
        return cls._of(np.zeros(len(side.lens) + 1, np.int32), side)

    @classmethod
    def of_view(cls, view: BatchView) -> Self:
        """Return a batch that layers of any kind with a cache see as this view."""
        return cls._of(view.query_start_loc, view.side, view.side)

    def advance(self, new_blocks: Mapping[int, int] | None = None) -> Self:
        """Return the next step's batch, when every sequence decodes one token further: what an engine's loop costs.

        Sequences of length 0 stay padding.

        Args:
            new_blocks: sequence -> block, for each sequence whose blocks are full: its token begins that block.

        Raises:
            MetadataError: this batch is not of decodes (one new token each), a block is missing, not needed, or
                another sequence reads it.
        """
        if self.encoder is not None or self.own.start_loc is not self.query_start_loc or self.max_query_len > 1:
            raise MetadataError("advance() is for batches of decodes: one new token in each sequence, and no encoder")
        if len(self.own.slots) != self.num_seqs:
            raise MetadataError("advance() is for batches of decodes, and a sequence of this one has no new token")
        side = self.own.advance("", {} if new_blocks is None else new_blocks)
        return self._of(side.start_loc, side)

    @property
    def seq_lens(self) -> I32:
        """Tokens that are in the cache after this step, i32[S]."""
        return self.own.lens

    @property
    def block_table(self) -> I32:
        """The blocks of each sequence in order, i32[S, M]; 0 beyond its last used block."""
        return self.own.table

    @property
    def slot_mapping(self) -> I64:
        """Where each new token goes, i64[T]; -1: not written."""
        return self.own.slots

    @property
    def encoder_start_loc(self) -> I32 | None:
        """Rows of new encoder tokens per sequence, i32[S + 1]."""
        return None if self.encoder is None else self.encoder.start_loc

    @property
    def encoder_seq_lens(self) -> I32 | None:
        """Encoder tokens that each sequence's cross layers attend to, i32[S]."""
        return None if self.encoder is None else self.encoder.lens

    @property
    def encoder_block_table(self) -> I32 | None:
        """The blocks of the encoder's tokens, i32[S, Me]."""
        return None if self.encoder is None else self.encoder.table

    @property
    def encoder_slot_mapping(self) -> I64 | None:
        """Where cross layers write the new encoder tokens, i64[Te]."""
        return None if self.encoder is None else self.encoder.slots

    @cached_property
    def query_lens(self) -> I32:
        """New tokens of each sequence, i32[S]."""
        lens = self.query_start_loc[1:] - self.query_start_loc[:-1]
        lens.setflags(write=False)
        return lens

    @cached_property
    def max_query_len(self) -> int:
        """The most new tokens of a sequence."""
        return int(self.query_lens.max(initial=0))

    @cached_property
    def max_seq_len(self) -> int:
        """The longest of `seq_lens`."""
        return int(self.seq_lens.max(initial=0))

    @cached_property
    def num_decodes(self) -> int:
        """Sequences with at most one new token."""
        return int(np.count_nonzero(self.query_lens <= 1))

    @property
    def num_prefills(self) -> int:
        """Sequences with more than one new token."""
        return self.num_seqs - self.num_decodes

    @property
    def num_seqs(self) -> int:
        """Sequences, S."""
        return len(self.own.lens)

    @property
    def num_tokens(self) -> int:
        """Query tokens of the whole batch, T."""
        return int(self.query_start_loc[-1])

    @property
    def context_lens(self) -> I32:
        """Tokens that were in the cache before this step, i32[S]."""
        context: I32 = np.maximum(self.seq_lens - self.own.new_lens, 0)
        return context

    @property
    def highest_block(self) -> int:
        """The highest block id that a sequence uses (-1: none)."""
        return self.own.highest_block

    def view(self, kind: Kind) -> BatchView:
        """Return the batch as a layer of this kind sees it (made once).

        Raises:
            MetadataError: a cross layer, and the batch has no encoder lengths; an encoder layer, and a sequence has
                tokens before this step's.
        """
        views: dict[Kind, BatchView] = self.__dict__["_views"]
        view = views.get(kind)
        if view is None:
            view = views[kind] = self._make_view(kind)
        return view

    def _make_view(self, kind: Kind) -> BatchView:
        if kind == "decoder":
            return BatchView(query_start_loc=self.query_start_loc, kv_lens=self.own.lens, side=self.own)
        if kind == "cross":
            if self.encoder is None:
                raise MetadataError("a cross layer needs a batch with encoder_seq_lens and encoder_block_tables")
            return BatchView(query_start_loc=self.query_start_loc, kv_lens=self.encoder.lens, side=self.encoder)
        side = self.own if self.encoder is None else self.encoder
        # Encoder tokens that were encoded in an earlier step have no row in this one: they take no part.
        new, lens = side.new_lens, side.lens
        partial = np.flatnonzero((new != lens) & (new > 0) & (lens > 0))
        if len(partial):
            s = int(partial[0])
            raise MetadataError(
                f"sequence {s}: an encoder layer sees {int(lens[s])} tokens but {int(new[s])} are in this step; "
                "encoders cannot be computed in chunks: give all tokens at once"
            )
        return BatchView(query_start_loc=side.start_loc, kv_lens=np.minimum(lens, new).astype(np.int32), side=side)

    def __repr__(self) -> str:
        encoder = "" if self.encoder is None else f", encoder {self.encoder.lens.tolist()}"
        return (
            f"AttentionMetadata({self.num_seqs} sequences, query_lens {self.query_lens.tolist()}, "
            f"seq_lens {self.seq_lens.tolist()}{encoder}, block_size {self.block_size})"
        )


def _checked_side(
    prefix: str, block_size: int, start: I32, lens: Any, table: Any, slots: Any, shared_writes: bool
) -> Side:
    # The caller may fill its buffers for the next step while this one is planned: kernels get copies of what was
    # checked. (A table is copied when its unused entries are cleared; without columns there is nothing to copy.)
    return Side.of(
        prefix,
        block_size,
        start,
        exact(f"{prefix}seq_lens", lens, np.int32, 1).copy(),
        exact(f"{prefix}block_table", table, np.int32, 2),
        exact(f"{prefix}slot_mapping", slots, np.int64, 1).copy(),
        shared_writes=shared_writes,
    )


def _block_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise MetadataError(f"block_size={value!r} must be a positive integer")
    return int(value)


def _same_count(name: str, length: int, expected: int) -> None:
    if length != expected:
        raise MetadataError(f"{name} has length {length}, expected {expected}: one for each sequence")


def _check_start_loc(name: str, start: object) -> I32:
    """Check an array of offsets and return a copy."""
    offsets = exact(name, start, np.int32, 1).copy()
    if len(offsets) < 1 or offsets[0] != 0:
        raise MetadataError(f"{name} must begin with 0 and have one entry more than there are sequences")
    lens = np.diff(offsets)
    if len(lens) and lens.min() < 0:
        s = int(np.argmax(lens < 0))
        raise MetadataError(
            f"{name}: sequence {s} ends at {int(offsets[s + 1])}, before it begins at {int(offsets[s])}"
        )
    return offsets
