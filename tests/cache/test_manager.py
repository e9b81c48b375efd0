"""The cache manager, case by case, with real caches where their contents matter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.cache import (
    BlockPool,
    CacheManager,
    OutOfBlocks,
    PrefixTree,
    ScheduledStep,
    Sequence,
    Swap,
    WaitingQueue,
)
from attn_dispatch.errors import CacheError


def run(manager: CacheManager, *wanted: Sequence | tuple[Sequence, int]) -> ScheduledStep:
    step = manager.step(wanted)
    assert isinstance(step, ScheduledStep), step
    manager.commit(step)
    return step


def begun(manager: CacheManager, tokens: Any, **named: Any) -> Sequence:
    seq = manager.begin(tokens, **named)
    run(manager, seq)
    return seq


def test_a_shared_prefix_is_computed_once() -> None:
    manager = CacheManager(16, 4)
    first = begun(manager, range(10))
    second = manager.begin([*range(8), 98, 99])
    assert manager.cached_tokens(second) == 8
    step = run(manager, second)
    assert step.query_lens.tolist() == [2]
    assert step.seq_lens.tolist() == [10]
    assert second.blocks[:2].tolist() == first.blocks[:2].tolist()
    assert second.blocks[2] != first.blocks[2]
    usage = manager.usage()
    assert (usage.hit_tokens, usage.prompt_tokens, usage.shared_blocks) == (8, 20, 2)
    assert usage.hit_rate == 0.4
    assert usage.unused_slots == 4
    assert usage.waste == 4 / 16


def test_the_last_token_is_computed_even_if_it_is_cached() -> None:
    manager = CacheManager(8, 4)
    begun(manager, range(8))
    again = manager.begin(range(8))
    assert run(manager, again).query_lens.tolist() == [4]
    # What it computed again is there already: it has the first one's block now, its own is free.
    assert manager.usage().used_blocks == 2
    assert manager.usage().shared_blocks == 2


def test_prompts_that_start_together_share_from_the_next_step_on() -> None:
    manager = CacheManager(16, 4)
    pair = [manager.begin([*range(12), i]) for i in (50, 51)]
    step = run(manager, *((seq, 8) for seq in pair))
    assert step.query_lens.tolist() == [8, 8]
    assert pair[0].blocks.tolist() == pair[1].blocks.tolist()
    run(manager, (pair[0], 4))
    # The second one finds what the first has computed meanwhile.
    assert run(manager, pair[1]).query_lens.tolist() == [1]


def test_prompts_with_a_common_prefix_wait_for_the_first_one() -> None:
    manager = CacheManager(16, 4)
    prompts = [[*range(9)], [*range(9), 3], [*range(4), 7, 7, 7], [*range(3)], [*range(8)]]
    one, two, three, short, full = (manager.begin(prompt) for prompt in prompts)
    assert manager.without_common_prefix([one, two, three, short, full]) == [one, short]
    assert manager.without_common_prefix([full, one]) == [full]
    assert manager.without_common_prefix([short, three, one]) == [short, three]
    step = manager.step([one, short])
    assert isinstance(step, ScheduledStep)
    assert manager.without_common_prefix([two, three, full]) == [two]  # what is not committed cannot be used yet
    manager.commit(step)
    assert manager.without_common_prefix([two, three, full]) == [two, three, full]
    assert [manager.cached_tokens(seq) for seq in (two, three, full)] == [8, 4, 4]
    other = manager.begin([*range(9)], tenant="another")
    pair = [manager.begin([*range(4), 9, 9, 9, 9, last]) for last in (9, 8)]
    assert manager.without_common_prefix([*pair, other])[1:] == [other]


def test_an_acquired_prefix_is_not_evicted() -> None:
    manager = CacheManager(4, 4)
    first = manager.begin([*range(9)])
    step = manager.step([first])
    assert isinstance(step, ScheduledStep)
    manager.commit(step)
    manager.free(first)
    second = manager.begin([*range(9)])
    manager.acquire_cached_prefix(second)
    assert (second.computed, manager.pool.in_use, manager.pool.num_available) == (8, 2, 2)
    assert isinstance(manager.step([manager.begin([9] * 12)]), OutOfBlocks)
    manager.preempt(second)
    assert isinstance(manager.step([manager.begin([9] * 12)]), ScheduledStep)


def test_tenants_share_nothing() -> None:
    manager = CacheManager(16, 4)
    begun(manager, range(10), tenant="a")
    assert manager.cached_tokens(manager.begin(range(10), tenant="b")) == 0
    assert manager.cached_tokens(manager.begin(range(10))) == 0
    assert manager.cached_tokens(manager.begin(range(10), tenant="a")) == 8


def test_without_prefix_caching_blocks_are_free_at_once() -> None:
    manager = CacheManager(4, 4, prefix_caching=False)
    seq = begun(manager, range(10))
    manager.free(seq)
    assert manager.pool.num_free == 4
    assert manager.cached_tokens(manager.begin(range(10))) == 0


def test_least_recently_used_leaves_go_first() -> None:
    manager = CacheManager(6, 2)
    old, new = begun(manager, [1, 1, 2, 2, 0]), begun(manager, [1, 1, 3, 3, 0])
    manager.free(old)
    manager.free(new)
    assert manager.usage().cached_blocks == 3  # [1 1], [2 2], [3 3]
    begun(manager, [9] * 7)  # four blocks: three are free, one is evicted
    assert manager.usage().evicted_blocks == 1
    assert manager.cached_tokens(manager.begin([1, 1, 2, 2, 0])) == 2
    assert manager.cached_tokens(manager.begin([1, 1, 3, 3, 0])) == 4


def test_a_prefix_in_use_is_never_evicted() -> None:
    manager = CacheManager(4, 2)
    begun(manager, [1, 1, 2, 2, 0])
    found = manager.step([manager.begin([7] * 5)])
    assert isinstance(found, OutOfBlocks)
    assert (found.needed, found.free, found.where) == (3, 1, "device")
    assert "3 device blocks are needed, 1 is available" in str(found)


def test_exhaustion_changes_nothing() -> None:
    manager = CacheManager(4, 2)
    manager.free(begun(manager, [1, 1, 2, 2, 0]))
    before = (manager.usage(), list(manager.pool.evictable))
    # It would use the two cached blocks, and needs three beside them: two are free.
    found = manager.step([manager.begin([1, 1, 2, 2, 3, 3, 4, 4, 5])])
    assert found == OutOfBlocks(3, 2)
    assert manager.usage() == before[0]
    assert manager.cached_tokens(manager.begin([1, 1, 2, 2, 3])) == 4


def test_a_fork_copies_the_block_that_it_writes_into() -> None:
    manager = CacheManager(8, 4)
    seq = begun(manager, range(6))
    (fork,) = manager.fork(seq)
    for each, token in ((seq, 10), (fork, 11)):
        manager.append(each, [token])
    step = run(manager, seq, fork)
    assert (step.copy_from, step.copy_to) == ([1], [2])  # one copies, the other may keep it
    assert seq.blocks.tolist() == [0, 2]
    assert fork.blocks.tolist() == [0, 1]
    assert step.tokens.tolist() == [10, 11]


def test_beam_search_on_a_real_cache() -> None:
    """Beams that fork and end give the same output as beams that each recompute all they are."""
    spec = ad.AttentionSpec(num_heads=2, head_size=8, dtype="float64", block_size=4)
    attn = ad.attention(spec, backend="reference")
    manager = CacheManager(24, 4)
    cache = attn.allocate(24)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((3, 10, 2, 8))  # q, k and v of each token id

    def advance(beams: list[Sequence]) -> np.ndarray:
        step = manager.step(beams)
        assert isinstance(step, ScheduledStep)
        cache.copy_blocks(step.copy_from, step.copy_to)
        q, k, v = table[:, step.tokens]
        out = attn.run(attn.plan(step.metadata), q, k, v, cache)
        manager.commit(step)
        return out[np.cumsum(step.query_lens) - 1]

    def alone(tokens: list[int]) -> np.ndarray:
        batch = ad.AttentionMetadata.build([len(tokens)], [len(tokens)], [list(range(6))], 4)
        return attn.run(attn.plan(batch), *table[:, tokens], attn.allocate(6))[-1]

    beams = [manager.begin([1, 2, 3, 4, 5, 6])]
    advance(beams)
    beams += manager.fork(beams[0], 2)
    for turn in range(9):
        for i, beam in enumerate(beams):
            manager.append(beam, [(3 * turn + i) % 10])
        found = advance(beams)
        for beam, out in zip(beams, found, strict=True):
            np.testing.assert_allclose(out, alone(beam.tokens.tolist()), rtol=0, atol=1e-9)
        best = beams[turn % 3]
        survivors = [best, *manager.fork(best), beams[(turn + 1) % 3]]
        for beam in beams:
            if beam not in survivors:
                manager.free(beam)
        beams = survivors
    assert manager.usage().copied_blocks > 3
    for beam in beams:
        manager.free(beam)
    assert manager.usage().used_blocks == 0


def test_rejected_drafts_are_cut_off_and_a_published_block_is_not_overwritten() -> None:
    manager = CacheManager(8, 4)
    seq = begun(manager, range(3))
    manager.append(seq, [3, 4, 5, 6])
    run(manager, seq)
    published = int(seq.blocks[0])
    manager.truncate(seq, 2)
    assert (seq.length, seq.computed, seq.num_blocks, seq.published) == (2, 2, 1, 0)
    manager.append(seq, [77])
    step = run(manager, seq)
    assert step.copy_from == [published]
    assert manager.cached_tokens(manager.begin([0, 1, 2, 3, 4])) == 4


def test_swapping_keeps_the_contents() -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=8, dtype="float32", block_size=4)
    attn = ad.attention(spec, backend="reference")
    manager = CacheManager(4, 4, host_blocks=4)
    device, host = attn.allocate(4), attn.allocate(4)
    seq = manager.begin(range(10))
    step = manager.step([seq])
    assert isinstance(step, ScheduledStep)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 10, 2, 8)).astype(np.float32)
    attn.run(attn.plan(step.metadata), q, k, v, device)
    manager.commit(step)
    out = manager.swap_out([seq])
    assert out
    device.swap_blocks(host, out.pairs)
    assert manager.usage().used_blocks == 0
    with pytest.raises(CacheError, match="swap_in it first"):
        manager.step([seq])
    other = begun(manager, [50] * 16)  # takes every block: what was cached of the first is evicted
    device.arrays["key"][:] = 0
    assert isinstance(manager.swap_in([seq]), OutOfBlocks)
    manager.free(other)
    back = manager.swap_in([seq])
    assert back
    assert len(back.pairs) == 3
    host.swap_blocks(device, back.pairs)
    key, _ = device.gather(seq.blocks)
    np.testing.assert_array_equal(key.transpose(0, 2, 1, 3).reshape(12, 2, 8)[:10], k)
    assert manager.usage().host_free_blocks == 4


def test_what_is_still_cached_is_not_copied_back() -> None:
    manager = CacheManager(8, 4, host_blocks=8)
    seq = begun(manager, range(10))
    assert len(manager.swap_out([seq]).pairs) == 3
    back = manager.swap_in([seq])
    assert len(back.pairs) == 1  # the block that is not full


def test_forks_move_what_they_share_once() -> None:
    manager = CacheManager(8, 4, host_blocks=3)
    seq = begun(manager, range(10))
    (fork,) = manager.fork(seq)
    swap = manager.swap_out([seq, fork])
    assert len(swap.pairs) == 3
    assert manager.host_pool.ref_counts == [2, 2, 2]
    manager.swap_in([seq, fork])
    assert seq.blocks.tolist() == fork.blocks.tolist()


def test_no_room_in_host_memory() -> None:
    manager = CacheManager(8, 4, host_blocks=2)
    seq = begun(manager, range(10))
    assert manager.swap_out([seq]) == OutOfBlocks(3, 2, "host")
    assert not seq.swapped
    manager.append(seq, [1])
    run(manager, seq)


def test_a_preempted_sequence_comes_back() -> None:
    manager = CacheManager(8, 4)
    seq = begun(manager, range(10))
    manager.append(seq, [10])
    manager.preempt(seq)
    assert (seq.computed, seq.num_blocks, seq.length) == (0, 0, 11)
    assert run(manager, seq).query_lens.tolist() == [3]  # eight were still cached
    # Its prompt counts once.
    assert manager.usage().prompt_tokens == 10


def test_a_step_that_never_ran_is_given_up() -> None:
    manager = CacheManager(4, 4)
    seq = manager.begin(range(10))
    step = manager.step([seq])
    assert isinstance(step, ScheduledStep)
    manager.preempt(seq)
    manager.commit(step)
    assert (seq.computed, manager.pool.num_free, len(manager.tree)) == (0, 4, 0)
    other = manager.step([seq])
    assert isinstance(other, ScheduledStep)
    manager.commit(step)  # the old one again: not the one that is under way
    assert (seq.computed, seq.pending) == (0, 10)
    manager.commit(other)
    assert seq.computed == 10


def test_a_pool_that_grows() -> None:
    manager = CacheManager(2, 4)
    seq = begun(manager, range(8))
    manager.append(seq, [8])
    assert manager.step([seq]) == OutOfBlocks(1, 0)
    manager.grow(4)
    run(manager, seq)
    assert seq.blocks.tolist() == [0, 1, 2]
    assert (manager.num_blocks, manager.usage().free_blocks) == (4, 1)
    with pytest.raises(CacheError, match="cannot become one of 3"):
        manager.grow(3)


def test_freed_blocks_are_scrubbed_before_anybody_gets_them() -> None:
    scrubbed: list[int] = []
    manager = CacheManager(4, 2, scrub=scrubbed.extend)
    seq = begun(manager, [1, 1, 2])
    tail = int(seq.blocks[1])
    manager.free(seq)
    assert scrubbed == [tail]  # the full one is cached
    manager.clear_cache()
    assert sorted(scrubbed) == [0, 1]
    assert len(manager.tree) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.step([s]), "nothing to compute"),
        (lambda m, s: m.step([(m.begin([1]), 0)]), "nothing to compute"),
        (lambda m, s: m.step([x := m.begin([1]), x]), "named twice"),
        (lambda m, s: m.truncate(s, 11), "is to keep 11 of its 10 tokens"),
        (lambda m, s: m.swap_in([s]), "is not swapped out"),
        (lambda m, s: (m.free(s), m.append(s, [1])), "is not alive here"),
        (lambda m, s: m.free(CacheManager(2).begin([1])), "is not alive here"),
        (lambda m, s: (m.append(s, [1]), m.step([s]), m.step([s])), "not committed"),
        (lambda m, s: (m.append(s, [1]), m.step([s]), m.fork(s)), "not committed"),
        (lambda m, s: m.pool.allocate(99), "99 blocks are to be allocated"),
        (lambda m, s: m.pool.release([7]), "no sequence references it"),
        (lambda m, s: m.pool.acquire([7]), "block 7 is free"),
        (lambda m, s: m.pool.mark_cached(7), "cannot be cached: it is free"),
        (lambda m, s: m.pool.evict([7]), "not cached"),
        (lambda m, s: m.tree.remove(int(s.blocks[0])), "followed by others"),
        (lambda m, s: m.tree.remove(7), "not in the tree"),
        (lambda m, s: m.tree.path(7), "not in the tree"),
    ],
)
def test_misuse_is_refused(call: Callable[[CacheManager, Sequence], Any], message: str) -> None:
    manager = CacheManager(8, 4, host_blocks=8)
    seq = begun(manager, range(10))
    with pytest.raises(CacheError, match=message):
        call(manager, seq)


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0), (True, 4), (4.0, 4), (4, 4.0)])
def test_sizes_are_whole_numbers(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(CacheError):
        CacheManager(*arguments)
    with pytest.raises(CacheError):
        BlockPool(-1)


def lines_run(call: Callable[[], Any]) -> int:
    """Return how many lines of Python a call executes: a cost that no busy machine changes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_calls_cost_the_same_in_a_cache_of_any_size() -> None:
    costs = []
    for num_blocks in (200, 5000):
        manager = CacheManager(num_blocks, 4, host_blocks=8)
        for i in range(num_blocks // 2):  # fill it with prefixes, all evictable
            manager.free(begun(manager, [i, i, i, i, i + 1, i, i, i, 0]))
        assert manager.usage().cached_blocks > num_blocks - 4

        def life(manager: CacheManager = manager) -> None:
            seq = manager.begin([*[5] * 20, *range(12)])
            run(manager, seq)
            (fork,) = manager.fork(seq)
            manager.append(fork, [1])
            run(manager, fork)
            manager.truncate(fork, 3)
            manager.swap_out([seq])
            manager.swap_in([seq])
            manager.preempt(seq)
            manager.free(seq)
            manager.free(fork)
            manager.usage()

        costs.append(lines_run(life))
    assert costs[0] == costs[1]


def test_a_tree_refuses_a_place_that_is_taken() -> None:
    tree = PrefixTree()
    node = tree.add(None, "a", b"x", 1)
    with pytest.raises(CacheError, match="its place is taken"):
        tree.add(None, "a", b"x", 2)
    with pytest.raises(CacheError, match="it is in the tree"):
        tree.add(node, "a", b"y", 1)
    assert tree.child(None, "b", b"x") is None


def swap_world(num_blocks: int, **named: Any) -> tuple[CacheManager, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A manager whose scrub callback zeroes blocks of a device cache beside it, and a host cache."""
    device, host = np.zeros((num_blocks, 2), np.int64), np.zeros((4, 2), np.int64)

    def scrub(blocks: list[int]) -> None:
        device[blocks] = 0

    return CacheManager(num_blocks, 2, host_blocks=4, scrub=scrub, **named), device, host


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_swapped_blocks_are_scrubbed_after_they_were_copied(prefix_caching: bool) -> None:
    manager, device, host = swap_world(4, prefix_caching=prefix_caching)
    seq = begun(manager, [5, 6, 7])
    device[seq.blocks] = [[5, 6], [7, 0]]
    swap = manager.swap_out([seq])
    assert isinstance(swap, Swap)
    for source, target in swap.pairs:
        host[target] = device[source]
    other = begun(manager, [9] * 8)  # takes every block: what was swapped out is gone from all of them
    assert not device[other.blocks].any()
    manager.free(other)
    swap = manager.swap_in([seq])
    assert isinstance(swap, Swap)
    for source, target in swap.pairs:
        device[target] = host[source]
    assert device[seq.blocks].reshape(-1)[:3].tolist() == [5, 6, 7]


def test_a_scrub_that_raises_loses_no_block() -> None:
    calls: list[list[int]] = []

    def scrub(blocks: list[int]) -> None:
        calls.append(blocks)
        if len(calls) <= 2:
            raise OSError("the device is busy")

    manager = CacheManager(4, 2, prefix_caching=False, scrub=scrub)
    seq, other = begun(manager, [1] * 5), manager.begin([2])
    with pytest.raises(OSError, match="busy"):
        manager.free(seq)
    assert not seq.alive
    assert manager.pool.num_free == 4
    with pytest.raises(OSError, match="busy"):  # its block has not been scrubbed: nobody gets it
        manager.step([other])
    assert (other.num_blocks, other.pending, manager.pool.num_free) == (0, 0, 4)
    run(manager, other)
    assert calls[2] == [int(other.blocks[0])]
    manager.free(other)
    assert manager.usage().free_blocks == 4


class Spiteful:
    """A tenant whose hash fails from some moment on."""

    fails = False

    def __hash__(self) -> int:
        if self.fails:
            raise TypeError("unhashable")
        return 1


def test_a_step_that_raises_changes_nothing() -> None:
    manager = CacheManager(8, 2)
    manager.free(begun(manager, [1, 1, 2, 2, 0]))
    tenant = Spiteful()
    good, bad = manager.begin([1, 1, 2, 2, 3]), manager.begin([1, 1, 2, 2, 3], tenant=tenant)
    before = manager.usage()
    tenant.fails = True
    with pytest.raises(TypeError, match="unhashable"):
        manager.step([good, bad])
    assert manager.usage() == before
    assert (good.num_blocks, good.computed, good.pending, good.published) == (0, 0, 0, 0)
    assert run(manager, good).query_lens.tolist() == [1]


def test_a_tenant_that_cannot_be_hashed_is_refused() -> None:
    manager = CacheManager(8, 2)
    with pytest.raises(CacheError, match=r"tenant=\[1\] must be hashable"):
        manager.begin([1], tenant=[1])  # type: ignore[arg-type]
    assert manager.sequences == ()


@pytest.mark.parametrize(
    ("mine", "yours"), [(1, True), (1, 1.0), ((1, "a"), (True, "a")), (frozenset([0]), frozenset([False]))]
)
def test_tenants_of_different_types_are_different(mine: Any, yours: Any) -> None:
    assert mine == yours
    manager = CacheManager(8, 2)
    begun(manager, range(5), tenant=mine)
    assert manager.cached_tokens(manager.begin(range(5), tenant=yours)) == 0
    assert manager.cached_tokens(manager.begin(range(5), tenant=mine)) == 4


@pytest.mark.parametrize(
    "tokens",
    [[1.9, 2.2], np.array([1.5]), ["a"], [2**70], np.array([2**63], np.uint64), np.array([[1, 2], [3, 4]])],
    ids=repr,
)
def test_tokens_that_are_not_whole_numbers_are_refused(tokens: Any) -> None:
    manager = CacheManager(8, 2)
    seq = manager.begin([1])
    for call in (manager.begin, lambda tokens: manager.append(seq, tokens)):
        with pytest.raises(CacheError, match="whole numbers in one dimension"):
            call(tokens)
    assert (seq.length, manager.sequences) == (1, (seq,))


def test_a_step_keeps_the_tokens_that_it_was_scheduled_with() -> None:
    manager = CacheManager(8, 2)
    first, second = manager.begin([1, 2, 3]), manager.begin([4, 5])
    step = manager.step([first, second])
    assert isinstance(step, ScheduledStep)
    manager.preempt(first)
    manager.truncate(first, 1)
    assert step.tokens.tolist() == [1, 2, 3, 4, 5]


def test_sequences_outside_the_prefix_cache() -> None:
    manager = CacheManager(8, 2)
    first = begun(manager, [0] * 5)
    second = manager.begin([0] * 5, cacheable=False)
    assert manager.cached_tokens(second) == 0
    assert manager.without_common_prefix([second, manager.begin([0] * 5, cacheable=False)])[1:] != []
    run(manager, second)
    (fork,) = manager.fork(second)
    assert not fork.cacheable
    manager.free(second)
    manager.free(fork)
    assert manager.usage().cached_blocks == 0
    manager.free(first)
    assert manager.usage().cached_blocks == 2


def test_the_longest_cached_prefix_goes_first_and_none_starves() -> None:
    manager = CacheManager(32, 2)
    manager.free(begun(manager, [1, 1, 2, 2, 3]))
    waiting = WaitingQueue(manager, max_passed=3)
    prompts = {"cold": [9] * 5, "short": [1, 1, 7, 7, 7], "long": [1, 1, 2, 2, 5], "same": [1, 1, 2, 2, 6]}
    names = {manager.begin(prompt): name for name, prompt in prompts.items()}
    for seq in names:
        waiting.append(seq)

    def admit() -> str:
        seq = waiting.first()
        assert waiting.first() is seq  # asking changes nothing
        waiting.remove(seq)
        return names[seq]

    order = [admit() for _ in range(3)]
    assert order == ["long", "same", "short"]
    names[late := manager.begin([1, 1, 2, 2, 8])] = "late"
    waiting.append(late)
    assert admit() == "cold"  # three have overtaken it
    assert (admit(), len(waiting)) == ("late", 0)
    in_order = WaitingQueue(manager, max_passed=0)
    for seq in names:
        in_order.append(seq)
    assert names[in_order.first()] == "cold"


def test_interleaved_prefixes_are_sorted_by_what_is_cached() -> None:
    """Eight prefixes of 32 blocks that arrive in turn, and room for three: in order of arrival none is ever found."""

    def hit_rate(max_passed: int) -> float:
        manager = CacheManager(3 * 33, 4)
        waiting = WaitingQueue(manager, max_passed=max_passed)
        for i in range(64):
            waiting.append(manager.begin([*[i % 8] * 128, i]))
        while waiting:
            seq = waiting.first()
            waiting.remove(seq)
            run(manager, seq)
            manager.free(seq)
        return manager.usage().hit_rate

    assert hit_rate(0) == 0
    assert hit_rate(64) > 0.8
    assert hit_rate(16) > 0.5
