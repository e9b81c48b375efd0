"""The owner's command, with backends that can run here; and that the support table takes what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import attn_dispatch as ad
from attn_dispatch.conformance import CASES, Row
from platforms.rocm.evidence import report
from platforms.rocm.evidence.timing import Shape, measure

DOCS = Path(__file__).parents[3] / "docs"


def make_support(evidence: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The repository's own script, reading another folder."""
    spec = importlib.util.spec_from_file_location("make_support", DOCS / "make_support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DOCS", evidence)
    return module


def test_a_report_made_here_enters_the_support_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command itself, with the reference, as an owner would with theirs."""
    command = ["--backend", "reference", "--feature", "decode", "--feature", "window", "--no-times"]
    assert report.main([*command, "--output", str(tmp_path / "evidence")]) == 0
    assert "reference: 2 yes" in capsys.readouterr().out
    (data,) = (tmp_path / "evidence").glob("*.json")
    found = json.loads(data.read_text())
    assert found["machine"]["description"] == ad.platform.description
    assert found["doctor"]["backends"]
    (row,) = (Row.from_dict(row) for row in found["rows"])
    assert [(entry.feature, entry.state) for entry in row.entries] == [("decode", "yes"), ("window", "yes")]
    assert all(entry.mutations for entry in row.entries)
    page = make_support(tmp_path, monkeypatch).support()
    assert "| feature | `reference` |" in page
    assert "| decode | yes |" in page
    assert "written by `python -m platforms.rocm.evidence.report`" in page


def test_a_backend_that_is_not_available_is_a_row_that_says_so() -> None:
    found = report.collect(["rocm/aiter", "nobody/has-this"], ["decode"], times=False)
    (row,) = found["rows"]
    if any(device.kind == "amd" for device in ad.platform.devices):
        pytest.skip("not run: for machines without an AMD GPU")
    assert (row["backend"], row["available"], row["evidence"]) == ("rocm/aiter", False, "not run")
    assert "no AMD GPU here" in row["reason"]


def test_a_crash_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the process, by a signal: as a GPU fault ends one."""
    crash = tmp_path / "python"
    crash.write_text('#!/bin/sh\necho "Memory access fault by GPU node-1" >&2\nkill -ABRT $$\n')
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    row = report.row_of("reference")
    assert not row.available
    assert "status -6" in row.reason
    assert "Memory access fault" in row.reason
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert "did not end within 1 s" in report.row_of("reference", seconds=1).reason


def test_without_an_amd_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if any(device.kind == "amd" for device in ad.platform.devices):
        pytest.skip("not run: for machines without an AMD GPU")
    assert report.main([]) == 2
    assert "no AMD GPU here" in capsys.readouterr().out


def test_vendors_are_asked_with_pages_and_types_that_they_take() -> None:
    found = report.cases_for("rocm/aiter")
    assert {case.spec.block_size for case in found if case.feature == "window"} == {16, 64}
    assert {case.spec.dtype for case in found if case.feature == "window"} == {"float16", "bfloat16"}
    assert {case.spec.dtype for case in found if case.feature == "float32"} == {"float32"}
    assert {case.feature for case in found} == {case.feature for case in CASES}
    assert len({case.name for case in found}) == len(found)
    assert report.cases_for("torch/sdpa") == list(CASES)


def test_times_here() -> None:
    """With the portable fallback on the CPU; what cannot be timed is a row with words."""
    pytest.importorskip("attn_dispatch_torch", reason="not run: attn-dispatch-torch is not installed")
    shapes = (Shape("decode", 2, 1, 40), Shape("prefill", 1, 24, 24))
    found: list[dict[str, Any]] = measure(["torch/sdpa", "rocm/aiter"], shapes, device="cpu")
    assert [row["shape"] for row in found] == ["decode", "decode", "prefill", "prefill"]
    assert all(row["ms"] > 0 and row["runs"] == 20 for row in found if row["backend"] == "torch/sdpa")
    assert all(row["error"] for row in found if row["backend"] == "rocm/aiter" and "ms" not in row)


def test_the_page_shows_times() -> None:
    times = [
        {"shape": "decode", "backend": "a/b", "ms": 0.5},
        {"shape": "decode", "backend": "c/d", "error": "no"},
    ]
    page = report._page({"machine": {"description": "1x AMD gfx942"}, "rows": [], "times": times}, "rocm-gfx942")
    assert "| decode | 0.5 | - |" in page
