"""The benchmark for those who have a GPU: without one it claims nothing, and an error costs a row and no report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda_attention

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "cuda_attention.py"


def run(*arguments: str, hidden: bool = True) -> subprocess.CompletedProcess[str]:
    environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "rows.jsonl"), "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "finds no NVIDIA GPU here: nothing is measured, nothing is claimed" in done.stderr
    assert list(tmp_path.iterdir()) == []


class Subject:
    """Layers whose measurements take no GPU: some of them fail, one is killed."""

    def __init__(self, name: str) -> None:
        if name == "x/absent":
            raise RuntimeError("not installed\nin two lines")
        self.name = name

    def measure(self, kind: str, batch: int, tokens: int) -> dict[str, Any]:
        if (self.name, tokens) == ("x/fails", 2048):
            raise MemoryError("does not fit")
        if self.name == "x/killed" and kind == "prefill":
            raise KeyboardInterrupt
        rate = "gb_s" if kind == "decode" else "tflop_s"
        return {"ms": 1.0, rate: 2.0, "share": 0.5, "host_us": 3.0, "layers": 4, "graph": True}


def test_an_error_costs_a_row_and_a_kill_what_comes_after_it(tmp_path: Path) -> None:
    file = tmp_path / "reports" / "rows.jsonl"
    report = cuda_attention.Report(file, as_json=False)
    shapes = ([(1, 1024), (4, 2048)], [1024, 4096])
    with pytest.raises(KeyboardInterrupt):
        cuda_attention.measure(report, ["x/absent", "x/fails", "x/killed", "x/never"], shapes, Subject)
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert rows == report.rows
    assert [(row["backend"], row.get("kind"), "ms" in row) for row in rows] == [
        ("x/absent", None, False),
        ("x/fails", "decode", True),
        ("x/fails", "decode", False),
        ("x/fails", "prefill", True),
        ("x/fails", "prefill", True),
        ("x/killed", "decode", True),
        ("x/killed", "decode", True),
    ]
    assert [row["why"] for row in rows if "why" in row] == ["RuntimeError: not installed", "MemoryError: does not fit"]


@pytest.mark.parametrize(
    ("cache_bytes", "free_bytes", "layers"),
    [
        (1 << 20, 100 << 30, 100),
        (1 << 10, 100 << 30, 128),
        (60 << 20, 100 << 30, 2),
        (30 << 20, 100 << 30, 4),
        (8 << 30, 100 << 30, 2),
        (8 << 30, 12 << 30, 1),
    ],
)
def test_the_caches_that_are_run_in_turn_do_not_fit_the_l2(cache_bytes: int, free_bytes: int, layers: int) -> None:
    assert cuda_attention.num_layers(cache_bytes, 50 << 20, free_bytes) == layers


def test_a_cache_that_does_not_fit_is_not_measured() -> None:
    with pytest.raises(MemoryError, match=r"8\.0 GiB does not fit"):
        cuda_attention.num_layers(8 << 30, 50 << 20, 9 << 30)


def test_on_a_gpu_it_writes_what_it_measured(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia")
    file = tmp_path / "rows.jsonl"
    done = run("--quick", "--output", str(file), "--backends", "torch/sdpa,cuda/flashinfer", hidden=False)
    assert done.returncode == 0, done.stderr
    machine, *rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert machine["copy_gb_s"] > 100
    assert {row["kind"] for row in rows} == {"decode", "prefill"}
    assert all(row["graph"] for row in rows if row["backend"] == "cuda/flashinfer" and row["kind"] == "decode")
