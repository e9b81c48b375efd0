"""What `doctor` says: of every field of a layer, of a model, of what is disabled; also without its extra."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from commands import install, reports, run

import attn_dispatch as ad
from attn_dispatch import hardware
from attn_dispatch.cli import installable, text
from attn_dispatch.cli.model_config import layer_kinds
from attn_dispatch.errors import ModelError

ROOT = Path(ad.__file__).parents[1]

LLAMA = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
GEMMA = LLAMA | {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 1024,
    "head_dim": 128,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "torch_dtype": "float16",
}


def without_the_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that cannot import what the extra `cli` brings."""
    script = (
        "import sys\n"
        "for name in ('typer', 'rich', 'platformdirs', 'click'): sys.modules[name] = None\n"
        "sys.argv[:] = ['attn-dispatch', *sys.argv[1:]]\n"
        "from attn_dispatch.__main__ import main\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


def test_doctor_needs_no_package_of_the_extra() -> None:
    done = without_the_extra("doctor")
    assert (done.returncode, "would run" in done.stdout, done.stderr) == (0, True, "")
    other = without_the_extra("verify")
    assert (other.returncode, "pip install typer rich platformdirs" in other.stderr) == (2, True)


OPTIONS: dict[str, tuple[list[str], Any]] = {
    "num_heads": (["--num-heads", "16"], 16),
    "num_kv_heads": (["--kv-heads", "4"], 4),
    "head_size": (["--head-size", "64"], 64),
    "value_head_size": (["--value-head-size", "96"], 96),
    "dtype": (["--dtype", "fp16"], "float16"),
    "kv_cache_dtype": (["--kv-cache-dtype", "int8"], "int8"),
    "block_size": (["--block-size", "16"], 16),
    "scale": (["--scale", "0.5"], 0.5),
    "causal": (["--no-causal"], False),
    "window": (["--window", "7,0"], [7, 0]),
    "logits_soft_cap": (["--logits-soft-cap", "30"], 30.0),
    "alibi": (["--alibi"], True),
    "sinks": (["--sinks"], True),
    "kind": (["--kind", "cross"], "cross"),
    "writes_kv": (["--no-writes-kv"], False),
    "returns_lse": (["--returns-lse"], True),
}


def test_every_field_has_an_option() -> None:
    assert OPTIONS.keys() == {field.name for field in fields(ad.AttentionSpec)}
    plain = {name: option for name, option in OPTIONS.items() if name not in ("kind", "causal")}
    words = [word for options, _ in plain.values() for word in options]
    spec = json.loads(run("doctor", "--json", *words).stdout)["explanation"]["spec"]
    assert {name: spec[name] for name in plain} == {name: value for name, (_, value) in plain.items()}
    spec = json.loads(run("doctor", "--json", "--kind", "encoder", "--no-causal").stdout)["explanation"]["spec"]
    assert (spec["kind"], spec["causal"]) == ("encoder", False)


def test_doctor_tells_of_each_kind_of_a_models_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    done = run("doctor", "--model", str(tmp_path))
    assert "2 layers, sliding_attention" in done.stdout
    assert "2 layers, full_attention" in done.stdout
    assert done.stdout.count("would run") == 2
    assert done.stdout.count("block_size=32") == 2  # what the reference prefers, as nothing else was asked for
    wrong = run("doctor", "--model", str(tmp_path / "nowhere"))
    assert (wrong.returncode, "config.json cannot be read" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, [(4, "full_attention", {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "dtype": "bfloat16"})]),
        ({"text_config": LLAMA}, [(4, "full_attention", {"num_heads": 8})]),
        (
            GEMMA,
            [
                (2, "sliding_attention", {"window": (1023, 0), "scale": 1 / 16, "logits_soft_cap": 50.0}),
                (2, "full_attention", {"window": (-1, -1), "dtype": "float16", "head_size": 128}),
            ],
        ),
        (LLAMA | {"sliding_window": 4096}, [(4, "sliding_attention", {"window": (4095, 0)})]),
        (LLAMA | {"sliding_window": 4096, "use_sliding_window": False}, [(4, "full_attention", {})]),
        (
            LLAMA | {"sliding_window": 4, "sliding_window_pattern": 2},
            [(2, "sliding_attention", {}), (2, "full_attention", {})],
        ),
        (LLAMA | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, [(1, "full_attention", {})]),
        (
            LLAMA | {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24},
            [(4, "full_attention", {"num_kv_heads": 8, "head_size": 48, "value_head_size": 24})],
        ),
        (LLAMA | {"model_type": "gpt_oss"}, [(4, "full_attention", {"sinks": True})]),
    ],
)
def test_kinds_of_layers(
    tmp_path: Path, config: dict[str, Any], expected: list[tuple[int, str, dict[str, Any]]]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    kinds = layer_kinds(tmp_path, 16)
    assert [(count, kind) for count, kind, _ in kinds] == [(count, kind) for count, kind, _ in expected]
    for (_, _, spec), (_, _, values) in zip(kinds, expected, strict=True):
        assert {name: getattr(spec, name) for name in values} == values
        assert spec.block_size == 16


@pytest.mark.parametrize("config", ["not JSON", "{}", json.dumps(LLAMA | {"layer_types": ["chunked_attention"]})])
def test_a_configuration_that_says_too_little_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError):
        layer_kinds(tmp_path, 32)


