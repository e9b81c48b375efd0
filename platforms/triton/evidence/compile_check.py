"""The compile check: the Triton kernels as machine code for NVIDIA's and AMD's GPUs, on a machine without one.

    python -m platforms.triton.evidence.compile_check --all                # every row and target: writes docs/evidence/
    python -m platforms.triton.evidence.compile_check --targets gfx942 --only decode --output ''

It fails (status 1) when a kernel does not compile, takes more shared memory (LDS) than its target has, spills more than
is written down in `bounds`, or multiplies matrices without the target's matrix instructions; and when the verdict
refuses a layer that is inside these bounds on every target. What it shows is "compiled", never "ran".

What is written to a folder is compiled anew. Without one (`--output ''`) a program that was compiled before, by the
same source, compiler and options, is judged by what was measured then.

fp8 needs no target that knows it: the kernels read it as bytes and widen it by shifts, on every GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from attn_dispatch_triton.paged import PagedBackend
from attn_dispatch_triton.targets import TARGETS, Target

from .bounds import judge
from .matrix import Row, rows

if TYPE_CHECKING:
    from .compiling import Compiled

__all__ = ["DEFAULT_TARGETS", "Finding", "as_markdown", "main", "needlessly_refused", "survey"]

_NAME = "platforms.triton.evidence.compile_check"
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950", "gfx1100")


@dataclass(frozen=True)
class Finding:
    """One row on one target.

    Attributes:
        target: its name.
        row: its name.
        verdict: whether `triton/paged` accepts the layer.
        against: what the compiler, or a bound, has against the kernel, or "".
        wrong: what is not as it must be, or "".
        result: what it takes, if it compiled.
    """

    target: str
    row: str
    verdict: bool
    against: str
    wrong: str
    result: Compiled | None


def survey(target: Target, only: str, everything: bool, anew: bool = False) -> list[Finding]:
    """Compile every row whose name contains `only` for one target; rare ones with `everything`.

    Args:
        target: the GPU.
        only: part of names.
        everything: rare rows as well.
        anew: compile also what was compiled before, by the same sources and compiler.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        findings = []
        for row in rows():
            if only in row.name and (everything or not row.rare):
                findings.append(_compile(target, row, anew))
                print(_line(findings[-1]), flush=True)
    return findings


def _compile(target: Target, row: Row, anew: bool) -> Finding:
    from .compiling import compile_kernel

    accepted = bool(PagedBackend("triton/paged").verdict(row.spec))
    try:
        result = compile_kernel(row.kernel, row.spec, target, row.paged, row.tiles, row.level, anew)
    except Exception as error:  # Triton, LLVM and ptxas each refuse with types of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        against = f"{type(error).__name__}: {' '.join(lines)[:300]}"
        return Finding(target.name, row.name, accepted, against, against, None)
    against = judge(target, row, result)
    return Finding(target.name, row.name, accepted, against, against if accepted else "", result)


def _survey_all(targets: Sequence[Target], only: str, everything: bool, anew: bool, jobs: int) -> list[Finding]:
    """Compile for several targets, each in a process of its own: LLVM ends the process over what it cannot do."""
    findings: list[Finding] = []
    missing = list(targets)
    for at_once in (max(jobs, 1), 1):
        with ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            futures = {pool.submit(survey, target, only, everything, anew): target for target in missing}
            missing = []
            for future, target in futures.items():
                try:
                    findings += future.result()
                except BrokenProcessPool:  # what ran beside it has gone too: once more, one after the other
                    missing.append(target)
    return findings + [
        Finding(target.name, "all", True, "", "the compiler ended the process", None) for target in missing
    ]


def needlessly_refused(findings: Sequence[Finding]) -> list[str]:
    """Return rows that the verdict, which is one for all GPUs, refuses, and that no target has anything against."""
    refused = dict.fromkeys(f.row for f in findings if not f.verdict)
    return [row for row in refused if not any(f.against for f in findings if f.row == row)]


