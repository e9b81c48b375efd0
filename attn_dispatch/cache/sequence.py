"""`Sequence`: one request's tokens and blocks, as the manager keeps them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import numpy.typing as npt

from attn_dispatch.cache.radix import Node
from attn_dispatch.errors import CacheError

__all__ = ["I64", "Sequence", "as_tokens", "tenant_key"]

I64 = npt.NDArray[np.int64]


class Sequence:
    """A handle: read its attributes, change it through its manager.

    Attributes:
        id: unique within the manager.
        tenant: whose prefixes it may share.
        cacheable: whether the prefix cache may store its blocks.
        computed: tokens whose keys and values are in the cache.
        published: of its blocks, those in the prefix cache: always the first ones.
        pending: tokens of a step that is not yet committed (that `step`).
        swapped: its blocks are in host memory.
        alive: not freed.
    """

    __slots__ = (
        "_blocks", "_num_blocks", "_num_tokens", "_tokens", "alive", "cacheable", "computed", "counted", "id", "node",
        "pending", "published", "step", "swapped", "tenant", "tenant_key",
    )  # fmt: skip

    def __init__(self, number: int, tokens: I64, tenant: Hashable, cacheable: bool = True) -> None:
        self.id = number
        self.tenant = tenant
        self.tenant_key = tenant_key(tenant)
        self.cacheable = cacheable
        self.computed = 0
        self.published = 0
        self.pending = 0
        self.swapped = False
        self.alive = True
        self.counted = False  # its prompt is part of the hit rate
        self.node: Node | None = None  # of its last published block
        self.step: object = None  # compared by identity
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
        """Return a sequence with the same tokens and blocks (whose references the caller adds)."""
        other = Sequence(number, self.tokens.copy(), self.tenant, self.cacheable)
        other.computed, other.published, other.node = self.computed, self.published, self.node
        other.counted = True  # its prompt has been counted once
        other.extend_blocks(self.blocks.tolist())
        return other

    def __repr__(self) -> str:
        state = "freed" if not self.alive else "swapped out" if self.swapped else f"{self._num_blocks} blocks"
        return f"Sequence({self.id}, {self.computed} of {self._num_tokens} tokens computed, {state})"


def as_tokens(tokens: Iterable[int] | I64) -> I64:
    """Return token ids as an array that belongs to nobody else, i64[length].

    Raises:
        CacheError: they are not whole numbers of 64 bits in one dimension.
    """
    ids = np.asarray(tokens if hasattr(tokens, "__array__") else list(tokens))
    if not ids.size and ids.ndim == 1:
        return np.zeros(0, np.int64)
    if (
        ids.ndim != 1
        or ids.dtype.kind not in "iu"
        or (ids.dtype.kind == "u" and int(ids.max()) > np.iinfo(np.int64).max)
    ):
        raise CacheError(f"tokens must be whole numbers in one dimension, not {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64)


def tenant_key(tenant: Hashable) -> Hashable:
    """Return what tells tenants apart: equal values of different types (1, True, 1.0) are different tenants.

    Raises:
        CacheError: the tenant cannot be hashed.
    """
    try:
        hash(tenant)
    except TypeError as error:
        raise CacheError(f"tenant={tenant!r} must be hashable") from error
    if isinstance(tenant, tuple):
        return type(tenant), tuple(map(tenant_key, tenant))
    if isinstance(tenant, frozenset):
        return type(tenant), frozenset(map(tenant_key, tenant))
    return type(tenant), tenant