def test_what_is_disabled_is_listed_as_disabled(tmp_path: Path) -> None:
    environ = install(tmp_path, "fine", "from attn_dispatch.reference import ReferenceBackend as Backend\n")
    done = run("doctor", **environ, ATTN_DISPATCH_DISABLE="fine/bad")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("fine/bad")]
    assert row.split()[1] == "disabled"
    assert json.loads(run("doctor", "--json", **environ, ATTN_DISPATCH_DISABLE="fine/bad").stdout)["disabled"] == [
        "fine/bad"
    ]


ABSENT = """
from attn_dispatch import Availability
from attn_dispatch.reference import ReferenceBackend

class Backend(ReferenceBackend):
    def probe(self):
        return Availability(False, "no flux capacitor here", "Buy one")
"""


def test_reason_and_remedy_are_said_once(tmp_path: Path) -> None:
    environ = install(tmp_path, "absent", ABSENT)
    done = run("doctor", **environ)
    assert done.returncode == 0
    assert (done.stdout.count("no flux capacitor"), done.stdout.count("Buy one")) == (1, 1)


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(0)\n",
        "from attn_dispatch.reference import ReferenceBackend\n"
        "class Backend(ReferenceBackend):\n    def probe(self): raise ValueError('odd [/x] machine')\n",
        "from attn_dispatch.reference import ReferenceBackend\n"
        "class Backend(ReferenceBackend):\n    def verdict(self, spec): raise SystemExit(0)\n",
    ],
    ids=["import", "probe", "verdict"],
)
def test_doctor_survives_what_a_plugin_raises(tmp_path: Path, source: str) -> None:
    environ = install(tmp_path, "odd", source)
    done = run("doctor", **environ)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "odd/bad" in done.stdout
    assert "would run" in done.stdout
    assert reports(run("doctor", "--json", **environ))["odd/bad"]["state"] == "broken"


def test_only_a_step_that_ran_is_told_as_ok(tmp_path: Path) -> None:
    refuses = """
        from attn_dispatch import Refusal
        from attn_dispatch.reference import ReferenceBackend

        class Backend(ReferenceBackend):
            def verdict(self, spec):
                return self.refuse(Refusal("head_size", spec.head_size, "needs 7"))
        """
    report = reports(run("doctor", "--json", **install(tmp_path, "refuses", refuses)))["refuses/bad"]
    assert (report["state"], "head_size=128: needs 7" in report["reason"]) == ("untried", True)


def test_doctor_shows_what_is_wrong_with_the_environment() -> None:
    done = run("doctor", ATTN_DISPATCH_BACKEND="nonsense")
    assert done.returncode == 1
    assert "ATTN_DISPATCH_BACKEND names 'nonsense', which is not installed" in " ".join(done.stdout.split())
    assert "Machine" in done.stdout


def test_hints_name_what_is_there(tmp_path: Path) -> None:
    for platform in hardware.NAMES:
        for command in installable.install_commands(platform):
            folder = Path(command.removeprefix("pip install -e "))
            assert (folder / "pyproject.toml").exists()
    # Installed from wheels there is no checkout: what was written down when the wheel was built is said.
    core = tmp_path / "site" / "attn_dispatch"
    core.mkdir(parents=True)
    assert installable.install_commands("cpu", core=core) == []
    row = {
        "distribution": "a",
        "extra": "x",
        "platforms": ["cpu"],
        "backends": ["a/b"],
        "command": "pip install 'c[x]'",
    }
    (core / "installable.json").write_text(json.dumps([row]))
    assert installable.install_commands("cpu", core=core) == ["pip install 'c[x]'"]
    assert installable.install_commands("tpu", core=core) == []
    assert installable.install_commands("cpu", ["a/b"], core) == []


def test_a_new_platform_is_offered_without_an_edit_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "platforms" / "new"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "attn-dispatch-new"\n'
        '[project.entry-points."attn_dispatch.backends.xpu"]\n"10 new/paged" = "new:Backend"\n'
    )
    assert installable.install_commands("xpu", core=tmp_path / "attn_dispatch") == [f"pip install -e {folder}"]


def test_tables_are_wrapped_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["cpu/numba", "yes", "one two three four five six seven"], ["x", "no", ""]]
    assert text.table(rows) == "cpu/numba  yes  one two three four five\n                six seven\nx          no"
    assert max(map(len, text.paragraph("!", "word " * 30).splitlines())) <= 40
