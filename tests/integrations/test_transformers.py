"""transformers models on a paged cache say, token for token, what they say on transformers' own kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.errors import CacheError, GradientError, ModelError  # noqa: E402
from attn_dispatch.integrations.transformers import NAME, PagedCache, attach, register  # noqa: E402

register()

pytestmark = pytest.mark.usefixtures("no_gradients")

Make = Callable[..., Any]


def batch(model: Any, lengths: tuple[int, ...] = (7, 15, 20)) -> dict[str, Any]:
    """Left-padded prompts of these lengths."""
    torch.manual_seed(1)
    width = max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return {"input_ids": torch.randint(1, 97, mask.shape) * mask, "attention_mask": mask}


def answers(model: Any, inputs: dict[str, Any], backend: str | None = None, **options: Any) -> Any:
    """Generate, on a paged cache when a backend is named."""
    if backend is not None:
        model.set_attn_implementation(NAME)
        options["past_key_values"] = PagedCache(model, block_size=4, backend=backend)
    return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **options})


def test_left_padded_batch(make_model: Make, kind: str, backend: str) -> None:
    model = make_model(kind)
    inputs = batch(model)
    expected = answers(model, inputs)
    assert torch.equal(answers(model, inputs, backend), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_sdpa_says_the_same(make_model: Make, kind: str, backend: str) -> None:
    model = make_model(kind, "sdpa")
    inputs = batch(model)
    expected = answers(model, inputs)
    assert torch.equal(answers(model, inputs, backend), expected)


def test_logits_of_a_prompt_and_of_chunks(make_model: Make, kind: str, backend: str) -> None:
    model = make_model(kind)
    ids = batch(model, (20, 20))["input_ids"]
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation(NAME)
    cache = PagedCache(model, block_size=4, backend=backend)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([9, 1, 7, 3], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-3, rtol=1e-4)
    assert cache.get_seq_length() == 20


def test_without_a_cache(make_model: Make, kind: str, backend: str) -> None:
    model = make_model(kind)
    inputs = batch(model)
    expected = model(**inputs, use_cache=False).logits
    model.set_attn_implementation(NAME)
    with ad.use_backend(backend):
        found = model(**inputs, use_cache=False).logits
    tokens = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[tokens], expected[tokens], atol=1e-3, rtol=1e-4)


def test_an_encoder_that_looks_both_ways(backend: str) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        global_attn_every_n_layers=3, local_attention=8, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    inputs = batch(model)
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation(NAME)
    with ad.use_backend(backend):
        found = model(**inputs).last_hidden_state
    tokens = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[tokens], expected[tokens], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 6},
        {"repetition_penalty": 1.3},
    ],
    ids=lambda options: " ".join(options),
)
def test_ways_to_generate(make_model: Make, options: dict[str, Any], backend: str) -> None:
    model = make_model("gemma3")
    inputs = batch(model)
    torch.manual_seed(2)
    expected = answers(model, inputs, **options)
    torch.manual_seed(2)
    assert torch.equal(answers(model, inputs, backend, **options), expected)


def test_guessed_tokens_are_taken_back(make_model: Make, backend: str) -> None:
    """Prompt look-up guesses several tokens at once and crops the cache by those that were wrong."""
    model = make_model()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 4]), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5, "max_new_tokens": 20}
    expected = answers(model, inputs, **options)
    assert torch.equal(answers(model, inputs, backend, **options), expected)


def test_a_conversation_goes_on_in_the_same_cache(make_model: Make, backend: str) -> None:
    model = make_model("gemma3")
    inputs = batch(model)

    def talk(cache: Any) -> Any:
        said = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        more = torch.cat([said, torch.full((3, 4), 9)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 9, dtype=torch.long)], 1)
        return model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)

    expected = talk(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation(NAME)
    cache = PagedCache(model, block_size=4, backend=backend)
    assert torch.equal(talk(cache), expected)
    cache.reset()
    assert cache.pool.in_use == 0
    assert torch.equal(talk(cache), expected)


def test_selected_and_repeated_sequences_share_their_blocks(make_model: Make, backend: str) -> None:
    model = make_model()
    ids, more = batch(model, (10, 10))["input_ids"], torch.tensor([[4], [5], [6], [7]])
    rows = torch.tensor([1, 1, 0, 0])
    expected = model(torch.cat([ids[rows], more], 1), use_cache=False).logits[:, -1]
    model.set_attn_implementation(NAME)
    cache = PagedCache(model, block_size=4, backend=backend)
    model(ids, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    assert (cache.batch_size, cache.pool.in_use) == (4, 6)  # as many blocks as before
    logits = model(more, past_key_values=cache).logits[:, -1]
    assert cache.pool.in_use == 8  # of each pair one has copied the block that both write into
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


def test_one_plan_for_all_layers_of_a_spec(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma3", NAME)
    plans: list[ad.AttentionSpec] = []
    plan = ad.Attention.plan

    def counted(self: ad.Attention, batch: ad.AttentionMetadata) -> ad.Plan:
        plans.append(self.spec)
        return plan(self, batch)

    monkeypatch.setattr(ad.Attention, "plan", counted)
    cache = PagedCache(model, backend="reference")
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert [spec.window for spec in plans] == [(6, 0), (-1, -1)]
    assert [(layer.spec.window, count) for layer, count in cache.attentions] == [((6, 0), 2), ((-1, -1), 1)]


def test_layers_that_share_keys_do_not_write(make_model: Make) -> None:
    model = make_model("gemma3n", NAME)
    cache = PagedCache(model, backend="reference")
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert sorted(layer.spec.writes_kv for layer, _ in cache.attentions) == [False, False, True, True]
    assert [layer.store is not None for layer in cache.layers] == [True, True, False, False]


def test_a_cache_of_another_type(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference", kv_cache_dtype="bfloat16")
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert cache.layers[0].store.geometry.dtype == "bfloat16"


# What is refused, and that nothing wrong was computed on the way.


def test_a_model_on_other_kernels_is_refused(make_model: Make) -> None:
    model = make_model("llama", "sdpa")
    with pytest.raises(ModelError, match="set_attn_implementation"):
        PagedCache(model)


def test_kernels_changed_behind_the_cache(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="never attended to"):
        model(torch.tensor([[1, 2]]), past_key_values=cache)
    model.set_attn_implementation(NAME)
    cache.reset()
    model(torch.tensor([[1, 2]]), past_key_values=cache)


def test_an_ordinary_cache_is_refused(make_model: Make) -> None:
    model = make_model("llama", NAME)
    with ad.use_backend("reference"), pytest.raises(ModelError, match=r"PagedCache\(model\)"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=3)


def test_chunked_attention_is_refused() -> None:
    config = transformers.Llama4TextConfig(num_hidden_layers=4, hidden_size=32)
    config._attn_implementation = NAME
    with pytest.raises(ModelError, match="chunked_attention"):
        PagedCache(config)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("trained", ["all", "q_proj", "k_proj", "v_proj"])
def test_there_is_no_backward_and_it_says_so(make_model: Make, trained: str, cached: bool) -> None:
    """Inference with gradients enabled works; what would be a gradient without the attention's part is an error."""
    with torch.inference_mode(False):
        ids = torch.tensor([[1, 2, 3]])
        model = make_model("llama")
        expected = model(ids).logits.detach()
        model.set_attn_implementation(NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained == "all" or trained in name)
        options = {"past_key_values": PagedCache(model, backend="reference")} if cached else {"use_cache": False}
        with ad.use_backend("reference"):
            logits = model(ids, **options).logits
        torch.testing.assert_close(logits.detach(), expected, atol=1e-3, rtol=1e-4)
        assert logits.requires_grad
        with pytest.raises(GradientError, match="no gradient"):
            logits.sum().backward()


