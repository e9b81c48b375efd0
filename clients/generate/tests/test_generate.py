"""`attn-dispatch generate` as a person runs it: a process of its own, a model from a folder, exit statuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attn_dispatch.errors import CacheError, MissingPackageError, ModelError
from attn_dispatch_generate import command, models

pytest.importorskip("typer", reason="not run: needs typer")
torch = pytest.importorskip("torch", reason="not run: needs torch")
transformers = pytest.importorskip("transformers", reason="not run: needs transformers")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from attn_dispatch_generate.engine import Engine  # noqa: E402
from attn_dispatch_generate.loading import load  # noqa: E402

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer (every word is a token), saved as transformers saves them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    target = tmp_path_factory.mktemp("model")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<user>", *(f"w{i}" for i in range(93))])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.chat_template = "<s> <user> {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(target)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(target)
    return target


def run(*arguments: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; the environment has no other settings of ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTN_DISPATCH_")}
    command = [sys.executable, "-m", "attn_dispatch", "generate", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**clean, "NO_COLOR": "1", **environment}, timeout=300, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def expected(folder: Path, prompt: str, count: int) -> list[int]:
    """What transformers says by itself, after the same template."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"<s> <user> {prompt}", return_tensors="pt")
    with torch.inference_mode():
        said = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return list(said[0, ids["input_ids"].shape[1] :].tolist())


def test_json_says_everything(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS[1:]) + "\n\n", encoding="utf-8")
    options = ["--prompts-file", file, "--model", folder, "--max-new-tokens", 9, "--json", "--backend", "reference"]
    said = json.loads(run(PROMPTS[0], *options).stdout)
    assert said["prompts"] == PROMPTS
    assert said["token_ids"] == [expected(folder, prompt, 9) for prompt in PROMPTS]
    assert said["texts"][0].split()[0].startswith("w")
    assert (said["backend"], said["source"], said["dtype"]) == ("reference", "the backend= argument", "float32")
    assert said["timings"]["prefill_tokens"] == (3 + 1 + 7) + 3 * 2  # words, and two of the template each
    assert said["timings"]["decode_tokens_per_s"] > 0
    cache = said["kv_cache"]
    assert cache["blocks"] == 3
    assert cache["tokens"] <= cache["blocks"] * cache["block_size"]
    assert 0 <= cache["waste"] < 1
    assert 0 <= cache["waste_at_peak"] < 1
    prefixes = said["prefix_cache"]
    assert (prefixes["sharing"], prefixes["prompt_tokens"], prefixes["hit_tokens"]) == (True, 17, 0)
    # Two layers, keys and values, 2 heads of 8, float32.
    assert cache["block_bytes"] == 2 * 2 * 2 * 8 * 4 * cache["block_size"]


