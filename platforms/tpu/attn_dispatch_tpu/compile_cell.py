"""The compile cell: every kernel that `tpu/pallas` would run, through the TPU's own compiler, on a machine without one.

    python -m attn_dispatch_tpu.compile_cell                        # v4, v5e, v5p, v6e, 7x: writes docs/evidence/
    python -m attn_dispatch_tpu.compile_cell --brief --output ''    # a short matrix, printed only

It fails (status 1) when the compiler refuses what the verdict accepts, takes what the verdict refuses, or copies the
cache. What it shows is "compiled", never "ran".
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from .compiling import GENERATIONS, Compiled, Target, prepare
from .matrix import Row, program, rows, verdict

__all__ = ["Finding", "as_markdown", "main", "survey"]

_TEMPORARIES = 4 << 20

NO_ARGUMENT = {
    "alibi": ("alibi", "slope", "bias"),
    "sinks": ("sink",),
    "returns_lse": ("lse", "logsumexp", "residual"),
    "causal": ("causal", "is_causal"),
}
"""Fields that the verdict refuses because the kernel has no parameter for them, and what one would be called."""


@dataclass(frozen=True)
class Finding:
    """One row on one generation.

    Attributes:
        generation: of the TPU.
        name: of the row.
        verdict: whether `tpu/pallas` accepts it.
        compiles: whether the compiler does.
        refusal: what the compiler (or the verdict) said against it.
        wrong: what is not as it must be, or "".
        result: sizes and time, if it compiled.
    """

    generation: str
    name: str
    verdict: bool
    compiles: bool
    refusal: str
    wrong: str
    result: Compiled | None


def survey(generation: str, brief: bool, only: str) -> list[Finding]:
    """Compile the matrix for one generation."""
    prepare()
    target, findings = Target(generation), []
    for row in rows():
        if (row.brief or not brief) and only in row.title:
            findings.append(_compile(target, row))
            print(_line(findings[-1]), flush=True)
    return findings


def survey_all(generations: Sequence[str], brief: bool, only: str, jobs: int) -> list[Finding]:
    """Compile for several generations, `jobs` at a time, in processes of their own (a libtpu compiles on one core)."""
    if jobs <= 1 or len(generations) == 1:
        return [finding for each in generations for finding in survey(each, brief, only)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = pool.map(survey, generations, repeat(brief), repeat(only))
        return [finding for findings in found for finding in findings]


def _compile(target: Target, row: Row) -> Finding:
    accepted = verdict(row)
    options, tail = program(row)
    page = (row.spec.block_size, *tail)
    try:
        result = target.compile(options, page, dtype=row.spec.dtype, writes=row.spec.writes_kv, scaled=row.scaled)
    except Exception as error:  # JAX, Mosaic and XLA each refuse with types of their own
        text = next((line for line in str(error).splitlines() if line.strip()), "an assertion of the kernel")
        refusal = f"{type(error).__name__}: {text.strip()[:200]}"
        wrong = f"the verdict says yes, the compiler no: {refusal}" if row.supported else ""
        wrong = wrong or ("the verdict says yes to what the matrix lists as unsupported" if accepted else "")
        return Finding(target.generation, row.title, accepted, False, refusal, wrong, None)
    wrong = ""
    if not row.supported:
        wrong = "the verdict says no, the compiler yes"
    elif not accepted:
        wrong = "the verdict says no to what the matrix lists as supported"
    elif not result.in_place:
        wrong = f"{result.aliased_bytes} of {result.cache_bytes} bytes of the cache are updated in place: it is copied"
    elif result.temporary_bytes > max(result.cache_bytes // 8, _TEMPORARIES):
        wrong = f"temporaries of {result.temporary_bytes} bytes: something large is copied"
    return Finding(target.generation, row.title, accepted, True, "", wrong, result)


def missing_arguments() -> dict[str, str]:
    """Return, per field that is refused for want of a parameter, what is wrong with that (nothing: "")."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    parameters = list(inspect.signature(ragged_paged_attention).parameters)
    return {
        field: next((f"the kernel has a parameter {p!r} now" for p in parameters if any(w in p for w in words)), "")
        for field, words in NO_ARGUMENT.items()
    }


