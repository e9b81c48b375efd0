"""The compile cell: the Triton kernels as machine code for NVIDIA's and AMD's GPUs, on a machine without one.

    python -m attn_dispatch_triton.compile_cell                      # every target: writes docs/evidence/
    python -m attn_dispatch_triton.compile_cell --targets gfx942 --only decode --output ''

It fails (status 1) when a kernel does not compile, takes more shared memory (LDS) than its target has, spills more than
is written down here, or multiplies matrices without the target's matrix instructions. What it shows is "compiled",
never "ran".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch.contract import AttentionSpec

from .targets import TARGETS, Target

if TYPE_CHECKING:
    from .compiling import Compiled

__all__ = ["DEFAULT_TARGETS", "Finding", "Row", "as_markdown", "judge", "main", "rows", "survey"]

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100")

SPILLS: dict[tuple[str, str], int] = {
    ("sm_100", "prefill, D 64 bf16 B 16"): 6,
    ("sm_100", "prefill, D 64 bf16 B 16, one kv head"): 6,
    ("sm_120", "prefill, D 128 bf16, fp8 cache"): 4,
    ("gfx950", "prefill, D 128 bf16, fp8 cache"): 2,
    ("gfx1100", "prefill, D 192 / 128 bf16 B 64"): 24,
    ("gfx1100", "decode, D 192 / 128 bf16 B 64"): 8,
    ("gfx1100", "prefill, D 256 bf16 B 32"): 40,
    ("gfx1100", "decode, D 256 bf16 B 32"): 24,
    ("gfx1100", "prefill, D 512 bf16 B 32"): 103,
    ("gfx1100", "decode, D 512 bf16 B 32"): 103,
    ("gfx1201", "decode, D 128 bf16 B 16, everything"): 4,
}
"""What may spill, by (target, row), as measured with Triton 3.9.0: a later compiler or kernel must not exceed it. All
else: nothing. No tile that RDNA 3 offers to heads of 256 and more leaves them all in registers."""


@dataclass(frozen=True)
class Row:
    """One kernel for one layer."""

    name: str
    kernel: str
    fields: dict[str, Any] = field(hash=False)
    paged: bool = True

    @property
    def spec(self) -> AttentionSpec:
        """The layer: Llama's heads unless said otherwise."""
        return AttentionSpec(**{"num_heads": 32, "num_kv_heads": 8, **self.fields})


@dataclass(frozen=True)
class Finding:
    """One row on one target: what was found, and what is wrong with it ("": nothing)."""

    target: str
    row: str
    wrong: str
    result: Compiled | None


def rows() -> Iterator[Row]:
    """Yield what is compiled for every target."""
    everything = {"window": (127, 0), "logits_soft_cap": 30.0, "alibi": True, "sinks": True, "returns_lse": True}
    layers: dict[str, dict[str, Any]] = {
        "D 64 bf16 B 16": {"head_size": 64, "block_size": 16},
        "D 128 bf16 B 16": {"block_size": 16},
        "D 128 fp16 B 64": {"dtype": "float16", "block_size": 64},
        "D 256 bf16 B 32": {"head_size": 256},
        "D 512 bf16 B 32": {"head_size": 512},
        "D 128 bf16 B 16, everything": {"block_size": 16, **everything},
        "D 128 bf16, fp8 cache": {"kv_cache_dtype": "float8_e4m3fn"},
        "D 128 fp16, int8 cache": {"dtype": "float16", "kv_cache_dtype": "int8"},
        "D 128 fp32": {"dtype": "float32"},
        "D 64 bf16 B 16, one kv head": {"head_size": 64, "block_size": 16, "num_kv_heads": 1},
        "D 192 / 128 bf16 B 64": {"head_size": 192, "value_head_size": 128, "block_size": 64},
    }
    for name, fields in layers.items():
        for kernel in ("prefill", "decode"):
            yield Row(f"{kernel}, {name}", kernel, fields)
    encoder = {"head_size": 64, "kind": "encoder", "dtype": "float16", "window": (63, 64)}
    yield Row("prefill, D 64 fp16, encoder without a cache", "prefill", encoder, paged=False)
    yield Row("merge, D 128 bf16, sinks, LSE", "merge", {"sinks": True, "returns_lse": True})
    yield Row("write, D 128 bf16", "write", {})


