"""A batch as the kernels want it: no empty sequences, sizes rounded up, all integers in one vector. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.adapters.batch import HostBatch, query_rows, split_decodes, start_loc
from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import PlanError

from .tiles import SMEM_BYTES, bucket, table_bytes

__all__ = ["BatchShape", "PackedBatch", "pack"]

I32 = npt.NDArray[np.int32]

NOWHERE = np.int32(2**31 - 1)
"""The slot of a row that is not written, or not there: outside every cache."""


@dataclass(frozen=True)
class BatchShape:
    """What a program is compiled for, of a batch.

    Attributes:
        tokens, sequences, pages_per_seq: the sizes that it was rounded up to.
        masks_rows: some rows attend to nothing.
        permutes: the kernel gets the rows in another order.
        writes_last: every sequence's new tokens are its last and all are written: a kernel may write them itself.
        locates_rows: the vector says where each row's own token lies in the cache.
    """

    tokens: int
    sequences: int
    pages_per_seq: int
    masks_rows: bool
    permutes: bool
    writes_last: bool
    locates_rows: bool

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """What is in the vector, in order, and how many integers of it."""
        tokens, sequences = self.tokens, self.sequences
        return (
            ("slots", tokens),  # where each new row is written
            ("lengths", sequences),  # keys of each sequence
            ("table", sequences * self.pages_per_seq),
            ("starts", sequences + 1),  # rows of each sequence
            ("counts", 2),  # sequences, and how many of the first are decodes
            ("valid", tokens if self.masks_rows else 0),
            ("order", tokens if self.permutes else 0),  # which row comes first, second... in the kernel
            ("back", tokens if self.permutes else 0),  # and where each row went
            ("own", tokens if self.locates_rows else 0),  # the slot of each row's own token
        )


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One step's batch as one vector, and its sizes."""

    integers: I32
    shape: BatchShape


def pack(spec: AttentionSpec, view: BatchView, *, fused: bool, token_floor: int) -> PackedBatch:
    """Return the batch for a kernel.

    Args:
        spec: the layer.
        view: the batch as it sees it.
        fused: for a kernel that wants decodes first and each row's own key and value.
        token_floor: the fewest rows.

    Raises:
        PlanError: its block table is larger than the scalar memory that the kernel reads it from.
    """
    host = HostBatch.of(view, spec, paged=True)
    total = host.num_tokens
    # All of them, in the order that the kernel wants.
    chosen = np.arange(host.num_seqs)
    decodes, longer = split_decodes(np.diff(host.query_start)) if fused else (chosen[:0], chosen)
    order = np.arange(total)
    if len(decodes):
        chosen = np.concatenate([decodes, longer])
        order = np.concatenate([order[query_rows(host.query_start, some)] for some in (decodes, longer)])
    permutes = bool((np.diff(chosen) < 0).any())
    lens, query_lens = host.lens[chosen], np.diff(host.query_start)[chosen]
    writes_last = fused and spec.writes_kv and view.side.num_written == total
    tokens = bucket(max(total, view.num_new, 1), token_floor, 512)
    sequences = bucket(max(host.num_seqs, 1), 8, 256)
    pages_per_seq = bucket(-(-max(host.max_keys, 1) // spec.block_size), 8, 128)
    if table_bytes(sequences, pages_per_seq) > SMEM_BYTES:
        raise PlanError(
            f"{host.num_seqs} sequences of up to {host.max_keys} tokens in blocks of {spec.block_size} need a block "
            f"table of {sequences} x {pages_per_seq}, {table_bytes(sequences, pages_per_seq)} bytes in all; a TPU "
            f"core's scalar memory has {SMEM_BYTES}. Use larger blocks, or split the batch"
        )
    shape = BatchShape(
        tokens, sequences, pages_per_seq, host.idle is not None, permutes, writes_last, fused and not writes_last
    )
    table = np.zeros((sequences, pages_per_seq), np.int32)
    table[: len(chosen), : host.tables.shape[1]] = host.tables[chosen]
    starts = start_loc(query_lens)
    slots = view.side.slots
    parts: dict[str, npt.NDArray[np.integer]] = {
        "slots": _padded(tokens, NOWHERE, np.where(slots < 0, NOWHERE, slots)),
        "lengths": _padded(sequences, 0, lens),
        "table": table.reshape(-1),
        "starts": _padded(sequences + 1, total, starts),
        "counts": np.array([len(chosen), len(decodes)]),
    }
    if host.idle is not None:
        parts["valid"] = _padded(tokens, 0, ~host.idle)
    if permutes:
        order = np.concatenate([order, np.arange(total, tokens)])
        parts |= {"order": order, "back": np.argsort(order)}
    if shape.locates_rows:
        sequence = np.repeat(np.arange(len(chosen)), query_lens)
        position = np.arange(total) + (lens - query_lens - starts[:-1])[sequence]
        block = table[sequence, position // spec.block_size].astype(np.int64)
        parts["own"] = _padded(tokens, NOWHERE, block * spec.block_size + position % spec.block_size)
    return PackedBatch(np.concatenate([parts[name] for name, size in shape.parts if size]).astype(np.int32), shape)


def _padded(size: int, value: int | np.int32, head: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    whole = np.full(size, value, np.int64)
    whole[: len(head)] = head
    return whole