def test_a_shared_prefix(folder: Path, tmp_path: Path) -> None:
    """Sharing changes what is computed and what is held, and no token."""
    common = " ".join(f"w{i % 90}" for i in range(7, 7 + 38 * 5, 5))
    prompts = [f"{common} w{i} w{2 * i}" for i in range(1, 6)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    options = ["--prompts-file", file, "--model", folder, "--max-new-tokens", 7, "--block-size", 8]
    options += ["--backend", "reference"]
    shared = json.loads(run(*options, "--json").stdout)
    alone = json.loads(run(*options, "--json", "--no-prefix-sharing").stdout)
    assert shared["token_ids"] == alone["token_ids"] == [expected(folder, prompt, 7) for prompt in prompts]
    # 2 tokens of the template, 38 common ones, 2 of its own: five full blocks of 8 are common to all.
    assert shared["timings"]["prefill_tokens"] == 42 + 4 * 2
    assert alone["timings"]["prefill_tokens"] == 5 * 42
    prefixes = shared["prefix_cache"]
    assert (prefixes["hit_tokens"], prefixes["blocks_shared"]) == (4 * 40, 5)
    assert prefixes["hit_rate"] == pytest.approx(160 / 210)
    assert prefixes["blocks_unshared"] - shared["kv_cache"]["blocks"] == 4 * 5
    assert (alone["prefix_cache"]["hit_rate"], alone["prefix_cache"]["blocks_shared"]) == (0, 0)
    out = " ".join(run(*options, "--stats").stdout.split())
    assert "hit rate 76.2%: 160 of 210 prompt tokens" in out
    assert "shared 5 blocks at once" in out
    assert "waste" in out


def test_one_prompt_is_streamed_and_summed_up(folder: Path) -> None:
    options = ["--model", folder, "--max-new-tokens", 6, "--stats"]
    out = run(PROMPTS[0], *options, ATTN_DISPATCH_BACKEND="reference").stdout
    text, _, rest = out.partition("\n\n")
    said = [int(word.removeprefix("w")) + 4 for word in text.split() if word.startswith("w")]
    assert said == [token for token in expected(folder, PROMPTS[0], 6) if token > 3]
    assert "reference, by ATTN_DISPATCH_BACKEND (2 layers)" in rest
    for line in ("prefill", "decode", "KV cache", "2 x heads=4/2"):
        assert line in rest


def test_several_prompts_are_told_apart(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    out = run("--prompts-file", file, "--model", folder, "--max-new-tokens", 3, "--backend", "reference").stdout
    for i, prompt in enumerate(PROMPTS):
        assert f"[{i + 1}/3] {prompt}\n" in out


def test_an_unknown_backend_is_refused_before_a_model_is_looked_for() -> None:
    done = run("hello", "--model", "/nowhere", status=2, ATTN_DISPATCH_BACKEND="nonsense")
    assert "'nonsense', which is not installed" in done.stderr
    assert "reference" in done.stderr
    assert "nowhere" not in done.stderr


def test_an_unknown_variable_is_refused(folder: Path) -> None:
    done = run("hello", "--model", folder, status=2, ATTN_DISPATCH_BAKEND="reference")
    assert "ATTN_DISPATCH_BACKEND" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to say"),
        (["--prompts-file", "/nowhere/prompts.txt"], "cannot be read"),
        (["hello", "--model", "/nowhere"], "there is no such folder"),
        (["hello", "--model", "smolm2"], "Did you mean smollm2?"),
        (["hello", "--dtype", "int8"], "is not one of"),
        (["hello", "--backend", "reference", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_requests(arguments: list[str], message: str) -> None:
    done = run(*arguments, status=2)
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert "cannot be loaded as a language model" in run("hello", "--model", tmp_path, status=2).stderr


# Requests that once ended in a traceback, or in nonsense without a word.


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_truncated_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    done = run("hello", "--model", broken, "--backend", "reference", status=2)
    assert "cannot be loaded as a language model" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_of_other_shapes(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot be loaded as a language model"):
        load(broken, "float32", "cpu")


def test_weights_that_are_not_there(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"no weights for 9 of the model's tensors, such as model.layers.2"):
        load(broken, "float32", "cpu")


def test_files_that_are_not_utf8(broken: Path, tmp_path: Path) -> None:
    (broken / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ModelError, match="cannot be loaded as a language model"):
        load(broken, "float32", "cpu")
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        command._prompts(None, str(tmp_path / "prompts.txt"))
    with pytest.raises(typer.BadParameter, match="not UTF-8"):
        command._prompts("caf\udce9", None)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(folder: Path, device: str) -> None:
    with pytest.raises(ModelError, match="cannot be moved to device"):
        load(folder, "float32", device)


def test_a_chat_template_that_fails(folder: Path) -> None:
    tokenizer = load(folder, "float32", "cpu")[1]
    tokenizer.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(ModelError, match="chat template fails: only system messages"):
        command._encode(tokenizer, "hello", raw=False)
    assert command._encode(tokenizer, "w1", raw=True)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(10**12, None), (16, 10**12)])
def test_a_cache_beyond_memory(folder: Path, block_size: int, num_blocks: int | None) -> None:
    network = load(folder, "float32", "cpu")[0]
    with pytest.raises(CacheError, match=f"of {block_size} tokens need .* GiB, cpu has"):
        command._check_memory(network, block_size, num_blocks, None)
    command._check_memory(network, 16, 100, "bfloat16")


def test_a_prompt_beyond_the_models_positions(folder: Path) -> None:
    network = load(folder, "float32", "cpu")[0]
    network.config.max_position_embeddings = 8
    engine = Engine(network, backend="reference")
    assert engine.generate([[4] * 5], 4).completions[0].tokens
    with pytest.raises(ModelError, match="prompt 0: 6 tokens and 4 new ones are more than the 8 positions"):
        engine.generate([[4] * 6], 4)


def test_weights_that_are_nan(folder: Path) -> None:
    network = load(folder, "float32", "cpu")[0]
    network.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    engine = Engine(network, backend="reference")
    with pytest.raises(ModelError, match="logits are not numbers"):
        engine.generate([[4, 5, 6]], 4)
    assert engine.cache.pool.in_use == 0


def test_asking_for_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['x', 'generate', '--help']\n"
        "from attn_dispatch.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


# Finding models.


def test_a_packaged_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = models.PackagedModel("Nobody-1B", "no_such_module_at_all", "nobody", "x.gguf", "pip install nobody")
    monkeypatch.setitem(models.PACKAGED, "nobody", absent)
    with pytest.raises(MissingPackageError, match=r"Install with: pip install nobody$"):
        models.find_model("nobody", Console(quiet=True))


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_dispatch_generate import loading

    monkeypatch.setitem(loading._REQUIREMENTS, "no_such_module_at_all", "nobody>=1")
    with pytest.raises(MissingPackageError, match=r"python -m pip install 'nobody>=1'$"):
        loading.require("json", "no_such_module_at_all")


def test_a_conversion_leaves_all_or_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Any]
) -> None:
    from attn_dispatch_generate import loading

    target = tmp_path / "models" / "tiny"
    seen: list[Path] = []

    def fail(source: Path, partial: Path, progress: Callable[[str, float], None]) -> None:
        progress("half of it", 0.5)
        (partial / "config.json").write_text("{}", encoding="utf-8")
        seen.append(partial)
        raise ModelError("the file ends in the middle")

    monkeypatch.setattr(loading, "convert_gguf", fail)
    with pytest.raises(ModelError, match="ends in the middle"):
        models.convert_once(tmp_path / "x.gguf", target, "Tiny", Console(quiet=True))
    assert not target.exists()
    assert not seen[0].exists()

    def race(source: Path, partial: Path, progress: Callable[[str, float], None]) -> None:
        target.mkdir(parents=True)  # somebody else has been faster
        (target / "config.json").write_text("theirs", encoding="utf-8")
        (partial / "config.json").write_text("ours", encoding="utf-8")

    monkeypatch.setattr(loading, "convert_gguf", race)
    models.convert_once(tmp_path / "x.gguf", target, "Tiny", Console(quiet=True))
    assert (target / "config.json").read_text(encoding="utf-8") == "theirs"
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ModelError, match="ATTN_DISPATCH_CACHE_DIR"):
        models.convert_once(tmp_path / "x.gguf", tmp_path / "file" / "tiny", "Tiny", Console(quiet=True))


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(tmp_path))
    assert models.cache_folder("models") == tmp_path / "models"
