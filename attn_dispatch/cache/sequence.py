"""`Sequence`: one request's tokens and blocks, as the manager keeps them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from attn_dispatch.cache.radix import Node
    from attn_dispatch.cache.results import Step

__all__ = ["Sequence", "as_tokens"]

I64 = npt.NDArray[np.int64]


class Sequence:
    """A handle: read its attributes, change it through its manager.

    Attributes:
        id: unique within the manager.
        tenant: whose prefixes it may share.
        computed: tokens whose keys and values are in the cache.
        published: of its blocks, those that the prefix cache keeps: always the first ones.
        pending: tokens that a step not yet committed brings (that `step`).
        swapped: its blocks are in host memory.
        alive: not freed.
    """

    __slots__ = (
        "_blocks", "_num_blocks", "_num_tokens", "_tokens", "alive", "computed", "counted", "id", "node", "pending",
        "published", "step", "swapped", "tenant",
    )  # fmt: skip

    def __init__(self, number: int, tokens: I64, tenant: Hashable) -> None:
        self.id = number
        self.tenant = tenant
        self.computed = 0
        self.published = 0
        self.pending = 0
        self.swapped = False
        self.alive = True
        self.counted = False  # its prompt is part of the hit rate
        self.node: Node | None = None  # of its last published block
        self.step: Step | None = None
        self._tokens = tokens
        self._num_tokens = len(tokens)
        self._blocks: npt.NDArray[np.int32] = np.zeros(8, np.int32)
        self._num_blocks = 0

    @property
    def tokens(self) -> I64:
        """Every token that is known, computed or not, i64[length]."""
        return self._tokens[: self._num_tokens]

    @property
    def length(self) -> int:
        """Tokens that are known."""
        return self._num_tokens

    @property
    def remaining(self) -> int:
        """Tokens that are known and not computed."""
        return self._num_tokens - self.computed

    @property
    def blocks(self) -> npt.NDArray[np.int32]:
        """Its block table, i32[blocks] (of host blocks while it is swapped out)."""
        return self._blocks[: self._num_blocks]

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return self._num_blocks

    def key(self, index: int, block_size: int) -> bytes:
        """Return the tokens of its block `index`, as the prefix cache compares them."""
        return self._tokens[index * block_size : (index + 1) * block_size].tobytes()

    # What follows is the manager's.

    def extend_tokens(self, tokens: I64) -> None:
        """Append tokens."""
        end = self._num_tokens + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate([self.tokens, np.zeros(max(end, 64), np.int64)])
        self._tokens[self._num_tokens : end] = tokens
        self._num_tokens = end

    def cut_tokens(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self._num_tokens = length

    def extend_blocks(self, blocks: list[int]) -> None:
        """Append blocks."""
        end = self._num_blocks + len(blocks)
        if end > len(self._blocks):
            self._blocks = np.concatenate([self.blocks, np.zeros(max(end, 8), np.int32)])
        self._blocks[self._num_blocks : end] = blocks
        self._num_blocks = end

    def cut_blocks(self, count: int) -> list[int]:
        """Forget all blocks but the first `count`; return the others, the last one first."""
        gone: list[int] = self._blocks[count : self._num_blocks][::-1].tolist()
        self._num_blocks = count
        return gone

    def set_block(self, index: int, block: int) -> None:
        """Replace a block."""
        self._blocks[index] = block

    def copy(self, number: int) -> Sequence:
        """Return a sequence with the same tokens and blocks (whose holders the caller counts)."""
        other = Sequence(number, self.tokens.copy(), self.tenant)
        other.computed, other.published, other.node = self.computed, self.published, self.node
        other.counted = True  # its prompt has been counted once
        other.extend_blocks(self.blocks.tolist())
        return other

    def __repr__(self) -> str:
        state = "freed" if not self.alive else "swapped out" if self.swapped else f"{self._num_blocks} blocks"
        return f"Sequence({self.id}, {self.computed} of {self._num_tokens} tokens computed, {state})"


def as_tokens(tokens: Iterable[int] | I64) -> I64:
    """Return token ids as an array that belongs to nobody else, i64[length]."""
    listed = tokens if isinstance(tokens, np.ndarray) else list(tokens)
    return np.array(listed, dtype=np.int64).reshape(-1)
