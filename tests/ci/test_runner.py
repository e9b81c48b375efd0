"""What runs the matrix: CPU time, time limits, reasons of skips, an absent Python, and its rows."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CI = Path(__file__).parents[2] / "ci"
pytestmark = pytest.mark.skipif(not CI.exists(), reason="not run: an installed core has no ci folder beside it")


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """ci/test.py, under a name that is not the standard library's."""
    spec = importlib.util.spec_from_file_location("attn_dispatch_ci_test", CI / "test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_cpu_time_is_that_of_the_command_and_its_children(runner: ModuleType) -> None:
    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    code, output, cpu = runner.run_command(
        f'{sys.executable} -c "import subprocess, sys; subprocess.run([sys.executable, \'-c\', sys.argv[1]])" "{burn}"',
        dict(os.environ), 60,
    )  # fmt: skip
    assert (code, output) == (0, "")
    assert 0.3 <= cpu < 5
    idle = runner.run_command("sleep 0.3", dict(os.environ), 60)
    assert idle[2] < 0.2


def test_a_command_that_takes_too_long_is_killed_with_its_children(runner: ModuleType) -> None:
    code, output, _ = runner.run_command("echo begun; sleep 60 & sleep 60", dict(os.environ), 0.5)
    assert (code, output) == (-signal.SIGKILL, "begun\n")


def test_a_failure_keeps_its_status(runner: ModuleType) -> None:
    assert runner.run_command("echo no >&2; exit 3", dict(os.environ), 60)[:2] == (3, "no\n")


def test_skips_are_counted_by_reason(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_a(i): pytest.skip('refused: window=(3, 0): not here')\n"
        "def test_b(): pytest.skip('refused: window=(3, 0): not here')\n"
        "@pytest.mark.skip(reason='needs nvidia')\n"
        "def test_c(): ...\n"
        "@pytest.mark.xfail(reason='not yet')\n"
        "def test_d(): assert False\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reasons = runner.skip_reasons(done.stdout)
    assert reasons["refused: window=(3, 0): not here"] == 4
    assert reasons["needs nvidia"] == 1
    assert sum(reasons.values()) == 6
    assert any("not yet" in reason for reason in reasons)


@pytest.mark.parametrize(("ci", "state"), [("", "not run"), ("true", "FAILED")])
def test_an_absent_python_is_a_failure_in_ci(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, ci: str, state: str
) -> None:
    monkeypatch.setenv("CI", ci)
    job = runner.Job("some", CI.parent, ("true",), python="3.1")
    result = runner.run_job(job, set(), threading.Lock())
    assert (result.state, result.why) == (state, "needs python 3.1")


def test_absent_hardware_is_never_a_pass(runner: ModuleType) -> None:
    job = runner.Job("some", CI.parent, ("true",), needs="tpu")
    result = runner.run_job(job, {"nvidia"}, threading.Lock())
    assert (result.state, result.why) == ("not run", "needs tpu")


@pytest.mark.parametrize(
    "row",
    [
        {"name": "x", "commands": ["true"], "needs": "quantum"},
        {"name": "x", "commands": ["true"], "comands": []},
        {"name": "x"},
        {"commands": ["true"]},
    ],
)
def test_a_malformed_job_is_refused(row: dict[str, Any]) -> None:
    import jobs

    with pytest.raises(ValueError, match=r"pyproject\.toml"):
        jobs._job(CI.parent / "pyproject.toml", row)


def test_the_matrix_of_this_repository_is_well_formed() -> None:
    import jobs

    names = [job.name for job in jobs.jobs()]
    assert {"core", "lint", "generate"} <= set(names)


def test_what_a_job_leaves_out_exists() -> None:
    """A path that was renamed would be run again, in silence."""
    import jobs

    paths = [path for job in jobs.jobs() for c in job.commands for path in re.findall(r"--ignore[= ](\S+)", c)]
    assert paths
    assert [path for path in paths if not (CI.parent / path).exists()] == []
