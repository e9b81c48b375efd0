"""The cache manager, case by case, with real caches where their contents matter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.cache import BlockPool, CacheManager, Exhausted, PrefixTree, Sequence, Step
from attn_dispatch.errors import CacheError


def run(manager: CacheManager, *wanted: Sequence | tuple[Sequence, int]) -> Step:
    step = manager.step(wanted)
    assert isinstance(step, Step), step
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
    assert manager.usage().held_blocks == 2
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
    assert manager.apart([one, two, three, short, full]) == [one, short]
    assert manager.apart([full, one]) == [full]
    assert manager.apart([short, three, one]) == [short, three]
    step = manager.step([one, short])
    assert isinstance(step, Step)
    assert manager.apart([two, three, full]) == [two]  # what is not committed cannot be used yet
    manager.commit(step)
    assert manager.apart([two, three, full]) == [two, three, full]
    assert [manager.cached_tokens(seq) for seq in (two, three, full)] == [8, 4, 4]
    other = manager.begin([*range(9)], tenant="another")
    assert manager.apart([manager.begin([*range(4), 9, 9, 9, 9, 9]), manager.begin([*range(4), 9, 9, 9, 9, 8]), other])[
        1:
    ] == [other]


def test_what_is_attached_is_not_evicted() -> None:
    manager = CacheManager(4, 4)
    first = manager.begin([*range(9)])
    step = manager.step([first])
    assert isinstance(step, Step)
    manager.commit(step)
    manager.free(first)
    second = manager.begin([*range(9)])
    manager.attach(second)
    assert (second.computed, manager.pool.in_use, manager.pool.num_available) == (8, 2, 2)
    assert isinstance(manager.step([manager.begin([9] * 12)]), Exhausted)
    manager.preempt(second)
    assert isinstance(manager.step([manager.begin([9] * 12)]), Step)


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
    assert isinstance(found, Exhausted)
    assert (found.needed, found.free, found.where) == (3, 1, "device")
    assert "3 device blocks are needed, 1 can be had" in str(found)


def test_exhaustion_changes_nothing() -> None:
    manager = CacheManager(4, 2)
    manager.free(begun(manager, [1, 1, 2, 2, 0]))
    before = (manager.usage(), list(manager.pool.idle))
    # It would use the two cached blocks, and needs three beside them: two are free.
    found = manager.step([manager.begin([1, 1, 2, 2, 3, 3, 4, 4, 5])])
    assert found == Exhausted(3, 2)
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
        assert isinstance(step, Step)
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
    assert manager.usage().held_blocks == 0


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
    assert isinstance(step, Step)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 10, 2, 8)).astype(np.float32)
    attn.run(attn.plan(step.metadata), q, k, v, device)
    manager.commit(step)
    out = manager.swap_out([seq])
    assert out
    device.swap_blocks(host, out.pairs)
    assert manager.usage().held_blocks == 0
    with pytest.raises(CacheError, match="swap_in it first"):
        manager.step([seq])
    other = begun(manager, [50] * 16)  # takes every block: what was cached of the first is evicted
    device.arrays["key"][:] = 0
    assert isinstance(manager.swap_in([seq]), Exhausted)
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
    assert manager.host_pool.holders == [2, 2, 2]
    manager.swap_in([seq, fork])
    assert seq.blocks.tolist() == fork.blocks.tolist()


def test_no_room_in_host_memory() -> None:
    manager = CacheManager(8, 4, host_blocks=2)
    seq = begun(manager, range(10))
    assert manager.swap_out([seq]) == Exhausted(3, 2, "host")
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
    assert isinstance(step, Step)
    manager.preempt(seq)
    manager.commit(step)
    assert (seq.computed, manager.pool.num_free, len(manager.tree)) == (0, 4, 0)
    other = manager.step([seq])
    assert isinstance(other, Step)
    manager.commit(step)  # the old one again: not the one that is under way
    assert (seq.computed, seq.pending) == (0, 10)
    manager.commit(other)
    assert seq.computed == 10


def test_a_pool_that_grows() -> None:
    manager = CacheManager(2, 4)
    seq = begun(manager, range(8))
    manager.append(seq, [8])
    assert manager.step([seq]) == Exhausted(1, 0)
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
        (lambda m, s: m.pool.take(99), "99 blocks are to be taken"),
        (lambda m, s: m.pool.release([7]), "nobody holds it"),
        (lambda m, s: m.pool.hold([7]), "block 7 is free"),
        (lambda m, s: m.pool.keep(7), "cannot be kept: it is free"),
        (lambda m, s: m.pool.drop([7]), "not kept"),
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
