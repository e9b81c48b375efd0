"""What happens can be seen: the log, the counters, a profiler's ranges; and costs nothing when nobody looks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch import observe

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, dtype="float32")


def plan_of(query_lens: list[int], seq_lens: list[int]) -> ad.Plan:
    batch = ad.AttentionMetadata.build(query_lens, seq_lens, [[2 * i, 2 * i + 1] for i in range(len(seq_lens))])
    return ad.attention(SPEC, "reference").plan(batch)


@pytest.mark.parametrize(
    ("query_lens", "phase"), [([1, 1], "decode"), ([5, 9], "prefill"), ([5, 1], "mixed"), ([1], "decode")]
)
def test_phases(query_lens: list[int], phase: str) -> None:
    assert observe.phase_of(plan_of(query_lens, [40] * len(query_lens))) == phase


def test_runs_are_counted_by_backend_and_phase() -> None:
    plan = plan_of([1, 1], [40, 50])
    ad.stats(enable=True)
    try:
        for _ in range(3):
            watch = observe.run_observer()
            assert watch is not None
            with watch("cpu/some", plan):
                pass
        with observe.compiling("cpu/some", "a kernel"):
            pass
        counted = ad.stats()["cpu/some"]
    finally:
        ad.stats(enable=False)
    decode = counted["phases"]["decode"]
    assert (decode["calls"], decode["tokens"]) == (3, 6)
    # Two rows of four heads of eight, in and out; ninety keys and values of two heads. Of four bytes each.
    assert decode["moved_bytes"] == 3 * 4 * (2 * 4 * 16 + 90 * 2 * 16)
    assert decode["seconds"] > 0
    assert counted["compile_seconds"] > 0
    assert json.dumps(ad.stats())


def test_a_layers_runs_are_counted() -> None:
    attn = ad.attention(SPEC, "reference")
    plan, cache = plan_of([3, 2], [3, 2]), attn.allocate(4)
    q, k = np.zeros((5, 4, 8), np.float32), np.zeros((5, 2, 8), np.float32)
    ad.stats(enable=True)
    try:
        attn.run(plan, q, k, k, cache)
        assert ad.stats()["reference"]["phases"]["prefill"]["calls"] == 1
    finally:
        ad.stats(enable=False)
    attn.run(plan, q, k, k, cache)
    assert ad.stats()["reference"]["phases"]["prefill"]["calls"] == 1


def test_nothing_is_wrapped_when_nobody_looks() -> None:
    assert observe.run_observer() is None
    assert min(timeit.repeat(observe.run_observer, number=2000, repeat=50)) / 2000 < 1e-6


def test_a_profiler_sees_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is not needed by the core: what is read of it is its profiler's switch and its `record_function`."""
    ranges: list[str] = []

    class Range:
        def __init__(self, name: str) -> None:
            ranges.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    switch = [False]
    autograd = SimpleNamespace(_profiler_enabled=lambda: switch[0])
    torch: Any = SimpleNamespace(
        _C=SimpleNamespace(_autograd=autograd), profiler=SimpleNamespace(record_function=Range)
    )
    monkeypatch.setattr(observe, "_profiling", observe._no_profiler)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert observe.run_observer() is None
    switch[0] = True
    watch = observe.run_observer()
    assert watch is not None
    with watch("cpu/numba", plan_of([1], [4])):
        pass
    assert ranges == ["attn_dispatch::cpu/numba::decode"]


def python(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTN_DISPATCH_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, env=clean | environ
    )


CHOICE = "import attn_dispatch as ad; ad.attention(ad.AttentionSpec(num_heads=2, head_size=8, dtype='float32'){})"


def test_the_log_says_what_was_chosen_and_why() -> None:
    named = python(CHOICE.format(", 'reference'"), ATTN_DISPATCH_LOG="info").stderr
    assert "INFO reference runs heads=2/2" in named
    assert "by the backend= argument" in named
    assert python(CHOICE.format(", 'reference'")).stderr == ""
    assert python(CHOICE.format(", 'reference'"), ATTN_DISPATCH_LOG="warning").stderr == ""


def test_the_log_goes_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    assert python(CHOICE.format(", 'reference'"), ATTN_DISPATCH_LOG=str(file)).stderr == ""
    assert "reference runs" in file.read_text()
    closed = python(CHOICE.format(", 'reference'"), ATTN_DISPATCH_LOG=str(tmp_path / "no" / "such" / "folder"))
    assert "No such file" in closed.stderr


def test_plans_are_logged_for_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "attn_dispatch"):
        plan_of([1, 5], [40, 7])
    assert "planned" not in caplog.text
    with caplog.at_level(logging.DEBUG, "attn_dispatch"):
        plan_of([1, 5], [40, 7])
    assert "reference planned a mixed step: 2 sequences, 6 tokens, longest query 5, longest context 40" in caplog.text


def test_a_fallback_is_a_warning_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_DISABLE", ",".join(name for name in ad.backends() if name != "reference"))
    with caplog.at_level(logging.INFO, "attn_dispatch"), pytest.warns(ad.errors.FallbackWarning):
        ad.attention(SPEC)
    levels = [(record.levelname, "reference" in record.getMessage()) for record in caplog.records]
    assert ("INFO", True) in levels
    disabled = [record.getMessage() for record in caplog.records if "is disabled by" in record.getMessage()]
    assert len(disabled) == len(ad.backends()) - 1
    assert ("WARNING", True) in levels


@pytest.mark.parametrize("target", ["1", "report.json"])
def test_counters_are_printed_when_the_process_ends(tmp_path: Path, target: str) -> None:
    script = (
        "import attn_dispatch as ad\n"
        "from attn_dispatch import observe\n"
        "with observe.compiling('cpu/some', 'a kernel'): import time; time.sleep(0.06)\n"
    )
    file = target if target == "1" else str(tmp_path / target)
    done = python(script, ATTN_DISPATCH_STATS=file)
    text = done.stderr if target == "1" else (tmp_path / target).read_text()
    assert "cpu/some" in text
    assert "compile" in text
