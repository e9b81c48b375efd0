"""The one command for a machine with a GPU: another Python, no network, wheels in a folder; what is done stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from attn_dispatch.dispatch import machine
from platforms.cuda.evidence import on_gpu
from platforms.cuda.evidence.on_gpu import Step, prepare, run_all, run_kit, steps

SCRIPT = Path(on_gpu.__file__)
HAS_GPU = any(device.kind == "nvidia" for device in machine().devices)


def wheel(folder: Path, name: str, version: str) -> None:
    """A wheel as pip makes them: a package, and its metadata."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"VERSION = {version!r}\n")
        archive.writestr(
            f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(f"{name}-{version}.dist-info/top_level.txt", f"{name}\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", f"{name}/__init__.py,,\n")


def test_on_a_machine_without_a_gpu_it_finds_every_package_and_says_what_it_would_run(tmp_path: Path) -> None:
    """Without a network: the interpreter's own packages, and those that were carried."""
    if HAS_GPU:
        pytest.skip("not run: a GPU is here")
    wheel(tmp_path / "wheels", "vllm", "0.33.7")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--wheels", str(tmp_path / "wheels"), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    for name in on_gpu.NEEDED:
        assert "not found" not in said[name], said[name]
    assert said["vllm"].split()[-1] == "0.33.7"
    assert "no NVIDIA GPU here: would run" in done.stdout
    assert "no NVIDIA GPU here" in said["cuda/flashinfer"]
    for step in steps(tmp_path):
        assert step.name in said
    assert not (tmp_path / "out").exists()


def test_it_runs_in_another_python_with_nothing_but_the_standard_library() -> None:
    """What is missing is said by name: no traceback of an import."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    others = [
        (name, str(python))
        for name in ("3.12", "3.13", "3.14")
        for python in (shutil.which(f"python{name}"), *(path / "bin" / "python" for path in pyenv.glob(f"{name}.*")))
        if python and not sys.version.startswith(name)
    ]
    working = [o for o in others if not subprocess.run([o[1], "-c", ""], capture_output=True, check=False).returncode]
    if not working:
        pytest.skip("not run: this machine has no other Python")
    name, python = working[0]
    done = subprocess.run([python, "-I", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert "torch, triton not found: would run" in done.stdout or "no NVIDIA GPU" in done.stdout, done.stderr
    assert f"Python {name}." in done.stdout
    assert done.returncode in (1, 2)


def test_this_checkout_is_found_by_entry_point_though_nothing_is_installed(tmp_path: Path) -> None:
    environ = prepare(tmp_path, None)
    script = (
        "from attn_dispatch.dispatch import registry\n"
        "import attn_dispatch_cuda, attn_dispatch_triton\n"
        "print(sorted(set(registry().names())))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert set(on_gpu.BACKENDS) <= set(eval(done.stdout))


def test_a_step_that_takes_too_long_or_fails_costs_no_other(tmp_path: Path) -> None:
    """report.json is whole after every step, and a step's own file has what it wrote before it was stopped."""
    seen = tmp_path / "seen"
    writes = f"import time\nfor i in range(1000):\n    open({str(seen)!r}, 'a').write('line\\n'); time.sleep(0.05)"
    todo = [
        Step("fails", ("-c", "import sys; print('why'); sys.exit(3)"), 1),
        Step("hangs", ("-c", writes), 1 / 60),
        Step("passes", ("-c", "print('done')"), 1),
    ]
    assert run_all(todo, tmp_path / "out", time.monotonic() + 60, dict(os.environ)) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["state"] for row in report] == ["exit status 3", "stopped after 1 s", "passed"]
    assert (tmp_path / "out" / "fails.log").read_text() == "why\n"
    assert seen.read_text().startswith("line\n")
    before = seen.read_text()
    time.sleep(0.3)
    assert seen.read_text() == before  # it was stopped, not left running
    assert run_all(todo[2:], tmp_path / "late", time.monotonic(), dict(os.environ)) == 1
    assert "no time left" in (tmp_path / "late" / "report.json").read_text()


def test_the_kits_findings_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the reference, which is always there."""
    import attn_dispatch.conformance as kit

    monkeypatch.setattr(kit, "CHECKS", kit.CHECKS[:4])
    file = tmp_path / "kit.jsonl"
    assert run_kit("reference", file) == 0
    *checks, row = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["check"] for line in checks] == [check.name for check in kit.CHECKS[:4]]
    assert row["backend"] == "reference"
    assert run_kit("cuda/flashinfer", tmp_path / "absent.jsonl") == 0 or HAS_GPU
