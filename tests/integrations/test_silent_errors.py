"""What was once wrong without a word: each case equals transformers' own kernels now, or is refused."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")

from transformers import masking_utils  # noqa: E402

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.errors import CacheError, ModelError  # noqa: E402
from attn_dispatch.integrations.masks import MaskPattern, mask_of  # noqa: E402
from attn_dispatch.integrations.transformers import (  # noqa: E402
    NAME,
    PagedCache,
    attach,
    attention_forward,
    padding_mask,
    register,
)

register()

pytestmark = pytest.mark.usefixtures("no_gradients")

Make = Callable[..., Any]
CLOSE: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-4}


def random_weights(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return model.eval()


def decoder(config: str, **sizes: Any) -> Any:
    common = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0,
    }  # fmt: skip
    tiny = getattr(transformers, config)(**{**common, **sizes})
    tiny._attn_implementation = "eager"
    return random_weights(transformers.AutoModelForCausalLM.from_config(tiny))


def encoder_decoder(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return random_weights(transformers.AutoModelForSeq2SeqLM.from_config(config))


def ragged(*lengths: int, right: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(1)
    width = max(lengths)
    rows = [[1] * n + [0] * (width - n) for n in lengths]
    mask = torch.tensor(rows if right else [row[::-1] for row in rows])
    return torch.randint(3, 97, mask.shape) * mask, mask


@pytest.mark.parametrize("kind", ["Bart", "Marian"])
@pytest.mark.parametrize("target", [8, 5, 11])
def test_scoring_with_a_padded_source(kind: str, target: int) -> None:
    """As long as the target, it was taken for self-attention."""
    model = encoder_decoder(kind)
    source, mask = ragged(5, 8, right=True)
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 97, (2, target))}
    expected = model(**inputs, use_cache=False).logits
    model.set_attn_implementation(NAME)
    with ad.use_backend("reference"):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["Bart", "Marian"])
def test_generation_by_an_encoder_and_a_decoder(kind: str, options: dict[str, Any]) -> None:
    model = encoder_decoder(kind)
    source, mask = ragged(5, 8, right=True)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    expected = model.generate(source, attention_mask=mask, **options)
    with ad.use_backend("reference"):
        attach(model)
        assert torch.equal(model.generate(source, attention_mask=mask, **options), expected)
        # Another source in the same shapes: what was stored of the first one is not read again.
        other = source.flip(1) * mask
        again = model.generate(other, attention_mask=mask, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(again, model.generate(other, attention_mask=mask, **options))


def test_chunked_attention_without_a_cache() -> None:
    model = decoder(
        "Llama4TextConfig", head_dim=8, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=5,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    ids, mask = ragged(10, 13)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(NAME)
    with ad.use_backend("reference"):
        found = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


def test_values_that_are_split_after_the_cache_are_refused() -> None:
    model = decoder("DiffLlamaConfig")
    ids, mask = ragged(4, 6)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(NAME)
    cache = PagedCache(model, backend="reference")
    with pytest.raises(ModelError, match="other keys or values than those that the cache returned"):
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    with pytest.raises(ModelError, match="other keys or values"):
        model(ids, attention_mask=mask, past_key_values=cache)
    with ad.use_backend("reference"):
        found = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("change", ["keys", "values", "twice"])
def test_keys_that_are_changed_after_the_cache_are_refused(make_model: Make, change: str) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference")
    module, q = model.model.layers[0].self_attn, torch.zeros(1, 6, 3, 8)
    k, v = cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    k, v = (k * 1, v) if change == "keys" else (k, v * 1) if change == "values" else (k, v)
    if change == "twice":
        attention_forward(module, q, k, v, None)
    with pytest.raises(ModelError, match="than those that the cache returned"):
        attention_forward(module, q, k, v, None)


@pytest.mark.parametrize("cached", [True, False])
def test_sinks_follow_the_weights(make_model: Make, cached: bool) -> None:
    model = make_model("gpt_oss")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])

    def logits() -> Any:
        options: dict[str, Any] = {"past_key_values": cache} if cached else {"use_cache": False}
        with ad.use_backend("reference"):
            return model(ids, **options).logits

    model.set_attn_implementation(NAME)
    cache = PagedCache(model, backend="reference")
    before = logits()
    for layer in model.model.layers:
        layer.self_attn.sinks.data += 3
    cache.reset()
    found = logits()
    model.set_attn_implementation("eager")
    expected = model(ids, use_cache=False).logits
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_mask_that_is_changed_in_place(make_model: Make) -> None:
    model = make_model("llama")
    ids, mask = ragged(6, 9)
    mask = mask.bool()
    with ad.use_backend("reference"):
        for first in (3, 5, 4):
            mask[0, :first] = False
            mask[0, first:] = True
            model.set_attn_implementation("eager")
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            model.set_attn_implementation(NAME)
            found = model(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found[mask], expected[mask], **CLOSE)


def test_padding_on_the_right_of_a_cached_batch_says_so(make_model: Make) -> None:
    model = make_model("llama", NAME)
    ids, mask = ragged(4, 6, right=True)
    with pytest.warns(UserWarning, match="sequence 0 is padded on the right"):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=1, past_key_values=PagedCache(model, backend="reference")
        )
    ids, mask = ragged(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(
            ids, attention_mask=mask, max_new_tokens=2, past_key_values=PagedCache(model, backend="reference")
        )


def test_padding_between_tokens_and_a_window_are_refused(make_model: Make) -> None:
    model = make_model("gemma3", NAME)
    ids, mask = ragged(9, 9)
    mask[0, 4:6] = 0
    with pytest.raises(ModelError, match="padding between the tokens"):
        model(ids, attention_mask=mask, past_key_values=PagedCache(model, backend="reference"))
    with ad.use_backend("reference"), pytest.raises(ModelError, match="padding between the tokens"):
        model(ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("argument", ["indices", "block_indices", "cu_seq_lens_q", "position_bias"])
def test_arguments_that_change_what_is_seen_are_refused(make_model: Make, argument: str) -> None:
    module = make_model("llama", NAME).model.layers[0].self_attn
    q, k = torch.zeros(1, 6, 3, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(ModelError, match=argument.replace("_", ".")):
        attention_forward(module, q, k, k, None, **{argument: torch.zeros(3)})


PATTERNS = [
    (masking_utils.causal_mask_function, None, MaskPattern(True)),
    (masking_utils.bidirectional_mask_function, None, MaskPattern(False)),
    (masking_utils.sliding_window_causal_mask_function(7), 7, MaskPattern(True, (6, 0))),
    (masking_utils.sliding_window_causal_mask_function(1), 1, MaskPattern(True, (0, 0))),
    (masking_utils.sliding_window_bidirectional_mask_function(4), 4, MaskPattern(False, (4, 4))),
    (masking_utils.chunked_causal_mask_function(5, torch.tensor([2, 0])), 5, MaskPattern(True, chunk=5)),
]


@pytest.mark.parametrize(("function", "size", "pattern"), PATTERNS)
def test_what_a_layer_sees_is_read_off_its_mask(function: Any, size: int | None, pattern: MaskPattern) -> None:
    """Not off what the module says of itself, which is not always true."""
    mask = padding_mask(2, 9, 9, mask_function=function, local_size=size)
    assert mask_of(mask, torch.nn.Module(), causal=not pattern.causal, window=99).pattern == pattern


def test_masks_of_other_patterns_are_refused() -> None:
    def every_other(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key) % 2 == 0

    for size in (None, 4):
        mask = padding_mask(1, 9, 9, mask_function=every_other, local_size=size)
        with pytest.raises(ModelError, match="neither causal, a window, chunks"):
            _ = mask_of(mask, torch.nn.Module(), causal=True, window=None).pattern
        with pytest.raises(ModelError, match="mask of shape"):  # also if it is copied on the way
            mask_of(mask.clone(), torch.nn.Module(), causal=True, window=None)


def test_a_mask_that_no_layer_uses_is_not_refused() -> None:
    """Qwen2-MoE makes one for windows of no size."""
    model = decoder("Qwen2MoeConfig", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ids, mask = ragged(4, 6)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(NAME)
    with ad.use_backend("reference"):
        found = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("kind", ["DeepseekV2", "DeepseekV3", "MiniCPM3"])
def test_latents_that_are_expanded_after_the_cache(kind: str) -> None:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    if kind != "MiniCPM3":
        sizes |= {**experts, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    model = decoder(f"{kind}Config", head_dim=4, num_key_value_heads=4, **sizes)
    ids, mask = ragged(9, 14)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **options)
    logits = model(ids, use_cache=False).logits
    model.set_attn_implementation(NAME)
    cache = PagedCache(model, backend="reference", block_size=4)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **options), expected)
    cache.reset()
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([6, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits, **CLOSE)


def test_a_copied_cache_has_blocks_of_its_own_and_no_weights(make_model: Make) -> None:
    model = make_model("gemma3", NAME)
    ids, more = torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), torch.tensor([[12]])
    cache = PagedCache(model, backend="reference", block_size=4)
    model(ids, past_key_values=cache)
    expected = model(torch.cat([ids, more], 1), past_key_values=PagedCache(model, backend="reference")).logits[:, -1]
    memo: dict[int, Any] = {}
    other = copy.deepcopy(cache, memo)
    assert not any(isinstance(thing, torch.nn.Module) for thing in memo.values())
    model(torch.tensor([[90]]), past_key_values=cache)  # the original goes another way
    torch.testing.assert_close(model(more, past_key_values=other).logits[:, -1], expected, **CLOSE)


def test_a_cache_ends_with_its_last_reference(make_model: Make) -> None:
    model = make_model("llama", NAME)
    gc.disable()
    try:
        cache = PagedCache(model, backend="reference")
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        store = weakref.ref(cache.layers[0].store)
        del cache
        assert store() is None
    finally:
        gc.enable()


def test_a_layer_that_missed_a_step_is_refused(make_model: Make) -> None:
    model = make_model("llama", NAME)
    cache = PagedCache(model, backend="reference")
    layers = model.model.layers
    q, k = torch.zeros(1, 6, 3, 8), torch.zeros(1, 2, 3, 8)
    for index in (0, 0, 1):
        keys, values = k.clone(), k.clone()
        if index == 1:
            with pytest.raises(CacheError, match="layer 1 missed a step"):
                cache.update(keys, values, index)
        else:
            attention_forward(layers[index].self_attn, q, *cache.update(keys, values, index), None)
