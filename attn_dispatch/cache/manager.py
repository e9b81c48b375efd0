"""`CacheManager`: steps over sequences that share one pool of blocks, swap space, figures of use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from attn_dispatch.cache.allocator import BlockAllocator
from attn_dispatch.cache.pool import BlockPool
from attn_dispatch.cache.radix import Node
from attn_dispatch.cache.results import OutOfBlocks, ScheduledStep, Swap, Usage
from attn_dispatch.cache.sequence import Sequence
from attn_dispatch.errors import CacheError

__all__ = ["CacheManager"]


class CacheManager(BlockAllocator):
    """Which blocks store which sequence's tokens, for as many layers as share the block ids.

        seq = manager.begin(prompt_tokens)
        step = manager.step([seq])                      # or OutOfBlocks
        cache.copy_blocks(step.copy_from, step.copy_to) # in every layer
        attn.run(attn.plan(step.metadata), q, k, v, cache)
        manager.commit(step)
        manager.append(seq, [sampled]); ...; manager.free(seq)

    Copies that a call returns are made before the next step runs, in the order of the calls (with a `scrub` callback:
    before the next call). Every call costs time in
    proportion to the tokens and blocks of the sequences that it names, whatever else is in the cache. Not thread-safe.

    Attributes:
        num_blocks: N of the caches.
        block_size: B.
        prefix_caching: full blocks are found again by their tokens.
        pool, host_pool: reference counts of the blocks.
        tree: the cached prefixes.
    """

    _prompt_tokens = _hit_tokens = _copied = _swapped = 0

    def step(self, requests: Iterable[Sequence | tuple[Sequence, int]]) -> ScheduledStep | OutOfBlocks:
        """Give sequences room for their next tokens.

        A block that is not the sequence's alone is copied before it is written into (copy-on-write).

        Args:
            requests: sequences, each with the most tokens to compute (default: all that it knows). What is found in the
                cache is not computed; the last known token always is, since its output is what a step is for.

        Returns:
            The step, or `OutOfBlocks` when there is no room for it, and then nothing has changed (nor when this
            raises, except that cached prefixes may have been evicted).

        Raises:
            CacheError: a sequence is named twice, is swapped out, has nothing to compute, or has a step that is not
                committed. Nothing has changed.
        """
        limits = [item if isinstance(item, tuple) else (item, item.length) for item in requests]
        sequences = [seq for seq, _ in limits]
        for seq, limit in limits:
            self._check(seq, ready=True)
            if seq.remaining < 1 or limit < 1:
                raise CacheError(f"{seq} has nothing to compute (limit {limit}): append a token first")
        if len({seq.id for seq in sequences}) != len(sequences):
            raise CacheError("a sequence is named twice in one step")
        before = [(seq.computed, seq.published, seq.node) for seq in sequences]
        try:
            step = self._schedule(limits)
        except BaseException:
            self._restore(sequences, before)
            raise
        if isinstance(step, OutOfBlocks):
            self._restore(sequences, before)
            return step
        for seq in sequences:
            seq.step = step
            if not seq.counted:
                seq.counted = True
                self._prompt_tokens += seq.length
                self._hit_tokens += seq.computed
        return step

    def try_admit(self, seq: Sequence, max_tokens: int, *, reserved: int = 0) -> bool:
        """Give a waiting sequence what is cached of it, if there is room for all that it may become.

        Args:
            seq: it takes no other blocks before its first step.
            max_tokens: tokens that it may have in the cache in the end.
            reserved: blocks that running sequences were promised and do not have yet.

        Returns:
            Whether there is; if not, it has no more blocks than before.

        Raises:
            CacheError: it is swapped out, or a step of it is not committed.
        """
        self._check(seq, ready=True)
        before = (seq.computed, seq.published, seq.node)
        self._match(seq)
        if self._blocks_for(max_tokens) - seq.num_blocks + reserved <= self.pool.num_available:
            return True
        self._restore([seq], [before])
        return False

    def _restore(self, sequences: list[Sequence], before: list[tuple[int, int, Node | None]]) -> None:
        """Take back the cached blocks that a step which cannot be scheduled had given to its sequences."""
        for seq, (computed, published, node) in zip(sequences, before, strict=True):
            seq.computed, seq.published, seq.node = computed, published, node
            self.pool.release(seq.cut_blocks(self._blocks_for(computed)))

    def _schedule(self, limits: list[tuple[Sequence, int]]) -> ScheduledStep | OutOfBlocks:
        sequences = [seq for seq, _ in limits]
        for seq in sequences:
            self._match(seq)
        new = [min(limit, seq.remaining) for seq, limit in limits]
        more = [
            self._blocks_for(seq.computed + count) - seq.num_blocks for seq, count in zip(sequences, new, strict=True)
        ]
        shared = self._shared_tails(sequences)
        needed = sum(more) + len(shared)
        if needed > self.pool.num_available:
            return OutOfBlocks(needed, self.pool.num_available)
        self._make_room(needed)
        fresh = iter(self.pool.allocate(needed))
        copies = [(seq, int(seq.blocks[-1]), next(fresh)) for seq in shared]
        for seq, _, target in copies:
            seq.set_block(seq.num_blocks - 1, target)
        self.pool.release(source for _, source, _ in copies)
        self._copied += len(copies)
        for seq, tokens, count in zip(sequences, new, more, strict=True):
            seq.extend_blocks(list(itertools.islice(fresh, count)))
            seq.pending = tokens
        return self._as_step(sequences, [source for _, source, _ in copies], [target for *_, target in copies])

    def commit(self, step: ScheduledStep) -> None:
        """Record that a step has run: its tokens are in the cache, and others can find its full blocks.

        A sequence that was freed or preempted in between is passed over.
        """
        for seq in step.sequences:
            if seq.step is step:
                seq.computed += seq.pending
                seq.pending, seq.step = 0, None
                self._publish(seq)
        self.pool.scrub_freed()

    def _as_step(self, sequences: list[Sequence], copy_from: list[int], copy_to: list[int]) -> ScheduledStep:
        table = np.zeros((len(sequences), max((seq.num_blocks for seq in sequences), default=0)), np.int32)
        for row, seq in zip(table, sequences, strict=True):
            row[: seq.num_blocks] = seq.blocks
        tokens = [seq.tokens[seq.computed : seq.computed + seq.pending] for seq in sequences]
        return ScheduledStep(
            sequences=tuple(sequences),
            tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int64),
            query_lens=np.array([seq.pending for seq in sequences], np.int32),
            seq_lens=np.array([seq.computed + seq.pending for seq in sequences], np.int32),
            block_table=table,
            block_size=self.block_size,
            completes=np.array([seq.pending == seq.remaining for seq in sequences], np.bool_),
            copy_from=copy_from,
            copy_to=copy_to,
        )

    def _shared_tails(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return the sequences that are about to write into a block that is shared or in the prefix cache."""
        writers = []
        references: dict[int, int] = {}
        for seq in sequences:
            if seq.computed % self.block_size:
                block = int(seq.blocks[-1])
                count = references.get(block, self.pool.ref_counts[block])
                if count > 1 or self.pool.cached[block]:
                    writers.append(seq)
                    references[block] = count - 1  # of several that write, the last one may keep it
        return writers

    def swap_out(self, sequences: Iterable[Sequence]) -> Swap | OutOfBlocks:
        """Move sequences' blocks to host memory; what they share with each other is moved once.

        Copy with `cache.swap_blocks(host_cache, swap.pairs)`; with a `scrub` callback before the next call that
        allocates device blocks (`step`, `swap_in`).

        Returns:
            The copies to make, or `OutOfBlocks` when the swap space is too small, and then nothing has changed.

        Raises:
            CacheError: a sequence is swapped out already, or has a step that is not committed. Nothing has changed.
        """
        unique = list(dict.fromkeys(sequences))
        for seq in unique:
            self._check(seq, ready=True)
        distinct = dict.fromkeys(block for seq in unique for block in seq.blocks.tolist())
        if len(distinct) > self.host_pool.num_free:
            return OutOfBlocks(len(distinct), self.host_pool.num_free, "host")
        moved = dict(zip(distinct, self.host_pool.allocate(len(distinct)), strict=True))
        taken: set[int] = set()
        for seq in unique:
            blocks = seq.cut_blocks(0)
            self._move(seq, blocks[::-1], moved, taken, self.host_pool)
            self.pool.release(blocks, copied_later=True)
            seq.published, seq.node, seq.swapped = 0, None, True
        self._swapped += len(moved)
        return Swap(tuple(moved.items()))

    def swap_in(self, sequences: Iterable[Sequence]) -> Swap | OutOfBlocks:
        """Bring sequences back; blocks that are still cached are not copied.

        Copy with `host_cache.swap_blocks(cache, swap.pairs)`.

        Returns:
            The copies to make, or `OutOfBlocks` when there is no room, and then nothing has changed.

        Raises:
            CacheError: a sequence is not swapped out. Nothing has changed.
        """
        unique = list(dict.fromkeys(sequences))
        for seq in unique:
            self._check(seq)
            if not seq.swapped:
                raise CacheError(f"{seq} is not swapped out")
        cached = [self._cached_path(seq) for seq in unique]
        for path in cached:
            self.pool.acquire(path)
        rest = [seq.blocks[len(path) :].tolist() for seq, path in zip(unique, cached, strict=True)]
        distinct = dict.fromkeys(block for blocks in rest for block in blocks)
        if len(distinct) > self.pool.num_available:
            out_of_blocks = OutOfBlocks(len(distinct), self.pool.num_available)
            for path in cached:
                self.pool.release(reversed(path))
            return out_of_blocks
        self._make_room(len(distinct))
        try:
            moved = dict(zip(distinct, self.pool.allocate(len(distinct)), strict=True))
        except BaseException:
            for path in cached:
                self.pool.release(reversed(path))
            raise
        taken: set[int] = set()
        for seq, path, blocks in zip(unique, cached, rest, strict=True):
            self.host_pool.release(seq.cut_blocks(0))
            seq.extend_blocks(path)
            self._move(seq, blocks, moved, taken, self.pool)
            seq.swapped = False
            self._publish(seq)
        self._swapped += len(moved)
        # A block that turned out to be another's copy was given back, and needs no contents.
        return Swap(tuple(pair for pair in moved.items() if self.pool.ref_counts[pair[1]]))

    def _move(self, seq: Sequence, blocks: list[int], moved: dict[int, int], taken: set[int], pool: BlockPool) -> None:
        """Give a sequence the new ids of its blocks; each has one reference from the start."""
        targets = [moved[block] for block in blocks]
        pool.acquire(target for target in targets if target in taken)
        taken.update(targets)
        seq.extend_blocks(targets)

    def _cached_path(self, seq: Sequence) -> list[int]:
        """Return the cached blocks that hold the same as a swapped sequence's first blocks."""
        path: list[int] = []
        node = None
        while self._caches(seq) and len(path) < seq.computed // self.block_size:
            node = self.tree.child(node, seq.tenant_key, seq.key(len(path), self.block_size))
            if node is None:
                break
            path.append(node.block)
        return path

    def usage(self) -> Usage:
        """Return figures of use; costs time in proportion to the sequences that are alive."""
        tails: dict[int, list[int]] = {}  # slots in use of each block that is a sequence's last one
        for seq in self._alive.values():
            if seq.num_blocks and not seq.swapped:
                slots = seq.computed + seq.pending - (seq.num_blocks - 1) * self.block_size
                tails.setdefault(int(seq.blocks[-1]), []).append(slots)
        used = self.num_blocks - self.pool.num_available
        unused = sum(
            self.block_size - max(slots)
            for block, slots in tails.items()
            if self.pool.ref_counts[block] == len(slots)  # else it is full, and another sequence goes on after it
        )
        return Usage(
            num_blocks=self.num_blocks,
            free_blocks=self.pool.num_free,
            cached_blocks=len(self.pool.evictable),
            used_blocks=used,
            shared_blocks=self.pool.num_shared,
            unused_slots=unused,
            waste=unused / (used * self.block_size) if used else 0.0,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
            evicted_blocks=self._evicted,
            copied_blocks=self._copied,
            swapped_blocks=self._swapped,
            host_free_blocks=self.host_pool.num_free,
        )
