"""Run the tests: `python3 ci/test.py` runs every job that can run on this machine, each in its own environment.

`python3 ci/test.py JOB...` runs some; `--list` shows the matrix. A job whose hardware or Python is absent says so and
is never counted as passed; in CI (the variable CI is set) an absent Python is a failure. Exit status 0: everything that
ran passed; 1: something failed; 2: no such job. The table at the end has the CPU time of each job and of all of them.
Standard library only: it is what a new machine runs first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from environment import CannotBuild, environment, interpreter
from jobs import ROOT, Job, jobs

# A line of pytest's summary: "SKIPPED [3] path:113: refused: window=(3, 0): not here", "XFAIL path::case - reason".
_SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+?:(?:\d+:)? (.*)$|^(XFAIL \S+ - .*)$", re.MULTILINE)


@dataclass
class Result:
    """The outcome of a job."""

    job: Job
    state: str  # passed | FAILED | not run
    why: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def hardware() -> set[str]:
    """The kinds of accelerator here, by the library's own detection (it needs nothing that is not installed yet)."""
    core = types.ModuleType("attn_dispatch")  # the folder without its __init__, which needs NumPy
    core.__path__ = [str(ROOT / "attn_dispatch")]
    sys.modules["attn_dispatch"] = core
    detect = importlib.import_module("attn_dispatch.hardware").detect
    return {device.kind for device in detect().devices if not device.integrated}


def seed_of_commit() -> str:
    """Return a number that the commit gives; "0" outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return str(int(done.stdout[:7], 16)) if done.returncode == 0 else "0"


def run_job(job: Job, kinds: set[str], print_lock: threading.Lock) -> Result:
    """Build a job's environment and run its commands."""
    started = time.monotonic()
    result = Result(job, "not run")

    def say(text: str) -> None:
        with print_lock:
            print(f"[{job.name}] {text}", flush=True)

    def ended(state: str, why: str = "") -> Result:
        result.state, result.why, result.seconds = state, why, time.monotonic() - started
        return result

    if job.needs and job.needs not in kinds:
        return ended("not run", f"needs {job.needs}")
    try:
        interpreter(job.python)
    except CannotBuild as error:
        return ended("FAILED" if os.environ.get("CI") else "not run", str(error))
    try:
        python = environment(job, say)
    except CannotBuild as error:
        return ended("FAILED", str(error))
    # `python` is the job's; what the caller's shell had installed does not count.
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environ = {k: v for k, v in os.environ.items() if k not in dropped} | {"PATH": path}
    # Jobs run side by side: threads that spin while they wait would take each other's cores.
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Other random problems at each commit, and the same ones whenever that commit is run again.
    environ.setdefault("CONFORMANCE_SEED", seed_of_commit())
    skipped: Counter[str] = Counter()
    for command in job.commands:
        say(command)
        code, output, cpu_seconds = run_command(command, environ, job.minutes * 60)
        result.cpu_seconds += cpu_seconds
        skipped += skip_reasons(output)
        with print_lock:
            print("\n".join(f"[{job.name}] {line}" for line in output.splitlines()[-60 if code else -6 :]), flush=True)
        if code:
            why = f"{command}: " + ("took too long" if code == -signal.SIGKILL else f"exit status {code}")
            return ended("FAILED", why)
    with print_lock:
        for reason, count in skipped.most_common():
            print(f"[{job.name}] skipped {count:4}: {reason}", flush=True)
    return ended("passed")


def run_command(command: str, environ: dict[str, str], limit_s: float) -> tuple[int, str, float]:
    """Run a command; one that takes too long is killed with its children.

    Returns:
        Its exit status, its output, and the CPU seconds of it and its children (0 where the system does not tell).
    """
    process = subprocess.Popen(
        command, shell=True, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=os.name != "nt",
    )  # fmt: skip
    late = threading.Event()

    def kill() -> None:
        late.set()
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, kill)
    timer.start()
    assert process.stdout is not None
    output, cpu_seconds = process.stdout.read(), 0.0
    if os.name == "nt":
        process.wait()
    else:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode, cpu_seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    timer.cancel()
    return -signal.SIGKILL if late.is_set() else process.returncode, output, cpu_seconds


def skip_reasons(output: str) -> Counter[str]:
    """Return how many of pytest's cases were skipped for which reason (its summary has a line for each place)."""
    reasons: Counter[str] = Counter()
    for count, skipped, expected in _SKIPPED.findall(output):
        reasons[skipped or expected] += int(count or 1)
    return reasons


def all_cpu_seconds() -> float:
    """Return the CPU time of this process and of all its children, the environments' installations included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    """Run jobs and print the outcome of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="*", help="jobs to run (default: all)")
    parser.add_argument("--list", action="store_true", help="show the matrix")
    parser.add_argument("--parallel", type=int, default=min(2, os.cpu_count() or 1), help="how many jobs run at a time")
    options = parser.parse_args()
    matrix = jobs()
    unknown = set(options.job) - {job.name for job in matrix}
    if unknown:
        print(f"no such job: {', '.join(sorted(unknown))}. Known: {', '.join(job.name for job in matrix)}")
        return 2
    chosen = [job for job in matrix if not options.job or job.name in options.job]
    kinds = hardware()
    if options.list:
        for job in chosen:
            state = "" if not job.needs or job.needs in kinds else f"  (not run here: needs {job.needs})"
            print(f"{job.name:<20} python {job.python}  {' '.join(job.pins)}{state}")
        return 0
    # Those that may take longest begin first.
    chosen.sort(key=lambda job: -job.minutes)
    lock = threading.Lock()
    with ThreadPoolExecutor(max_workers=max(1, options.parallel)) as pool:
        results = list(pool.map(lambda job: run_job(job, kinds, lock), chosen))
    print("\nThe matrix:")
    for result in results:
        times = f"{result.seconds:6.0f} s  {result.cpu_seconds / 60:6.2f} CPU min"
        print(f"  {result.job.name:<22} {result.state:<8} {times}{f': {result.why}' if result.why else ''}")
    others = all_cpu_seconds() - sum(result.cpu_seconds for result in results)
    print(f"  {'environments':<22} {'':<8} {'':8}  {others / 60:6.2f} CPU min")
    print(f"  {'all':<22} {'':<8} {'':8}  {all_cpu_seconds() / 60:6.2f} CPU min")
    counts = {state: sum(r.state == state for r in results) for state in ("passed", "FAILED", "not run")}
    print(f"\njobs: {counts['passed']} passed, {counts['FAILED']} failed, {counts['not run']} not run")
    if not counts["passed"] and not counts["FAILED"]:
        print("nothing ran: nothing is shown")
        return 1
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
