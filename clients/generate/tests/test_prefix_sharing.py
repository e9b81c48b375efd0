"""Prompts that begin alike: what they have in common is computed once, and every answer stays what it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")
pytest.importorskip("transformers", reason="not run: needs transformers")

from attn_dispatch.cache import CacheManager, PrefixTree  # noqa: E402
from attn_dispatch.errors import CacheError  # noqa: E402
from attn_dispatch.integrations.transformers import NAME, register  # noqa: E402
from attn_dispatch_generate.engine import Engine, Run  # noqa: E402

register()

pytestmark = pytest.mark.usefixtures("no_gradients")

Make = Callable[..., Any]
B = 4
COMMON = [int(token) for token in np.random.default_rng(3).integers(4, 97, 14)]  # three blocks and a half
OWN = [[5, 9, 2], [7], [30, 31, 32, 33, 34, 35], [5, 9, 2, 60, 61]]
PROMPTS = [COMMON + own for own in OWN]


def answers(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers' own loop and kernels say of each prompt alone."""
    said = []
    for prompt in prompts:
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        said.append(list(whole[0, len(prompt) :].tolist()))
    return said


def tokens(run: Run) -> list[list[int]]:
    return [completion.tokens for completion in run.completions]


def computed(run: Run) -> int:
    assert run.prompt_tokens == sum(len(c.prompt) for c in run.completions)
    assert run.prefill_tokens == run.prompt_tokens - run.hit_tokens
    return run.prefill_tokens


def test_a_common_prefix_is_computed_once(make_model: Make, backend: str) -> None:
    expected = answers(make_model("llama", "sdpa"), PROMPTS, 8)
    run = Engine(make_model("llama", NAME), backend=backend, block_size=B).generate(PROMPTS, 8)
    assert tokens(run) == expected
    # Three blocks are common to all; the fourth prompt has a fourth block in common with the first.
    assert run.hit_tokens == 2 * 12 + 16
    assert computed(run) == sum(map(len, PROMPTS)) - 40
    assert run.prefill_steps == 2
    assert run.hit_rate == pytest.approx(40 / sum(map(len, PROMPTS)))
    assert run.blocks_shared == 4
    assert run.blocks_unshared - run.blocks_peak == 3 + 3 + 4


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n", "gpt_oss"])
def test_windows_shared_layers_and_sinks(make_model: Make, kind: str) -> None:
    """What a layer sees of a prefix that another sequence computed is what it would have computed itself."""
    expected = answers(make_model(kind), PROMPTS, 8)
    run = Engine(make_model(kind, NAME), backend="reference", block_size=B).generate(PROMPTS, 8)
    assert tokens(run) == expected
    assert run.hit_tokens == 40


def test_without_sharing(make_model: Make, backend: str) -> None:
    model = make_model("llama", NAME)
    shared = Engine(model, backend=backend, block_size=B).generate(PROMPTS, 8)
    alone = Engine(model, backend=backend, block_size=B, prefix_sharing=False).generate(PROMPTS, 8)
    assert tokens(alone) == tokens(shared)
    assert (alone.hit_tokens, alone.blocks_shared, alone.prefill_steps) == (0, 0, 1)
    assert computed(alone) == alone.prompt_tokens
    assert alone.blocks_unshared == alone.blocks_peak > shared.blocks_peak


def test_a_tree_of_prefixes(make_model: Make) -> None:
    """Each level of what prompts have in common is computed by one of them."""
    a, b, c = COMMON[:8], [50, 51, 52, 53], [60, 61, 62, 63]
    prompts = [[*a, *b, 1, 2], [*a, *c, 1], [*a, *c, 3], [*a, *b, 1, 2, 4], [8, 8, 8]]
    run = Engine(make_model("llama", NAME), backend="reference", block_size=B).generate(prompts, 5)
    assert tokens(run) == answers(make_model("llama", "sdpa"), prompts, 5)
    # First the first prompt and the one that is like no other; then [a, c, 1] and the last of [a, b]; then [a, c, 3].
    assert run.hit_tokens == 8 + 12 + 12
    assert run.prefill_steps == 3


@pytest.mark.parametrize("max_step_tokens", [1, 3, 7, 18])
def test_a_prefix_that_takes_several_steps(make_model: Make, max_step_tokens: int) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=B, max_step_tokens=max_step_tokens)
    run = engine.generate(PROMPTS, 6)
    assert tokens(run) == answers(make_model("llama", "sdpa"), PROMPTS, 6)
    assert run.hit_tokens == 40
    assert computed(run) <= max_step_tokens * run.prefill_steps


def test_a_prompt_that_is_the_prefix_of_another(make_model: Make) -> None:
    """Exactly full blocks: the shorter one gives them; where it comes second, its last token is computed still."""
    prompts = [COMMON[:8], COMMON[:12], COMMON[:8]]
    run = Engine(make_model("llama", NAME), backend="reference", block_size=B).generate(prompts, 6)
    assert tokens(run) == answers(make_model("llama", "sdpa"), prompts, 6)
    assert run.hit_tokens == 8 + 4


def test_the_next_turn_finds_the_last_one(make_model: Make) -> None:
    model = make_model("llama", NAME)
    engine = Engine(model, backend="reference", block_size=B)
    first = engine.generate([PROMPTS[0]], 8).completions[0]
    assert engine.cache.pool.in_use == 0
    turn = [*PROMPTS[0], *first.tokens, 40, 41]
    run = engine.generate([turn], 8)
    # 17 + 8 tokens, of which the last was never computed: 24.
    assert run.hit_tokens == 24
    assert tokens(run) == answers(make_model("llama", "sdpa"), [turn], 8)


