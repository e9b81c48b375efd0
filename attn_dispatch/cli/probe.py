"""Ask one backend, in a process of its own: a plug-in that crashes takes this process down, not the doctor.

`python -m attn_dispatch.cli.probe NAME` loads the backend, asks it, runs one small step on it, and prints JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

from attn_dispatch.backend import Backend
from attn_dispatch.block_size import resolved
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry, verdict_of
from attn_dispatch.errors import BackendLoadError

__all__ = ["Report", "ask"]

_MARK = "attn-dispatch-probe:"


@dataclass
class Report:
    """What came of asking a backend.

    Attributes:
        name: the backend.
        distribution: what brought it.
        state: "ok" (a step ran and was right), "absent" (its hardware or vendor is not here), "untried" (it refuses
            every layer that the doctor tries), "broken".
        reason: in words.
        remedy: what to do.
        version: the vendor's.
        evidence: what a run here proves.
        details: the traceback, or what the process said last, of a broken one.
    """

    name: str
    distribution: str = ""
    state: str = "broken"
    reason: str = ""
    remedy: str = ""
    version: str = ""
    evidence: str = ""
    details: str = field(default="", repr=False)


def ask(name: str, timeout_s: float = 180.0) -> Report:
    """Ask a backend in a new process and survive whatever happens there."""
    distribution = registry().entry(name).distribution
    command = [sys.executable, "-m", "attn_dispatch.cli.probe", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Report(name, distribution, reason=f"did not answer within {timeout_s:.0f} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return Report(**{**json.loads(line.removeprefix(_MARK)), "distribution": distribution})
    last = "\n".join(done.stderr.splitlines()[-15:])
    if done.returncode < 0:
        how = f"the process was killed by {_signal_name(-done.returncode)}"
    else:
        how = f"the process ended with status {done.returncode}"
    return Report(
        name,
        distribution,
        reason=f"{how} while this backend was loaded or used",
        remedy=f"uninstall it or reinstall it ({distribution}); until then ATTN_DISPATCH_DISABLE={name} disables it",
        details=last,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _probe(name: str) -> dict[str, Any]:
    try:
        backend = registry().load(name)
    except BackendLoadError as error:
        return {"state": "broken", "reason": str(error), "details": traceback.format_exc()}
    available = backend.probe()
    answer = {
        "state": "absent",
        "reason": available.reason,
        "remedy": available.remedy,
        "version": available.version,
        "evidence": available.evidence,
    }
    if not available:
        return answer
    try:
        state, reason = _try_step(backend)
    except Exception:  # whatever a vendor raises is what the doctor is there to show
        return {**answer, "state": "broken", "reason": "a small step failed", "details": traceback.format_exc()}
    return {**answer, "state": state, "reason": reason or available.reason}


def _try_step(backend: Backend) -> tuple[str, str]:
    """Run one small step and compare it with the reference; return the state, and what is wrong."""
    from attn_dispatch.conformance.cases import Case
    from attn_dispatch.conformance.checks import run_case
    from attn_dispatch.conformance.findings import ConformanceError

    refusal = ""
    for dtype in ("float32", "bfloat16"):
        sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 128, "block_size": None}
        spec = AttentionSpec(dtype=dtype, **sizes)
        verdict = verdict_of(backend, spec)
        if verdict.failed:
            return "broken", str(verdict)
        if verdict:
            try:
                run_case(backend, Case("doctor's step", "", resolved(backend, spec), (6, 0), (1, 3)))
            except ConformanceError as error:
                return "broken", str(error)
            return "ok", ""
        refusal = refusal or f"refuses every layer that was tried, as {spec}: {verdict}"
    return "untried", refusal


if __name__ == "__main__":
    report = {"name": sys.argv[1], **_probe(sys.argv[1])}
    sys.stdout.write(f"\n{_MARK}{json.dumps(report)}\n")
