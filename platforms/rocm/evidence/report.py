"""The command for owners of an AMD GPU: everything that such a machine can show, in files that a pull request carries.

    python -m platforms.rocm.evidence.report [--output docs/evidence]

The conformance kit on every backend of this platform, each in a process of its own (a crash is a row that says so), the
compile cell, times of a layer, and `attn-dispatch doctor`. It writes rocm-<target>.json, which `docs/make_support.py`
puts into the support table, and rocm-<target>.md, which it appends. Exit status: 0 all that is available passed, 1
something failed, 2 there is no AMD GPU here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attn_dispatch as ad
from attn_dispatch.conformance import CASES, Case, Row
from attn_dispatch.conformance.checklist import case_check
from attn_dispatch.conformance.report import verify
from attn_dispatch.dispatch import machine, registry

__all__ = ["PAGES", "cases_for", "collect", "main", "row_of", "write"]

BACKENDS = ("rocm/aiter", "rocm/flash-attention", "triton/paged", "torch/sdpa")
PAGES = {"rocm/aiter": (16, 64), "rocm/flash-attention": (128,)}
"""Vendors' kernels take some pages and types only: the kit's cases are asked with these, and bfloat16 for float32."""

_SECONDS = 3600


def cases_for(name: str) -> list[Case]:
    """Return the kit's cases as a backend is asked them."""
    if name not in PAGES:
        return list(CASES)
    from .signature_check import adapt_case

    return [
        replace(adapt_case(case, page), name=f"{case.name}, pages of {page}")
        for page in PAGES[name]
        for case in CASES
        if page == PAGES[name][0] or not case.feature.startswith("block size")
    ]


def row_of(name: str, features: Sequence[str] = (), seconds: int = _SECONDS) -> Row:
    """Return a backend's row, from a process of its own."""
    command = [sys.executable, "-m", "platforms.rocm.evidence.report", "--row", name]
    for feature in features:
        command += ["--feature", feature]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        return Row.from_dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        why = f"the kit did not end within {seconds} s"
    except (IndexError, ValueError, TypeError):
        why = f"the kit ended with status {done.returncode}: {done.stderr.strip()[-1000:]}"
    return Row(name, False, why, "", "not run", machine().description, ())


def collect(names: Iterable[str], features: Sequence[str] = (), times: bool = True) -> dict[str, Any]:
    """Return the report of this machine.

    Args:
        names: backends; those that are not installed are left out.
        features: only these of the kit (all).
        times: measure as well.
    """
    installed = {entry.name for entry in registry().entries}
    wanted = [name for name in names if name in installed]
    rows = []
    for name in wanted:
        print(f"{name}: the conformance kit", file=sys.stderr, flush=True)
        rows.append(row_of(name, features))
    here = machine()
    report: dict[str, Any] = {
        "machine": {"name": here.name, "description": here.description},
        "rows": [row.as_dict() for row in rows],
        "doctor": _json([sys.executable, "-m", "attn_dispatch", "doctor", "--json"]),
        "programs": _json([sys.executable, "-m", "platforms.rocm.evidence.report", "--programs"]),
        "triton programs": _triton_programs(),
    }
    if times:
        available = [row.backend for row in rows if row.available]
        command = [sys.executable, "-m", "platforms.rocm.evidence.report", "--times", *available]
        print("times of a layer", file=sys.stderr, flush=True)
        report["times"] = _json(command)
    return report


def _json(command: list[str]) -> Any:
    """Return what a command prints as JSON, or what it died of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"{' '.join(command[1:4])} did not end within {_SECONDS} s"}
    except ValueError:
        return {"error": f"{' '.join(command[1:4])} ended with status {done.returncode}: {done.stderr.strip()[-1000:]}"}


def _programs() -> list[dict[str, Any]]:
    """Return AITER's Triton kernels compiled for this machine's targets, by the installed package's files."""
    from attn_dispatch_rocm.machine import Machine

    from . import aiter_triton
    from .signature_check import resources

    here = Machine(ad.platform)
    targets = [aiter_triton.TARGETS[name] for name in here.targets if name in aiter_triton.TARGETS]
    folders = [folder.parent for folder in here.packages.folders("aiter")[:1]]
    return [program for folder in folders for target in targets for program in resources(target, folder)]


