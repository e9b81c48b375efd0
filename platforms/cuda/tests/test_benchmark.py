"""The benchmark for those who have a GPU: without one it says so and claims nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "cuda_attention.py"


def run(*arguments: str, hidden: bool = True) -> subprocess.CompletedProcess[str]:
    environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path), "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "finds no NVIDIA GPU here: nothing is measured, nothing is claimed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_on_a_gpu_it_writes_what_it_measured(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia")
    done = run("--quick", "--output", str(tmp_path), "--backends", "torch/sdpa,cuda/flashinfer", hidden=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    report = json.loads(file.read_text())
    assert report["copy_gb_s"] > 100
    assert {row["kind"] for row in report["rows"]} == {"decode", "prefill"}
