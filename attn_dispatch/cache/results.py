"""Results of the cache manager: a scheduled step, a swap, a lack of blocks, figures of use."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from attn_dispatch.cache.sequence import I64, Sequence
from attn_dispatch.contract import AttentionMetadata
from attn_dispatch.contract.side import I32

__all__ = ["OutOfBlocks", "ScheduledStep", "Swap", "Usage"]


@dataclass(frozen=True)
class OutOfBlocks:
    """There are not enough blocks; nothing has been changed. False in a condition, so that `if not step:` reads well.

    Attributes:
        needed: blocks that the call would have allocated.
        free: blocks that were available: free ones, and evictable ones that are not the prefixes it would use itself.
        where: "device", or "host" for swap space.
    """

    needed: int
    free: int
    where: str = "device"

    def __bool__(self) -> Literal[False]:
        return False

    def __str__(self) -> str:
        return (
            f"{self.needed} {self.where} blocks are needed, {self.free} {'is' if self.free == 1 else 'are'} available: "
            "free, preempt or swap out a sequence"
        )


@dataclass(frozen=True, eq=False)
class ScheduledStep:
    """One step, ready for `AttentionMetadata`: run it, then `commit` it.

    Attributes:
        sequences: in the batch's order.
        query_lens: i32[S], tokens that each computes in this step.
        seq_lens: i32[S], tokens in the cache after it.
        tokens: i64[T], the ids of the tokens that it computes: what the model's embedding takes.
        block_table: i32[S, M], 0 beyond each sequence's blocks.
        block_size: B.
        completes: bool[S], whether all that is known of each sequence is computed by this step.
        copy_from, copy_to: blocks to copy in every layer's cache before the step runs
            (`cache.copy_blocks(step.copy_from, step.copy_to)`): a sequence writes into blocks of its own only.
    """

    sequences: tuple[Sequence, ...]
    query_lens: I32
    seq_lens: I32
    tokens: I64
    block_table: I32
    block_size: int
    completes: npt.NDArray[np.bool_]
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
    def positions(self) -> I64:
        """Each token's place in its sequence, i64[T]."""
        ends = np.cumsum(self.query_lens)
        return np.arange(self.num_tokens) + np.repeat(self.seq_lens - ends, self.query_lens)

    @property
    def last_rows(self) -> I64:
        """Rows of q after which a token is sampled, i64: the last one of each sequence that the step completes."""
        return (np.cumsum(self.query_lens, dtype=np.int64) - 1)[self.completes]

    def __bool__(self) -> Literal[True]:
        return True


@dataclass(frozen=True)
class Swap:
    """Blocks to copy between the device's cache and the host's, in every layer, before the next step runs.

    With a `scrub` callback, before the next call that allocates device blocks: it overwrites those swapped out.

    Attributes:
        pairs: (source, target): of `device.swap_blocks(host, pairs)` after `swap_out`, of
            `host.swap_blocks(device, pairs)` after `swap_in`.
    """

    pairs: tuple[tuple[int, int], ...]

    def __bool__(self) -> Literal[True]:
        return True


@dataclass(frozen=True)
class Usage:
    """Figures of the moment, and counts since the start.

    Attributes:
        num_blocks: N.
        free_blocks: store nothing.
        cached_blocks: store a prefix that no sequence uses now; evicted when room is needed.
        used_blocks: referenced by at least one sequence.
        shared_blocks: referenced by several.
        unused_slots: slots of used blocks without a token.
        waste: `unused_slots` as a share of all slots of used blocks.
        prompt_tokens: tokens of sequences that have begun to run.
        hit_tokens: those of them that were found in the cache.
        evicted_blocks, copied_blocks, swapped_blocks: counts.
        host_free_blocks: of the swap space.
    """

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
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