def test_a_mask_of_ones_own_is_refused(make_model: Make) -> None:
    model = make_model("llama", NAME)
    mask = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ModelError, match=r"a mask of shape \(1, 1, 2, 2\)"):
        model(torch.tensor([[1, 2]]), attention_mask=mask, past_key_values=PagedCache(model, backend="reference"))


def test_packed_rows_without_a_cache_are_refused(make_model: Make) -> None:
    model = make_model("llama", NAME)
    with pytest.raises(ModelError, match="packed sequences"):
        model(torch.tensor([[1, 2, 3]]), position_ids=torch.tensor([[0, 1, 0]]), use_cache=False)


def test_masks_that_contradict_the_cache_are_refused(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference")
    inputs = batch(model)
    model(**inputs, past_key_values=cache)
    one, mask = torch.ones(3, 1, dtype=torch.long), inputs["attention_mask"]
    with pytest.raises(CacheError, match="no attention_mask says which"):
        model(one, past_key_values=cache)
    with pytest.raises(CacheError, match="cannot be masked afterwards"):
        model(one, attention_mask=torch.cat([mask * 0, one], 1), past_key_values=cache)
    with pytest.raises(CacheError, match="holds 3 sequences, this batch is of 2"):
        model(one[:2], past_key_values=cache)
    # None of that has touched the cache: the right call goes on as if nothing had happened.
    found = model(one, attention_mask=torch.cat([mask, one], 1), past_key_values=cache).logits[:, -1]
    model.set_attn_implementation("eager")
    whole = {"input_ids": torch.cat([inputs["input_ids"], one], 1), "attention_mask": torch.cat([mask, one], 1)}
    torch.testing.assert_close(found, model(**whole, use_cache=False).logits[:, -1], atol=1e-3, rtol=1e-4)


def test_padding_cannot_be_cropped_back(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference")
    model(**batch(model, (2, 6)), past_key_values=cache)
    cache.crop(-2)
    assert cache.lens.tolist() == [0, 4]
    with pytest.raises(CacheError, match="padding cannot be put back"):
        cache.crop(-1)
    with pytest.raises(CacheError, match="negative"):
        cache.crop(1)


def test_a_full_cache_is_refused(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference", block_size=4, num_blocks=2)
    with pytest.raises(CacheError, match=r"3 device blocks are needed, 2 are available.*\(it has 2\)"):
        model(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    assert cache.length == 0
    model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
    assert cache.pool.in_use == 2


def test_one_layer_alone_cannot_be_reordered(make_model: Make) -> None:
    cache = PagedCache(make_model("llama", NAME))
    with pytest.raises(CacheError, match="share their block tables"):
        cache.layers[0].reorder_cache(torch.tensor([0]))


# Without a ritual.


def test_an_attached_model_makes_its_own_cache(make_model: Make, backend: str) -> None:
    model = make_model("gemma3")
    inputs = batch(model)
    expected = answers(model, inputs)
    assert attach(model, backend=backend, block_size=4) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(answers(model, inputs), expected)
        assert torch.equal(answers(model, inputs), expected)  # another call, another cache
    own = PagedCache(model, backend=backend)
    assert torch.equal(answers(model, inputs, past_key_values=own), expected)
    assert own.length == inputs["input_ids"].shape[1] + 11  # a cache that is given is used
    model.set_attn_implementation("eager")
    assert torch.equal(answers(model, inputs), expected)


def test_attach_refuses_before_the_first_call(make_model: Make) -> None:
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ModelError, match="BloomForCausalLM does not call its attention through"):
        attach(transformers.BloomForCausalLM(config))
    config = transformers.Llama4TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, attention_chunk_size=5,
    )  # fmt: skip
    with pytest.raises(ModelError, match="chunked_attention"):
        attach(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_compiled_models_break_the_graph_at_each_attention(make_model: Make, kind: str) -> None:
    model = make_model(kind)
    ids, more = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]]), torch.tensor([[14]])
    expected = model(torch.cat([ids, more], 1), use_cache=False).logits[:, -1]
    model.set_attn_implementation(NAME)
    cache = PagedCache(model, backend="reference", block_size=4)
    compiled = torch.compile(model, backend="eager")
    compiled(ids, past_key_values=cache)
    torch.testing.assert_close(compiled(more, past_key_values=cache).logits[:, -1], expected, atol=1e-3, rtol=1e-4)
