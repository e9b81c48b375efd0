"""The packed loop: each prompt gets the answer that it would get alone, however the batch changes around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")
pytest.importorskip("transformers", reason="not run: needs transformers")

from attn_dispatch.errors import CacheError, ModelError, PlanError  # noqa: E402
from attn_dispatch.integrations.transformers import NAME, PagedCache, register  # noqa: E402
from attn_dispatch_generate.engine import Completion, Engine, Run  # noqa: E402
from attn_dispatch_generate.sampling import Sampler  # noqa: E402

register()

pytestmark = pytest.mark.usefixtures("no_gradients")

Make = Callable[..., Any]
PROMPTS = [[int(token) for token in torch.arange(3 + n) * 7 % 96 + 1] for n in (0, 17, 5, 9)]


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers' own loop and kernels say."""
    said = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return list(said[0, len(prompt) :].tolist())


def expected_of(make_model: Make, kind: str, count: int = 10) -> list[list[int]]:
    model = make_model(kind)
    return [alone(model, prompt, count) for prompt in PROMPTS]


def tokens(run: Run) -> list[list[int]]:
    return [completion.tokens for completion in run.completions]


def test_answers_of_a_packed_batch(make_model: Make, kind: str, backend: str) -> None:
    expected = expected_of(make_model, kind)
    engine = Engine(make_model(kind, NAME), backend=backend, block_size=4)
    run = engine.generate(PROMPTS, 10)
    assert tokens(run) == expected
    assert [completion.finish_reason for completion in run.completions] == ["length"] * 4
    # They begin alike. One that is 3 tokens long has no full block to share, and goes with the first of the others.
    assert run.prompt_tokens == sum(map(len, PROMPTS)) == run.prefill_tokens + run.hit_tokens
    assert run.hit_tokens == 4 + 8
    assert (run.prefill_steps, run.decode_steps, run.decode_tokens) == (2, 9, 36)
    assert engine.cache.pool.in_use == 0
    assert tokens(engine.generate(PROMPTS[::-1], 10)) == expected[::-1]  # and again, in the same blocks


@pytest.mark.parametrize("max_step_tokens", [1, 4, 13])
def test_prompts_in_pieces(make_model: Make, max_step_tokens: int) -> None:
    engine = Engine(make_model("gemma3", NAME), backend="reference", max_step_tokens=max_step_tokens)
    run = engine.generate(PROMPTS, 10)
    assert tokens(run) == expected_of(make_model, "gemma3")
    assert run.prefill_steps == -(-sum(map(len, PROMPTS)) // max_step_tokens)


def test_prompts_wait_for_room(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=4, num_blocks=9)
    order: list[int] = []

    def ended(completion: Completion) -> None:
        assert engine.cache.pool.in_use <= 9
        if completion.finish_reason:
            order.append(completion.index)

    run = engine.generate(PROMPTS, 10, on_token=ended)
    assert tokens(run) == expected_of(make_model, "llama")
    assert sorted(order) == [0, 1, 2, 3]
    assert run.prefill_steps > 1
    assert 0 < run.tokens_at_peak <= 4 * run.blocks_peak <= 36


def test_a_cache_that_is_just_large_enough(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=4, num_blocks=1)
    assert tokens(engine.generate([PROMPTS[0]], 2)) == [expected_of(make_model, "llama", 2)[0]]
    assert len(engine.generate([[5, 6, 7, 8]], 1).completions[0].tokens) == 1


def test_few_at_once(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", max_sequences=1)
    run = engine.generate(PROMPTS, 10)
    assert tokens(run) == expected_of(make_model, "llama")
    assert (run.prefill_steps, run.decode_steps) == (4, 36)


def test_a_stop_token_ends_a_sequence_and_frees_its_blocks(make_model: Make) -> None:
    expected = expected_of(make_model, "llama")
    stop = expected[1][4]
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=4)
    run = engine.generate(PROMPTS, 10, stop=[stop])
    cut = [said[: said.index(stop) + 1] if stop in said else said for said in expected]
    assert tokens(run) == cut
    assert run.completions[1].finish_reason == "stop"
    assert engine.cache.pool.in_use == 0


def test_draws_do_not_depend_on_the_batch(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference")
    together = tokens(engine.generate(PROMPTS, 10, sampler=Sampler(0.8, 0.9, seed=3)))
    one_by_one = Engine(make_model("llama", NAME), backend="reference", max_sequences=1)
    assert tokens(one_by_one.generate(PROMPTS, 10, sampler=Sampler(0.8, 0.9, seed=3))) == together
    assert tokens(engine.generate(PROMPTS, 10, sampler=Sampler(0.8, 0.9, seed=4))) != together
    assert tokens(engine.generate(PROMPTS, 10, sampler=Sampler(0.8, 1e-6, seed=3))) == expected_of(make_model, "llama")


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_senseless_sampling_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ModelError, match=f"temperature={temperature}"):
        Sampler(temperature, top_p)


def test_what_cannot_be_run_is_refused_before_it_is_begun(make_model: Make) -> None:
    engine = Engine(make_model("llama", NAME), backend="reference", block_size=4, num_blocks=3)
    with pytest.raises(CacheError, match="prompt 1: 20 tokens and 10 new ones need 8 blocks of 4, the cache has 3"):
        engine.generate(PROMPTS, 10)
    with pytest.raises(CacheError, match="prompt 0 has no tokens"):
        engine.generate([[]], 10)
    with pytest.raises(CacheError, match="max_new_tokens=0"):
        engine.generate(PROMPTS, 0)
    assert engine.generate([], 10).completions == []


def test_a_packed_step_has_to_be_announced(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference")
    cache.next_step([(cache.manager.begin([1, 2]), 2)])
    model(torch.tensor([[1, 2]]), past_key_values=cache)
    with pytest.raises(PlanError, match="announced"):
        model(torch.tensor([[3]]), past_key_values=cache)