def test_sharing_makes_room(make_model: Make) -> None:
    """In a cache of 12 blocks two of these fit beside each other without sharing, all four with it."""
    model, prompts = make_model("llama", NAME), [COMMON[:12] + own for own in ([1], [2], [3], [4])]
    expected = answers(make_model("llama", "sdpa"), prompts, 5)
    together = {}
    for sharing in (True, False):
        engine = Engine(model, backend="reference", block_size=B, num_blocks=12, prefix_sharing=sharing)
        counts: list[int] = []

        def note(_: Any, engine: Engine = engine, counts: list[int] = counts) -> None:
            assert engine.cache.pool.in_use <= 12
            counts.append(len(engine.cache.manager.sequences))

        run = engine.generate(prompts, 5, on_token=note)
        assert tokens(run) == expected
        assert engine.cache.pool.in_use == 0
        assert not engine.cache.manager.sequences
        together[sharing] = (max(counts), run.decode_steps)
    assert together[True][1] < together[False][1]


def test_prefixes_make_room_for_what_is_new(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=B, num_blocks=6)
    engine.generate([PROMPTS[0]], 4)
    assert len(engine.cache.pool.evictable) == 5
    other = [[int(token) for token in np.random.default_rng(4).integers(4, 97, 18)]]
    run = engine.generate(other, 4)
    assert run.evicted_blocks >= 4
    assert tokens(run) == answers(make_model("llama", "sdpa"), other, 4)


def test_after_an_error_nothing_is_held(make_model: Make) -> None:
    model = make_model("llama", NAME)
    engine = Engine(model, backend="reference", block_size=B)

    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, 8, on_token=fail)
    assert engine.cache.pool.in_use == 0
    assert tokens(engine.generate(PROMPTS, 8)) == answers(make_model("llama", "sdpa"), PROMPTS, 8)


def test_waste(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=B)
    run = engine.generate([COMMON], 4)
    # Steps with 14, 15, 16 and 17 tokens, in 4, 4, 4 and 5 blocks.
    assert run.waste == pytest.approx((2 + 1 + 0 + 3) / (4 * (4 + 4 + 4 + 5)))
    assert (run.blocks_peak, run.tokens_at_peak) == (5, 17)


def test_a_full_cache_says_so(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=B, num_blocks=2)
    held = engine.cache.manager.begin(COMMON)
    with pytest.raises(CacheError, match=r"4 device blocks are needed, 2 are available.*num_blocks= \(it has 2\)"):
        engine.cache.next_step([(held, 14)])


@pytest.mark.parametrize("seed", range(6))
def test_random_prompts(make_model: Make, seed: int) -> None:
    """Prompts that begin with pieces of each other, in small steps and small caches, call after call."""
    rng = random.Random(seed)
    model = make_model("llama", NAME)
    own = make_model("llama", "sdpa")
    block, count = rng.choice([1, 2, 4, 8]), rng.randint(1, 6)
    engine = Engine(
        model,
        backend="reference",
        block_size=block,
        num_blocks=rng.choice([None, -(-30 // block) + rng.randint(0, 3)]),
        max_sequences=rng.randint(1, 5),
        max_step_tokens=rng.choice([2, 9, 64]),
    )
    said: list[list[int]] = [[rng.randint(4, 96) for _ in range(rng.randint(1, 12))]]
    for _ in range(2):
        prompts = []
        for _ in range(rng.randint(1, 6)):
            begin = rng.choice(said)
            prompts.append((begin[: rng.randint(1, 16)] + [rng.randint(4, 96) for _ in range(rng.randint(0, 6))])[:24])
            said.append(prompts[-1])
        run = engine.generate(prompts, count)
        assert tokens(run) == answers(own, prompts, count)
        computed(run)
        assert engine.cache.pool.in_use == 0
        assert run.waste < 1


# Mutation siblings: a share that is wrong must show in the tokens.


def _blind(_: PrefixTree, parent: Any, tenant: Any, key: bytes, found: Any = PrefixTree.child) -> Any:
    """Take any block at this place, whatever its tokens are."""
    above = _._roots.get(tenant) if parent is None else parent
    return found(_, parent, tenant, key) or (None if above is None else next(iter(above.children.values()), None))


def _uncomputed(self: CacheManager, step: Any, commit: Any = CacheManager.commit) -> None:
    """Publish blocks with others' contents: each sequence's table rotated by one block."""
    for seq in step.sequences:
        if seq.num_blocks > 2 and not seq.published:
            first, second = seq.blocks[:2].tolist()
            seq.set_block(0, second)
            seq.set_block(1, first)
    commit(self, step)


@pytest.mark.parametrize(
    ("owner", "name", "broken"), [(PrefixTree, "child", _blind), (CacheManager, "commit", _uncomputed)]
)
def test_a_broken_share_is_noticed(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: Any
) -> None:
    prompts = [*PROMPTS, [*COMMON[:4], *COMMON[:10], 77]]
    expected = answers(make_model("llama", "sdpa"), prompts, 8)
    model = make_model("llama", NAME)
    assert tokens(Engine(model, backend="reference", block_size=B).generate(prompts, 8)) == expected
    monkeypatch.setattr(owner, name, broken)
    assert tokens(Engine(model, backend="reference", block_size=B).generate(prompts, 8)) != expected
