"""A batch as the kernels want it: no empty sequences, sizes rounded up, all integers in one vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import PlanError

from .tiles import SMEM_BYTES, bucket, table_bytes

__all__ = ["Batch", "BatchShape", "pack"]

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
class Batch:
    """One step, packed."""

    integers: I32
    shape: BatchShape


def pack(spec: AttentionSpec, view: BatchView, *, fused: bool, token_floor: int) -> Batch:
    """Return the batch for a kernel.

    Args:
        spec: the layer.
        view: the step as it sees it.
        fused: for a kernel that wants decodes first and each row's own key and value.
        token_floor: the fewest rows.

    Raises:
        PlanError: its page table is larger than the scalar memory that the kernel reads it from.
    """
    lens = view.query_lens
    # A kernel waits for the pages of every sequence that it is told of, so none may be empty. Nobody asks for those
    # without rows; a padding sequence's rows (of length 0) come out as zeros because `valid` says so.
    empty = (lens > 0) & (view.kv_lens == 0)
    chosen = np.flatnonzero((lens > 0) & ~empty)
    decodes = int(np.count_nonzero(lens[chosen] == 1))
    if fused and decodes:
        chosen = np.concatenate([chosen[lens[chosen] == 1], chosen[lens[chosen] > 1]])
    total, rows = view.num_tokens, _rows(view, chosen)
    permutes = not np.array_equal(rows, np.arange(len(rows)))
    query_lens, kv_lens = lens[chosen], view.kv_lens[chosen]
    writes_last = fused and spec.writes_kv and view.side.num_written == len(rows)
    tokens = bucket(max(total, 1), token_floor, 512)
    sequences = bucket(max(len(chosen), 1), 8, 256)
    longest = int(kv_lens.max(initial=1))
    pages_per_seq = bucket(-(-longest // spec.block_size), 8, 128)
    if table_bytes(sequences, pages_per_seq) > SMEM_BYTES:
        raise PlanError(
            f"{len(chosen)} sequences of up to {longest} tokens in blocks of {spec.block_size} need a page table of "
            f"{sequences} x {pages_per_seq}, {table_bytes(sequences, pages_per_seq)} bytes in all; a TPU core's scalar "
            f"memory has {SMEM_BYTES}. Use larger blocks, or split the batch"
        )
    shape = BatchShape(
        tokens, sequences, pages_per_seq, bool(empty.any()), permutes, writes_last, fused and not writes_last
    )
    table = np.zeros((sequences, pages_per_seq), np.int32)
    width = min(view.side.table.shape[1], pages_per_seq)
    table[: len(chosen), :width] = view.side.table[chosen, :width]
    starts = np.full(sequences + 1, len(rows), np.int32)
    starts[0] = 0
    starts[1 : len(chosen) + 1] = np.cumsum(query_lens)
    used = view.side.slots
    made: dict[str, npt.NDArray[np.integer]] = {
        "slots": _filled(tokens, NOWHERE, np.where(used < 0, NOWHERE, used)),
        "lengths": _filled(sequences, 0, kv_lens),
        "table": table.reshape(-1),
        "starts": starts,
        "counts": np.array([len(chosen), decodes if fused else 0]),
    }
    if shape.masks_rows:
        made["valid"] = _filled(tokens, 0, np.repeat(~empty, lens))
    if permutes:
        # Rows that the kernel does not see come last, in any order.
        order = np.concatenate([rows, np.setdiff1d(np.arange(tokens), rows)])
        made |= {"order": order, "back": np.argsort(order)}
    if shape.locates_rows:
        sequence = np.repeat(np.arange(len(chosen)), query_lens)
        position = np.arange(len(rows)) + (kv_lens - query_lens - starts[: len(chosen)])[sequence]
        block = table[sequence, position // spec.block_size].astype(np.int64)
        made["own"] = _filled(tokens, NOWHERE, block * spec.block_size + position % spec.block_size)
    return Batch(np.concatenate([made[name] for name, size in shape.parts if size]).astype(np.int32), shape)


def _rows(view: BatchView, sequences: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    """Return the rows of these sequences, one after the other."""
    lens = view.query_lens[sequences].astype(np.int64)
    ends = np.cumsum(lens)
    shift = np.repeat(view.query_start_loc[sequences] - (ends - lens), lens)
    rows: npt.NDArray[np.int64] = np.arange(len(shift), dtype=np.int64) + shift
    return rows


def _filled(size: int, with_: int | np.int32, head: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    whole = np.full(size, with_, np.int64)
    whole[: len(head)] = head
    return whole
