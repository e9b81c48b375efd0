"""A batch as the kernel wants it: sequences that ask for nothing left out, sizes rounded up, one vector of integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import PlanError

from .tiles import SMEM_BYTES, bucket, table_bytes

__all__ = ["Batch", "pack"]

I32 = npt.NDArray[np.int32]

NOWHERE = np.int32(2**31 - 1)
"""The slot of a row that is not written: outside every cache."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One step, packed.

    Attributes:
        integers: i32: slots, lengths, page table, row starts, count of sequences, and which rows are valid.
        tokens, sequences, pages_per_seq: the sizes that it was rounded up to.
        masks_rows: some rows attend to nothing, and `integers` ends with which do.
    """

    integers: I32
    tokens: int
    sequences: int
    pages_per_seq: int
    masks_rows: bool


def pack(spec: AttentionSpec, view: BatchView, token_floor: int) -> Batch:
    """Return the batch for the kernel.

    Raises:
        PlanError: its page table is larger than the scalar memory that the kernel reads it from.
    """
    asks = view.query_lens > 0
    query_lens, table = view.query_lens[asks], view.pages.block_table[asks]
    # The kernel waits for the pages of every sequence that it is told of, so none may be empty. A padding sequence is
    # given as many keys as it has rows (block 0 again and again), and what comes out for those rows is zeroed.
    empty = view.kv_lens[asks] == 0
    kv_lens = np.where(empty, query_lens, view.kv_lens[asks])
    longest = int(kv_lens.max(initial=1))
    tokens = bucket(max(view.num_tokens, 1), token_floor, 512)
    sequences = bucket(max(len(query_lens), 1), 8, 256)
    pages_per_seq = bucket(-(-longest // spec.block_size), 8, 128)
    if table_bytes(sequences, pages_per_seq) > SMEM_BYTES:
        raise PlanError(
            f"{len(query_lens)} sequences of up to {longest} tokens in blocks of {spec.block_size} need a page table of "
            f"{sequences} x {pages_per_seq}, {table_bytes(sequences, pages_per_seq)} bytes in all; a TPU core's scalar "
            f"memory has {SMEM_BYTES}. Use larger blocks, or split the batch"
        )
    slots = np.full(tokens, NOWHERE, np.int32)
    used = view.pages.slot_mapping
    slots[: len(used)] = np.where(used < 0, NOWHERE, used)
    lengths = np.zeros(sequences, np.int32)
    lengths[: len(kv_lens)] = kv_lens
    pages = np.zeros((sequences, pages_per_seq), np.int32)
    width = min(table.shape[1], pages_per_seq)
    pages[: len(table), :width] = table[:, :width]
    starts = np.full(sequences + 1, view.num_tokens, np.int32)
    starts[0] = 0
    starts[1 : len(query_lens) + 1] = np.cumsum(query_lens)
    parts = [slots, lengths, pages.reshape(-1), starts, np.array([len(query_lens)], np.int32)]
    if empty.any():
        valid = np.ones(tokens, np.int32)
        valid[: view.num_tokens] = np.repeat(~empty, query_lens)
        parts.append(valid)
    return Batch(np.concatenate(parts), tokens, sequences, pages_per_seq, bool(empty.any()))
