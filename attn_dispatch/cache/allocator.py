"""`BlockAllocator`: live sequences, their blocks and cached prefixes; what of the manager is not about steps."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable

from attn_dispatch.cache.pool import BlockPool, Scrub
from attn_dispatch.cache.radix import Node, PrefixTree
from attn_dispatch.cache.sequence import Sequence, as_tokens
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import CacheError

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Blocks of sequences that begin, fork, shrink and end, and of the cached prefixes.

    Invariants between calls, tested as such: a sequence's computed tokens fill exactly its blocks; its full blocks
    are the path of its prefix in the tree (with prefix caching); a block's reference count is the number of block
    tables that contain it, and it is free when that is 0 and the tree does not contain it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        *,
        prefix_caching: bool = True,
        host_blocks: int = 0,
        scrub: Scrub | None = None,
    ) -> None:
        """Start with all blocks free.

        Args:
            num_blocks: N, 1 or more.
            block_size: B.
            prefix_caching: full blocks stay after their sequence has ended and are found again by their tokens.
            host_blocks: blocks of swap space in host memory.
            scrub: called with the ids of device blocks that have become free, before another sequence gets them: to
                overwrite one tenant's data. If it raises, the call that freed them has taken effect nevertheless,
                and they are scrubbed before they are allocated again. Blocks that `swap_out` frees are scrubbed when
                they are next allocated, since the caller copies them first.

        Raises:
            CacheError: a size is not a whole number, or too small.
        """
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CacheError(f"{name}={value!r} must be a whole number, 1 or more")
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks, scrub)
        self.host_pool = BlockPool(host_blocks)
        self.tree = PrefixTree()
        self._alive: dict[int, Sequence] = {}
        self._numbers = itertools.count()
        self._evicted = 0

    @property
    def num_blocks(self) -> int:
        """N of the caches."""
        return self.pool.num_blocks

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those that are alive, oldest first."""
        return tuple(self._alive.values())

    def begin(self, tokens: Iterable[int], *, tenant: Hashable = None, cacheable: bool = True) -> Sequence:
        """Begin a sequence. It takes no blocks before its first step, which finds what is cached of it.

        Args:
            tokens: its prompt.
            tenant: whose cached prefixes it may use, and who may use its own. Nothing is shared between tenants, so
                that the time of one's prompt tells nothing about another's. 1, True and 1.0 are three tenants.
            cacheable: False keeps it out of the prefix cache (its token ids are not known, say).

        Raises:
            CacheError: the tokens are not whole numbers, or the tenant cannot be hashed.
        """
        seq = Sequence(next(self._numbers), as_tokens(tokens), tenant, cacheable)
        self._alive[seq.id] = seq
        return seq

    def append(self, seq: Sequence, tokens: Iterable[int]) -> None:
        """Add tokens (sampled, drafted, the user's next turn) that a later step computes."""
        self._check(seq)
        seq.extend_tokens(as_tokens(tokens))

    def cached_tokens(self, seq: Sequence) -> int:
        """Return how many tokens of a sequence would not have to be computed if it ran now."""
        self._check(seq)
        return max(seq.computed, self._cached(seq)[1] * self.block_size)

    def acquire_cached_prefix(self, seq: Sequence) -> None:
        """Give a sequence the blocks that are cached of its prompt now, so that they are not evicted before it runs.

        Raises:
            CacheError: it is swapped out, or a step of it is not committed.
        """
        self._check(seq, ready=True)
        self._match(seq)

    def without_common_prefix(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Return those of these sequences, in order, of which none is about to compute what one before it computes.

        The others need not: once those have been computed, they find it in the cache.
        """
        names: set[Hashable] = set()
        chosen = []
        for seq in sequences:
            self._check(seq)
            node, index = self._cached(seq)
            end = (index + 1) * self.block_size
            if self._caches(seq) and end <= seq.length:
                name = (seq.tenant_key, None if node is None else node.block, seq.key(index, self.block_size))
                if name in names and end < seq.length and self._at_prefix(seq):
                    continue
                names.add(name)
            chosen.append(seq)
        return chosen

    def fork(self, seq: Sequence, count: int = 1) -> list[Sequence]:
        """Return sequences that go on from where this one is, on the same blocks (beam search, parallel sampling).

        Raises:
            CacheError: the sequence is swapped out, or a step of it is not committed.
        """
        self._check(seq, ready=True)
        forks = []
        for _ in range(count):
            other = seq.copy(next(self._numbers))
            self.pool.acquire(other.blocks.tolist())
            self._alive[other.id] = other
            forks.append(other)
        return forks

    def truncate(self, seq: Sequence, length: int) -> None:
        """Forget all tokens of a sequence but the first `length`: draft tokens that were rejected, a turn taken back.

        Raises:
            CacheError: it has fewer, is swapped out, or a step of it is not committed.
        """
        self._check(seq, ready=True)
        if not 0 <= length <= seq.length:
            raise CacheError(f"{seq} is to keep {length} of its {seq.length} tokens")
        seq.cut_tokens(length)
        if length < seq.computed:
            seq.computed = length
            while seq.published * self.block_size > length:
                assert seq.node is not None
                seq.node = self.tree.above(seq.node)
                seq.published -= 1
            self.pool.release(seq.cut_blocks(self._blocks_for(length)))
            self.pool.scrub_freed()

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; its tokens are kept, and are computed (or found in the cache) again later.

        A step of it that is not committed is given up.
        """
        self._check(seq)
        self._drop_blocks(seq)
        self.pool.scrub_freed()

    def free(self, seq: Sequence) -> None:
        """End a sequence. Its full blocks stay cached until room is needed."""
        self._check(seq)
        self._drop_blocks(seq)
        seq.alive = False
        del self._alive[seq.id]
        self.pool.scrub_freed()

    def grow(self, num_blocks: int) -> None:
        """Go on with caches of more blocks, whose first ones hold what they held: O(cache).

        Raises:
            CacheError: there are more already.
        """
        self.pool.grow(num_blocks)

    def clear_cache(self) -> None:
        """Forget every cached prefix that no sequence uses (the model's weights have changed, say): O(cache)."""
        self._make_room(self.pool.num_available)
        self.pool.scrub_freed()

    # For the manager.

    def _check(self, seq: Sequence, *, ready: bool = False) -> None:
        if self._alive.get(seq.id) is not seq:
            raise CacheError(f"{seq} is not alive here: it was freed, or belongs to another manager")
        if ready and seq.swapped:
            raise CacheError(f"{seq}: swap_in it first")
        if ready and seq.pending:
            raise CacheError(f"{seq} has a step that is not committed")

    def _drop_blocks(self, seq: Sequence) -> None:
        (self.host_pool if seq.swapped else self.pool).release(seq.cut_blocks(0))
        seq.computed = seq.published = seq.pending = 0
        seq.node, seq.swapped, seq.step = None, False, None

    def _caches(self, seq: Sequence) -> bool:
        return self.prefix_caching and seq.cacheable

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _next(self, seq: Sequence, node: Node | None, index: int) -> Node | None:
        """Return the cached block that a sequence could use as its block `index`, after `node`.

        Never the one that holds its last token, which a step has to compute.
        """
        if not self._caches(seq) or (index + 1) * self.block_size >= seq.length:
            return None
        return self.tree.child(node, seq.tenant_key, seq.key(index, self.block_size))

    def _at_prefix(self, seq: Sequence) -> bool:
        """Return whether a sequence could go on with cached blocks: it ends where a block of the prefix cache does."""
        return not seq.swapped and seq.num_blocks == seq.published and seq.computed == seq.published * self.block_size

    def _cached(self, seq: Sequence) -> tuple[Node | None, int]:
        """Return the last cached block of a sequence, its own or one that it could take, and how many come to there."""
        node, index = seq.node, seq.published
        if self._at_prefix(seq):
            while (child := self._next(seq, node, index)) is not None:
                node, index = child, index + 1
        return node, index

    def _match(self, seq: Sequence) -> None:
        """Give a sequence the blocks that are cached of what it would compute next."""
        if not self._at_prefix(seq):
            return
        blocks = []
        while (node := self._next(seq, seq.node, seq.published)) is not None:
            blocks.append(node.block)
            seq.node = node
            seq.published += 1
        if blocks:
            self.pool.acquire(blocks)
            seq.extend_blocks(blocks)
            seq.computed = seq.published * self.block_size

    def _publish(self, seq: Sequence) -> None:
        """Put a sequence's full blocks into the prefix cache; where it has an equal block already, share that one."""
        while self._caches(seq) and (seq.published + 1) * self.block_size <= seq.computed:
            key = seq.key(seq.published, self.block_size)
            block = int(seq.blocks[seq.published])
            node = self.tree.child(seq.node, seq.tenant_key, key)
            if node is None:
                self.pool.mark_cached(block)
                node = self.tree.add(seq.node, seq.tenant_key, key, block)
            elif node.block != block:
                self.pool.acquire([node.block])
                seq.set_block(seq.published, node.block)
                self.pool.release([block])
            seq.node = node
            seq.published += 1

    def _make_room(self, count: int) -> None:
        """Evict prefixes until `count` blocks are free; there are that many available."""
        evicted: list[int] = []
        for block in self.pool.evictable:
            if self.pool.num_free + len(evicted) >= count:
                break
            evicted.append(block)
        for block in evicted:
            self.tree.remove(block)
        self.pool.evict(evicted)
        self._evicted += len(evicted)
