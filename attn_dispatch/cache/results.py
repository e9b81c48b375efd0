"""What the manager answers: a step, a swap, that there is no room, figures of use."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from attn_dispatch.contract import AttentionMetadata
from attn_dispatch.contract.pages import I32

if TYPE_CHECKING:
    from attn_dispatch.cache.sequence import Sequence

__all__ = ["Exhausted", "Step", "Swap", "Usage"]


@dataclass(frozen=True)
class Exhausted:
    """There are not enough blocks; nothing has been changed. False in a condition, so that `if not step:` reads well.

    Attributes:
        needed: blocks that the call would have taken.
        free: blocks that it could have had: free ones, and cached ones that are not the prefixes it would use itself.
        where: "device", or "host" for swap space.
    """

    needed: int
    free: int
    where: str = "device"

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return (
            f"{self.needed} {self.where} blocks are needed, {self.free} can be had: "
            "free, preempt or swap out a sequence"
        )


@dataclass(frozen=True, eq=False)
class Step:
    """One step, ready for `AttentionMetadata`: run it, then `commit` it.

    Attributes:
        sequences: in the batch's order.
        query_lens: i32[S], tokens that each computes in this step.
        seq_lens: i32[S], tokens in the cache after it.
        block_table: i32[S, M], 0 beyond each sequence's blocks.
        block_size: B.
        copy_from, copy_to: blocks to copy in every layer's cache before the step runs
            (`cache.copy_blocks(step.copy_from, step.copy_to)`): a sequence writes into blocks of its own only.
    """

    sequences: tuple[Sequence, ...]
    query_lens: I32
    seq_lens: I32
    block_table: I32
    block_size: int
    copy_from: list[int] = field(default_factory=list)
    copy_to: list[int] = field(default_factory=list)

    @cached_property
    def metadata(self) -> AttentionMetadata:
        """The batch, as a plan takes it."""
        return AttentionMetadata.build(self.query_lens, self.seq_lens, self.block_table, self.block_size)

    @property
    def num_tokens(self) -> int:
        """Rows of q, T."""
        return int(self.query_lens.sum())

    @cached_property
    def tokens(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The ids of the step's tokens, i64[T]: what the model's embedding takes."""
        rows = [
            seq.tokens[end - new : end]
            for seq, new, end in zip(self.sequences, self.query_lens.tolist(), self.seq_lens.tolist(), strict=True)
        ]
        return np.concatenate(rows) if rows else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Swap:
    """Blocks to copy between the device's cache and the host's, in every layer, before the next step runs.

    Attributes:
        pairs: (source, target): of `device.swap_blocks(host, pairs)` after `swap_out`, of
            `host.swap_blocks(device, pairs)` after `swap_in`.
    """

    pairs: tuple[tuple[int, int], ...]

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Usage:
    """Figures of the moment, and counts since the start.

    Attributes:
        num_blocks: N.
        free_blocks: hold nothing.
        cached_blocks: hold a prefix that no sequence uses now; evicted when room is needed.
        held_blocks: belong to at least one sequence.
        shared_blocks: belong to several.
        unused_slots: slots of held blocks that hold no token.
        waste: `unused_slots` as a share of all slots of held blocks.
        prompt_tokens: tokens of sequences that have begun to run.
        hit_tokens: those of them that were found in the cache.
        evicted_blocks, copied_blocks, swapped_blocks: counts.
        host_free_blocks: of the swap space.
    """

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    shared_blocks: int
    unused_slots: int
    waste: float
    prompt_tokens: int
    hit_tokens: int
    evicted_blocks: int
    copied_blocks: int
    swapped_blocks: int
    host_free_blocks: int

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that did not have to be computed."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