def judge(target: Target, row: Row, result: Compiled) -> str:
    """Return what is wrong with what a kernel takes, or ""."""
    wrong = []
    if result.shared_bytes > target.shared_bytes:
        wrong.append(f"{result.shared_bytes} bytes of shared memory, {target.name} has {target.shared_bytes}")
    allowed = SPILLS.get((target.name, row.name), 0)
    if result.spills > allowed:
        wrong.append(f"{result.spills} spills, {allowed} are written down")
    if result.registers > target.registers:
        wrong.append(f"{result.registers} registers, {target.name} has {target.registers}")
    exact = row.fields.get("dtype") == "float32"  # NVIDIA has no matrix instruction for unrounded float32
    if row.kernel in ("prefill", "decode") and not exact and not result.matrix:
        wrong.append("no matrix instruction")
    return "; ".join(wrong)


def survey(target: Target, only: str) -> list[Finding]:
    """Compile every row whose name contains `only` for one target, from nothing."""
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        findings = []
        for row in rows():
            if only in row.name:
                findings.append(_compile(target, row))
                print(_line(findings[-1]), flush=True)
    return findings


def _compile(target: Target, row: Row) -> Finding:
    from .compiling import compile_kernel

    try:
        result = compile_kernel(row.kernel, row.spec, target, row.paged)
    except Exception as error:  # Triton, LLVM and ptxas each refuse with types of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Finding(target.name, row.name, f"{type(error).__name__}: {' '.join(lines)[:300]}", None)
    return Finding(target.name, row.name, judge(target, row, result), result)


def _survey_all(targets: Sequence[Target], only: str, jobs: int) -> list[Finding]:
    """Compile for several targets, each in a process of its own: LLVM ends the process over what it cannot do."""
    if len(targets) == 1:
        return survey(targets[0], only)
    found: list[Finding] = []
    with ProcessPoolExecutor(max(jobs, 1), mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        results = pool.map(survey, targets, repeat(only))
        try:
            for findings in results:
                found += findings
        except BrokenProcessPool:
            missing = [t.name for t in targets if t.name not in {f.target for f in found}]
            found += [Finding(name, "all", "the compiler ended a process", None) for name in missing]
    return found


def _line(finding: Finding) -> str:
    text = f"WRONG: {finding.wrong}" if finding.wrong else ""
    if finding.result is not None:
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
        f"`python -m {__package__}.compile_cell`: triton {version('triton')}; {len(findings)} programs in",
        f"{seconds:.0f} s on a machine without a GPU. Each is compiled ahead of time to the target's machine code, as",
        "a launch would have it. Nothing here ran on a GPU.",
        "",
        "A cell: registers of a thread / spills / shared memory (LDS) in KiB / warps at once",
        "(of a multiprocessor; AMD: of a SIMD) / matrix instructions.",
        "",
        "| kernel | " + " | ".join(targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for row in dict.fromkeys(finding.row for finding in findings):
        cells = [_cell(by[row, target]) if (row, target) in by else "" for target in targets]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(finding: Finding) -> str:
    if finding.result is None:
        return "**does not compile**"
    r = finding.result
    text = f"{r.registers} / {r.spills} / {r.shared_bytes / 1024:.0f} / {r.occupancy} / {r.matrix}"
    return f"**{text}**" if finding.wrong else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cell; return 0, or 1 when something is not as it must be."""
    known = {target.name: target for target in TARGETS}
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.compile_cell", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(DEFAULT_TARGETS), help=f"of: {','.join(known)}")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--output", default="docs/evidence", help="folder for triton-compile.json and .md; '' for none")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 8), help="processes")
    given = parser.parse_args(arguments)
    names = given.targets.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"target {unknown[0]!r} is none of {', '.join(known)}")
    os.environ.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    findings = _survey_all([known[name] for name in names], given.only, given.jobs)
    seconds = time.monotonic() - began
    wrong = [f"{f.target} {f.row}: {f.wrong}" for f in findings if f.wrong]
    if not findings:
        wrong.append(f"no row is called {given.only!r}")
    if given.output and findings:
        folder = Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"triton": version("triton"), "seconds": round(seconds), "findings": [asdict(f) for f in findings]}
        (folder / "triton-compile.json").write_text(json.dumps(data, indent=1) + "\n")
        (folder / "triton-compile.md").write_text(as_markdown(findings, seconds))
    print(f"{len(findings)} programs for {', '.join(names)} in {seconds:.0f} s: {len(wrong)} not as they must be")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