def _line(finding: Finding) -> str:
    text = f"WRONG: {finding.wrong}" if finding.wrong else ""
    if not finding.verdict and not finding.wrong:
        text = f"refused: {finding.against[:70] or 'inside the bounds of this one'}"
    elif finding.result is not None:
        r = finding.result
        text = (
            f"{r.registers:4} registers {r.spills:3} spills {r.shared_bytes:6} B shared {r.occupancy:2} warps "
            f"{r.matrix:4} matrix {r.seconds:5.1f} s {text}"
        )
    return f"{finding.target:8} {finding.row:46} {text}"


def as_markdown(findings: Sequence[Finding], seconds: float) -> str:
    """Return the table: rows down, targets across."""
    targets = list(dict.fromkeys(finding.target for finding in findings))
    by = {(finding.row, finding.target): finding for finding in findings}
    lines = [
        "# Triton's kernels, compiled",
        "",
        f"`python -m {_NAME}`: triton {version('triton')}; {len(findings)} programs in",
        f"{seconds:.0f} s on a machine without a GPU. Each is compiled ahead of time to the target's machine code, as",
        "a launch would have it. Nothing here ran on a GPU.",
        "",
        "An entry: registers of a thread (AMD: vector + accumulation) / spills / shared memory (LDS) in KiB / warps at",
        "once (of a multiprocessor; AMD: of a SIMD) / matrix instructions. *refused*: by the verdict, which is one for",
        "all GPUs; what the smallest tile there is would take, in bold where it is out of bounds.",
        "",
        "| kernel | " + " | ".join(targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for row in dict.fromkeys(finding.row for finding in findings):
        entries = [_entry(by[row, target]) if (row, target) in by else "" for target in targets]
        lines.append(f"| {row} | " + " | ".join(entries) + " |")
    return "\n".join([*lines, ""])


def _entry(finding: Finding) -> str:
    if finding.wrong or finding.result is None:
        return "**WRONG**" if finding.wrong else "refused"
    r = finding.result
    registers = f"{r.registers - r.accumulators}+{r.accumulators}" if r.accumulators else str(r.registers)
    text = f"{registers} / {r.spills} / {r.shared_bytes / 1024:.0f} / {r.occupancy} / {r.matrix}"
    return text if finding.verdict else f"refused: **{text}**" if finding.against else f"refused: {text}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return 0, or 1 when something is not as it must be."""
    known = {target.name: target for target in TARGETS}
    parser = argparse.ArgumentParser(
        prog="python -m platforms.triton.evidence.compile_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--targets", default=",".join(DEFAULT_TARGETS), help=f"of: {','.join(known)}")
    parser.add_argument("--all", action="store_true", help="every target, and rows that are seldom")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--output", default="docs/evidence", help="folder for triton-compile.md; '' for none")
    parser.add_argument("--json", default="", help="file for what was found, for programs")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 8), help="processes")
    options = parser.parse_args(arguments)
    names = list(known) if options.all else options.targets.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"target {unknown[0]!r} is none of {', '.join(known)}")
    os.environ.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    findings = _survey_all(
        [known[name] for name in names], options.only, options.all, bool(options.output), options.jobs
    )
    seconds = time.monotonic() - began
    wrong = [f"{f.target} {f.row}: {f.wrong}" for f in findings if f.wrong]
    wrong += [f"{row}: the verdict says no, every target yes" for row in needlessly_refused(findings)]
    if not findings:
        wrong.append(f"no row is called {options.only!r}")
    if options.output and findings:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "triton-compile.md").write_text(as_markdown(findings, seconds))
    if options.json:
        data = {"triton": version("triton"), "findings": [asdict(f) for f in findings]}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    print(f"{len(findings)} programs for {', '.join(names)} in {seconds:.0f} s: {len(wrong)} not as they must be")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