def _line(finding: Finding) -> str:
    if finding.wrong:
        text = f"WRONG: {finding.wrong}"
    elif finding.result is None:
        text = f"refused, as it must be: {finding.refusal[:80]}"
    else:
        found = finding.result
        text = (
            f"{found.code_bytes >> 10:5} KiB code, {found.temporary_bytes >> 10} KiB temporaries, {found.seconds:.1f} s"
        )
    return f"{finding.generation:4} {finding.name:36} {text}"


def versions() -> dict[str, str]:
    """Return which compiler it was."""
    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


def as_markdown(findings: Sequence[Finding], seconds: float, signature: dict[str, str]) -> str:
    """Return the table: rows down, generations across."""
    generations = list(dict.fromkeys(f.generation for f in findings))
    by = {(f.name, f.generation): f for f in findings}
    names = list(dict.fromkeys(f.name for f in findings))
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        "# Compiled for TPUs",
        "",
        f"`python -m attn_dispatch_tpu.compile_cell`: {used}; {len(findings)} programs in {seconds:.0f} s, without a",
        "TPU. Each is a layer's whole step (cache update and attention), compiled ahead of time to machine code. It",
        "shows that the compiler takes the kernel and that the cache is updated in place. Nothing here ran on a TPU.",
        "",
        "A cell: machine code in KiB / temporaries in KiB / seconds to compile.",
        "",
        "| the verdict says yes | " + " | ".join(generations) + " |",
        "|---" * (len(generations) + 1) + "|",
    ]
    refused = [name for name in names if not by[name, generations[0]].verdict]
    lines += [
        f"| {name} | " + " | ".join(_cell(by[name, g]) for g in generations) + " |"
        for name in names
        if name not in refused
    ]
    lines += ["", "| the verdict says no | " + " | ".join(generations) + " | the compiler |"]
    lines.append("|---" * (len(generations) + 2) + "|")
    for name in refused:
        cells = " | ".join(_cell(by[name, g]) for g in generations)
        lines.append(f"| {name} | {cells} | {by[name, generations[0]].refusal.replace('|', '/')[:120]} |")
    fields = ", ".join(f"`{field}`" for field, wrong in signature.items() if not wrong)
    lines += ["", f"Refused because the kernel's signature has no parameter for it: {fields}.", ""]
    return "\n".join(lines)


def _cell(finding: Finding) -> str:
    if finding.wrong:
        return "**WRONG**"
    if finding.result is None:
        return "refused"
    found = finding.result
    return f"{found.code_bytes >> 10} / {found.temporary_bytes >> 10} / {found.seconds:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cell; return 0, or 1 when something is not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m attn_dispatch_tpu.compile_cell", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--generations", default=",".join(GENERATIONS), help="of: %(default)s")
    parser.add_argument("--brief", action="store_true", help="a short matrix")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--output", default="docs/evidence", help="folder for tpu-compile.json and .md; '' for none")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 4), help="processes")
    given = parser.parse_args(arguments)
    generations = given.generations.split(",")
    if unknown := [g for g in generations if g not in GENERATIONS]:
        parser.error(f"generation {unknown[0]!r} is none of {', '.join(GENERATIONS)}")
    began = time.monotonic()
    findings = survey_all(generations, given.brief, given.only, given.jobs)
    signature = missing_arguments()
    seconds = time.monotonic() - began
    wrong = [f"{f.generation} {f.name}: {f.wrong}" for f in findings if f.wrong]
    wrong += [f"{field}: {text}" for field, text in signature.items() if text]
    if not findings:
        wrong.append(f"no row is called {given.only!r}")
    if given.output and findings:
        folder = Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"versions": versions(), "seconds": round(seconds), "findings": [asdict(f) for f in findings]}
        (folder / "tpu-compile.json").write_text(json.dumps(data, indent=1) + "\n")
        (folder / "tpu-compile.md").write_text(as_markdown(findings, seconds, signature))
    print(f"{len(findings)} programs for {', '.join(generations)} in {seconds:.0f} s: {len(wrong)} not as they must be")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
