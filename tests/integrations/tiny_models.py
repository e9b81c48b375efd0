"""Small models with random weights, made in code: every kind of layer that a paged cache has to get right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import attn_dispatch as ad

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# What each model is here for. Contexts in the tests are longer than every window.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),  # grouped heads
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "layer_types": SLIDING}),  # biases
    "gemma2": ("Gemma2Config", {"sliding_window": 7, "attn_logit_softcapping": 5.0}),  # soft-cap, own scale
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 7, "layer_types": SLIDING}),  # windows, query and key norms
    "gemma3n": (
        "Gemma3nTextConfig",  # the last two layers read the keys of layers 0 and 1 ...
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",  # ... and head sizes and kv heads differ between the layers
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 97,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",  # sinks
        {
            "sliding_window": 7,
            "layer_types": SLIDING,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}

# Backends that compute fp32 as fp32 on the host: what they say must be what transformers says, token for token.
EXACT_BACKENDS = [
    name
    for name, available in ad.backends().items()
    if available and (name == "reference" or name.startswith("torch/"))
]


@pytest.fixture(params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=EXACT_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    torch = pytest.importorskip("torch", reason="not run: needs torch")
    with torch.inference_mode():
        yield


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """`tiny_model`, where torch and transformers are installed."""
    pytest.importorskip("torch", reason="not run: needs torch")
    pytest.importorskip("transformers", reason="not run: needs transformers")
    return tiny_model


def tiny_model(kind: str = "llama", implementation: str = "eager", **changes: Any) -> Any:
    """A model with random weights, on its own kernels ("eager" is the only one that does soft-caps and sinks)."""
    import torch
    import transformers

    name, own = CONFIGS[kind]
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = getattr(transformers, name)(**{**sizes, **own, **changes})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # Large enough that the layers matter: at the usual 0.02 a wrong mask would go unnoticed.
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return model
