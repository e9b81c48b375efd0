"""Random histories of many sequences against a model of what every slot of every block really stores.

Hypothesis tries at least 10,000 operations (`CACHE_STEPS` asks for another number), and one long history has 50,000;
both swap, scrub, and meet scrub callbacks that raise.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from attn_dispatch.cache import BlockPool, CacheManager, OutOfBlocks, ScheduledStep, Sequence, Swap

STEPS = int(os.environ.get("CACHE_STEPS", "10000"))
LONG_HISTORY = 5 * STEPS

Slot = tuple[Any, ...]
"""What a slot holds: (tenant, every token up to and with its own). Two slots may stand for each other iff equal."""


class ScrubFailed(Exception):
    """Raised by the scrub callback of these tests."""


class World:
    """A manager beside the memory that its answers are about."""

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int, prefix_caching: bool = True) -> None:
        self.failures = 0  # so many of the next scrubs raise
        self.failed = 0
        self.unscrubbed: set[int] = set()  # free blocks that are scrubbed before they are allocated
        self.manager = CacheManager(
            num_blocks, block_size, host_blocks=host_blocks, prefix_caching=prefix_caching, scrub=self.scrub
        )
        self.device: list[list[Slot | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list[Slot | None]] = [[None] * block_size for _ in range(host_blocks)]
        self.sequences: list[Sequence] = []
        self.steps: list[ScheduledStep] = []

    def scrub(self, blocks: list[int]) -> None:
        assert len(set(blocks)) == len(blocks)
        for block in blocks:
            assert not self.manager.pool.ref_counts[block], "scrubbed while a sequence uses it"
            assert not self.manager.pool.cached[block], "scrubbed while it is in the prefix cache"
        if self.failures:
            self.failures -= 1
            self.failed += 1
            self.unscrubbed.update(blocks)
            raise ScrubFailed
        self.unscrubbed.difference_update(blocks)
        for block in blocks:
            self.device[block] = [None] * self.manager.block_size

    @contextlib.contextmanager
    def scrub_may_fail(self) -> Iterator[None]:
        """A call whose scrubbing raises has taken effect all the same: the model goes on as if it had not raised."""
        with contextlib.suppress(ScrubFailed):
            yield

    def step(self, wanted: list[tuple[Sequence, int]]) -> ScheduledStep | None:
        before = [(s, s.computed, s.blocks.tolist()) for s, _ in wanted]
        found: ScheduledStep | OutOfBlocks | None = None
        with contextlib.suppress(ScrubFailed):
            found = self.manager.step(wanted)
        if not isinstance(found, ScheduledStep):
            if found is not None:
                assert not found
                assert found.needed > found.free
                assert found.free <= self.manager.pool.num_available  # prefixes that it found are not free for it
            for seq, computed, blocks in before:
                assert (seq.computed, seq.blocks.tolist(), seq.pending) == (computed, blocks, 0)
            return None
        for seq in found.sequences:
            for block in seq.blocks[-(-seq.computed // self.manager.block_size) :].tolist():
                self.check_clean(block)
        for block in found.copy_to:
            self.check_clean(block)
        assert found.sequences == tuple(seq for seq, _ in wanted)
        for (_, limit), new in zip(wanted, found.query_lens.tolist(), strict=True):
            assert 1 <= new <= limit  # the last known token is always computed
        assert len(set(found.copy_to)) == len(found.copy_to)
        copied = [list(self.device[block]) for block in found.copy_from]
        for block, content in zip(found.copy_to, copied, strict=True):
            self.device[block] = content
        self.steps.append(found)
        return found

    def run(self, step: ScheduledStep) -> None:
        """Write the step's tokens, as attention would, and commit it. Sequences that left in between write nothing."""
        self.steps.remove(step)
        metadata = step.metadata  # checks slots, among them that none is written twice
        size = self.manager.block_size
        position = 0
        for seq, new, end in zip(step.sequences, step.query_lens.tolist(), step.seq_lens.tolist(), strict=True):
            slots = metadata.slot_mapping[position : position + new].tolist()
            position += new
            if seq.step is not step:
                continue
            assert step.tokens[position - new : position].tolist() == seq.tokens[end - new : end].tolist()
            for at, slot in zip(range(end - new, end), slots, strict=True):
                block = slot // size
                assert self.manager.pool.ref_counts[block] == 1, "written into while others hold it"
                assert not self.manager.pool.cached[block], "written into while it is in the prefix cache"
                self.device[block][slot % size] = self.content(seq, at)
        with self.scrub_may_fail():
            self.manager.commit(step)

    def check_clean(self, block: int) -> None:
        assert self.device[block] == [None] * self.manager.block_size, "another sequence's data in a new block"

    @staticmethod
    def content(seq: Sequence, at: int) -> Slot:
        return (seq.tenant, *seq.tokens[: at + 1].tolist())

    def check(self) -> None:
        manager, size = self.manager, self.manager.block_size
        assert list(manager.sequences) == self.sequences
        owners: Counter[int] = Counter()
        host_owners: Counter[int] = Counter()
        for seq in self.sequences:
            blocks = seq.blocks.tolist()
            assert len(set(blocks)) == len(blocks)
            reserved = seq.computed + seq.pending
            assert len(blocks) == -(-reserved // size)
            (host_owners if seq.swapped else owners).update(blocks)
            memory = self.host if seq.swapped else self.device
            for at in range(seq.computed):
                assert memory[blocks[at // size]][at % size] == self.content(seq, at)
            if manager.prefix_caching and not seq.swapped:
                full = seq.computed // size
                assert seq.published == full
                if full:
                    assert manager.tree.path(blocks[full - 1]) == blocks[:full]
        pool = manager.pool
        assert pool.ref_counts == [owners[block] for block in range(manager.num_blocks)]
        assert manager.host_pool.ref_counts == [host_owners[block] for block in range(len(self.host))]
        kept = {block for block in range(manager.num_blocks) if pool.cached[block]}
        assert len(kept) == len(manager.tree)
        for block in kept:
            assert set(manager.tree.path(block)) <= kept
        assert set(pool.evictable) == {block for block in kept if not owners[block]}
        # No leak: what nobody owns and nobody keeps is free, and can be taken.
        assert pool.num_free == sum(not owners[b] and b not in kept for b in range(manager.num_blocks))
        assert manager.host_pool.num_free == len(self.host) - len(host_owners)
        for block in range(manager.num_blocks):
            if not owners[block] and block not in kept and block not in self.unscrubbed:
                assert self.device[block] == [None] * size, "free, and not scrubbed"
        usage = manager.usage()
        assert usage.free_blocks + usage.cached_blocks + usage.used_blocks == manager.num_blocks
        assert usage.used_blocks == len(owners)
        assert usage.shared_blocks == sum(count > 1 for count in owners.values())
        used = {
            (block, at % size)
            for seq in self.sequences
            if not seq.swapped
            for at in range(seq.computed + seq.pending)
            for block in [int(seq.blocks[at // size])]
        }
        assert usage.unused_slots == len(owners) * size - len(used)


class Lives(RuleBasedStateMachine):
    """Begin, grow, fork, cut, swap, preempt and free, in any order."""

    steps_taken = 0

    @initialize(
        blocks=st.integers(3, 14), size=st.sampled_from([1, 2, 4]), host=st.integers(0, 8), caching=st.booleans()
    )
    def start(self, blocks: int, size: int, host: int, caching: bool) -> None:
        self.world = World(blocks, size, host, caching)

    def pick(self, number: int, *, ready: bool = False, swapped: bool = False) -> Sequence | None:
        found = [
            s
            for s in self.world.sequences
            if (not ready or not (s.pending or s.swapped)) and (not swapped or s.swapped)
        ]
        return found[number % len(found)] if found else None

    # Two letters, so that prompts agree by chance; and a few common prefixes, so that they do so for long.
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12), tenant=st.sampled_from([None, "a"]))
    def begin(self, prompt: list[int], tenant: str | None) -> None:
        self.world.sequences.append(self.world.manager.begin(prompt, tenant=tenant))

    @rule(number=st.integers(0, 99), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def append(self, number: int, tokens: list[int]) -> None:
        seq = self.pick(number)
        if seq is not None:
            self.world.manager.append(seq, tokens)

    @rule(seed=st.integers(0, 2**16), limit=st.integers(1, 9), run=st.booleans())
    def step(self, seed: int, limit: int, run: bool) -> None:
        rng = random.Random(seed)
        ready = [s for s in self.world.sequences if s.remaining and not (s.pending or s.swapped)]
        chosen = rng.sample(ready, min(len(ready), rng.randint(1, 4)))
        step = self.world.step([(seq, limit) for seq in chosen])
        if step is not None and run:
            self.world.run(step)

    @rule(number=st.integers(0, 99))
    def acquire_cached_prefix(self, number: int) -> None:
        seq = self.pick(number, ready=True)
        if seq is not None:
            found = self.world.manager.cached_tokens(seq)
            self.world.manager.acquire_cached_prefix(seq)
            assert seq.computed == found

    @rule(seed=st.integers(0, 2**16), limit=st.integers(1, 9))
    def step_apart(self, seed: int, limit: int) -> None:
        """A step in which nothing is computed twice that could be shared."""
        manager, size = self.world.manager, self.world.manager.block_size
        ready = [s for s in self.world.sequences if s.remaining and not (s.pending or s.swapped)]
        random.Random(seed).shuffle(ready)
        chosen = manager.without_common_prefix(ready)
        assert chosen[:1] == ready[:1]
        step = self.world.step([(seq, limit) for seq in chosen])
        if step is None:
            return
        begun: set[Slot] = set()
        for seq in chosen:
            first = seq.computed // size * size + size  # the end of the block that it goes on with
            name = (seq.tenant, *seq.tokens[:first].tolist())
            if manager.prefix_caching and first < seq.length and seq.computed % size == 0:
                assert name not in begun
            if first <= seq.length:
                begun.add(name)
        self.world.run(step)

    @precondition(lambda self: self.world.steps)
    @rule(number=st.integers(0, 9))
    def run_late(self, number: int) -> None:
        self.world.run(self.world.steps[number % len(self.world.steps)])

    @rule(number=st.integers(0, 99), count=st.integers(1, 3))
    def fork(self, number: int, count: int) -> None:
        seq = self.pick(number, ready=True)
        if seq is not None and len(self.world.sequences) < 12:
            self.world.sequences += self.world.manager.fork(seq, count)

    @rule(number=st.integers(0, 99), part=st.floats(0, 1))
    def truncate(self, number: int, part: float) -> None:
        seq = self.pick(number, ready=True)
        if seq is not None:
            with self.world.scrub_may_fail():
                self.world.manager.truncate(seq, int(part * seq.length))

    @rule(number=st.integers(0, 99))
    def preempt(self, number: int) -> None:
        seq = self.pick(number)
        if seq is not None:
            with self.world.scrub_may_fail():
                self.world.manager.preempt(seq)

    @rule(number=st.integers(0, 99))
    def free(self, number: int) -> None:
        seq = self.pick(number)
        if seq is not None:
            self.world.sequences.remove(seq)
            with self.world.scrub_may_fail():
                self.world.manager.free(seq)

    @rule(count=st.integers(1, 3))
    def scrub_fails(self, count: int) -> None:
        self.world.failures = count

    @rule(seed=st.integers(0, 2**16))
    def swap_out(self, seed: int) -> None:
        ready = [s for s in self.world.sequences if not (s.pending or s.swapped)]
        chosen = random.Random(seed).sample(ready, min(len(ready), 2))
        tables = [s.blocks.tolist() for s in chosen]
        swap = self.world.manager.swap_out(chosen)
        if isinstance(swap, OutOfBlocks):
            assert [s.blocks.tolist() for s in chosen] == tables
            return
        pool = self.world.manager.pool
        for source, target in swap.pairs:  # what the caller does next: the contents have to be there still
            self.world.host[target] = list(self.world.device[source])
            if not (pool.ref_counts[source] or pool.cached[source]):
                self.world.unscrubbed.add(source)

    @rule(seed=st.integers(0, 2**16))
    def swap_in(self, seed: int) -> None:
        away = [s for s in self.world.sequences if s.swapped]
        chosen = random.Random(seed).sample(away, min(len(away), 2))
        tables = [s.blocks.tolist() for s in chosen]
        swap: Swap | OutOfBlocks | None = None
        with contextlib.suppress(ScrubFailed):
            swap = self.world.manager.swap_in(chosen)
        if not isinstance(swap, Swap):
            assert [s.blocks.tolist() for s in chosen] == tables
            return
        for source, target in swap.pairs:
            self.world.check_clean(target)
            self.world.device[target] = list(self.world.host[source])

    @precondition(lambda self: not any(s.pending for s in self.world.sequences))
    @rule()
    def drain(self) -> None:
        """All sequences end: no block is in use, and every block is available."""
        self.world.failures = 0
        for seq in self.world.sequences:
            self.world.manager.free(seq)
        self.world.sequences.clear()
        manager = self.world.manager
        assert manager.pool.num_available == manager.num_blocks
        assert manager.host_pool.num_free == manager.host_pool.num_blocks
        manager.clear_cache()
        assert manager.pool.num_free == manager.num_blocks
        assert len(manager.tree) == 0

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "world"):
            Lives.steps_taken += 1
            self.world.check()


def test_lives() -> None:
    Lives.steps_taken = 0
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=STEPS // 25,  # a history ends early when it meets the limit of what hypothesis draws
            stateful_step_count=100,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Lives.steps_taken >= STEPS


MISTAKES = (
    "no copy-on-write", "a leak", "matches the last token", "tenants share", "evicts a parent",
    "scrubs before the copy", "forgets what was not scrubbed",
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = {
        "no copy-on-write": lambda: monkeypatch.setattr(CacheManager, "_shared_tails", lambda self, seqs: []),
        "a leak": lambda: monkeypatch.setattr(CacheManager, "preempt", _leaky(CacheManager.preempt)),
        "matches the last token": lambda: monkeypatch.setattr(CacheManager, "_next", _greedy),
        "tenants share": lambda: monkeypatch.setattr(
            "attn_dispatch.cache.radix.PrefixTree.child",
            lambda self, parent, tenant, key: next(iter(self._roots.values()), None) and _first(self, parent, key),
        ),
        "evicts a parent": lambda: monkeypatch.setattr(CacheManager, "_make_room", _newest),
        "scrubs before the copy": lambda: monkeypatch.setattr(BlockPool, "release", _eager(BlockPool.release)),
        "forgets what was not scrubbed": lambda: monkeypatch.setattr(BlockPool, "_run_scrub", _forgetful),
    }
    plant[mistake]()
    with pytest.raises(Exception):  # noqa: B017 - whichever check it meets first
        random_history(seed=1, steps=min(STEPS, 5000))


def _leaky(preempt: Any) -> Any:
    def leak(self: CacheManager, seq: Sequence) -> None:
        seq.cut_blocks(max(seq.num_blocks - 1, 0))
        preempt(self, seq)

    return leak


def _greedy(self: CacheManager, seq: Sequence, node: Any, index: int) -> Any:
    if not self.prefix_caching or (index + 1) * self.block_size > seq.length:
        return None
    return self.tree.child(node, seq.tenant_key, seq.key(index, self.block_size))


def _first(tree: Any, parent: Any, key: bytes) -> Any:
    above = parent if parent is not None else next(iter(tree._roots.values()))
    return above.children.get(key)


def _eager(release: Any) -> Any:
    def release_and_scrub(self: BlockPool, blocks: Any, *, copied_later: bool = False) -> None:
        release(self, blocks)
        self.scrub_freed()

    return release_and_scrub


def _forgetful(self: BlockPool, blocks: list[int]) -> None:
    self._freed.clear()
    if self._scrub is not None:
        self._scrub(blocks)


def _newest(self: CacheManager, count: int) -> None:
    while self.pool.num_free < count:
        block = next(reversed(self.pool.evictable))
        self.tree.remove(block)
        self.pool.evict([block])


def random_history(seed: int, steps: int) -> World:
    """A history without hypothesis: fast, and the same on every machine."""
    rng = random.Random(seed)
    machine = Lives()
    machine.start(blocks=12, size=2, host=6, caching=True)
    world = machine.world
    prefixes = [[rng.randint(0, 1) for _ in range(8)] for _ in range(3)]
    for _ in range(steps):
        number, seeded = rng.randint(0, 99), rng.randint(0, 2**16)
        choice = rng.random()
        if choice < 0.15 and len(world.sequences) < 8:
            machine.begin([*rng.choice(prefixes)[: rng.randint(1, 8)], rng.randint(0, 1)], rng.choice([None, "a"]))
        elif choice < 0.25:
            machine.append(number, [rng.randint(0, 1)])
        elif choice < 0.65:
            machine.step(seeded, rng.randint(1, 6), rng.random() < 0.8)
        elif choice < 0.7 and world.steps:
            machine.run_late(number)
        elif choice < 0.75:
            machine.fork(number, 1)
        elif choice < 0.8:
            machine.truncate(number, rng.random())
        elif choice < 0.85:
            machine.preempt(number)
        elif choice < 0.92:
            machine.free(number)
        elif choice < 0.93:
            machine.scrub_fails(rng.randint(1, 3))
        elif choice < 0.965:
            machine.swap_out(seeded)
        else:
            machine.swap_in(seeded)
        world.check()
    return world


def test_a_long_history() -> None:
    world = random_history(seed=1, steps=LONG_HISTORY)
    usage = world.manager.usage()
    # The history must have met what it is there to meet.
    assert usage.evicted_blocks > 50
    assert usage.copied_blocks > 10
    assert usage.swapped_blocks > 10
    assert usage.hit_tokens > 100
    assert world.failed > 50