def _triton_programs() -> Any:
    """Return what triton/paged's own compile cell finds for this machine's targets (None: it is not installed)."""
    from attn_dispatch_rocm.machine import Machine

    targets = Machine(ad.platform).targets
    if find_spec("attn_dispatch_triton") is None or not targets:
        return None
    with tempfile.TemporaryDirectory() as folder:
        check = [sys.executable, "-m", "platforms.triton.evidence.compile_check"]
        file = Path(folder) / "triton.json"
        command = [*check, "--targets", ",".join(targets), "--output", "", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if not file.exists():
            return {"error": f"status {done.returncode}: {(done.stdout + done.stderr).strip()[-1000:]}"}
        return json.loads(file.read_text(encoding="utf-8"))


def write(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the two files of a report and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page.write_text(_page(report, stem), encoding="utf-8")
    return [data, page]


def _page(report: dict[str, Any], stem: str) -> str:
    lines = [
        f"# {report['machine']['description']}",
        "",
        f"`{stem}`: written by `python -m platforms.rocm.evidence.report`.",
    ]
    times = report.get("times")
    if isinstance(times, list) and times:
        names = list(dict.fromkeys(row["backend"] for row in times))
        lines += ["", "Milliseconds of one layer's run (32/8 heads of 128, bfloat16), medians of one process.", ""]
        lines += [f"| step | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
        for shape in dict.fromkeys(row["shape"] for row in times):
            cells = {row["backend"]: str(row.get("ms", "-")) for row in times if row["shape"] == shape}
            lines.append(f"| {shape} | {' | '.join(cells.get(name, '-') for name in names)} |")
    failed = [f"- `{row['backend']}`: {row['reason']}" for row in report["rows"] if not row["available"]]
    if failed:
        lines += ["", "Not run:", "", *failed]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/evidence", help="folder for the report (docs/evidence)")
    parser.add_argument("--backend", action="append", help="only this one (repeatable)")
    parser.add_argument("--feature", action="append", default=[], help="only this of the kit (repeatable)")
    parser.add_argument("--no-times", action="store_true", help="only what is right, not how fast")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--programs", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--times", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        cases = [case for case in cases_for(options.row) if not options.feature or case.feature in options.feature]
        print(json.dumps(verify(options.row, checks=[case_check(case) for case in cases]).as_dict()))
        return 0
    if options.programs:
        print(json.dumps(_programs()))
        return 0
    if options.times is not None:
        from .timing import measure

        print(json.dumps(measure(options.times)))
        return 0
    gpus = [device for device in ad.platform.devices if device.kind == "amd"]
    if not gpus and not options.backend:
        print(
            "no AMD GPU here (/dev/kfd has no node with simd_count > 0); --backend names one to report on all the same"
        )
        return 2
    report = collect(options.backend or BACKENDS, options.feature, not options.no_times)
    stem = f"rocm-{gpus[0].facts.get('gfx', 'wsl')}" if gpus else f"{ad.platform.name}-report"
    files = write(report, Path(options.output), stem)
    failed = [row["backend"] for row in report["rows"] if any(entry["state"] == "FAILED" for entry in row["entries"])]
    for row in report["rows"]:
        print(f"{row['backend']}: {_states(row)}")
    print(f"written: {', '.join(map(str, files))}. Now: python docs/make_support.py, and a pull request with both")
    return 1 if failed else 0


def _states(row: dict[str, Any]) -> str:
    if not row["available"]:
        return f"not run: {row['reason']}"
    states = [entry["state"] for entry in row["entries"]]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


if __name__ == "__main__":
    sys.exit(main())
