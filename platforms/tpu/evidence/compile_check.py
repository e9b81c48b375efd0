"""Every program that `tpu/pallas` would run, through the TPU's own compiler, on a machine without a TPU.

    python -m platforms.tpu.evidence.compile_check                     # v4, v5e, v5p, v6e, 7x: writes the table
    python -m platforms.tpu.evidence.compile_check --brief --output ''    # a short matrix, printed only

It fails (status 1) when the compiler refuses what the verdict accepts, takes what the verdict refuses, or copies the
cache. What it shows is "compiled", never "ran".
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.contract.dtypes import itemsize
from attn_dispatch_tpu.tiles import LANES
from platforms.tpu.evidence.compiling import GENERATIONS, Compiled, Target, prepare
from platforms.tpu.evidence.matrix import Row, program, rows, verdict

__all__ = ["Finding", "as_markdown", "main", "survey"]

COMMAND = "python -m platforms.tpu.evidence.compile_check"

_TEMPORARIES = 4 << 20

NO_ARGUMENT = {
    "alibi": ("alibi", "slope", "bias"),
    "sinks": ("sink",),
    "returns_lse": ("lse", "logsumexp", "residual"),
    "causal": ("causal", "is_causal"),
}
"""Fields that the verdict refuses because JAX's kernel has no parameter for them, and what one would be called."""

BRIEF_GENERATIONS = ("v5e", "7x")
"""In a short run, tpu-inference's kernels are compiled for these."""


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
        left_out = brief and not (row.brief and (row.kernel == "ragged" or generation in BRIEF_GENERATIONS))
        if only in row.title and not left_out:
            findings.append(_compile(target, row))
            print(_line(findings[-1]), flush=True)
    return findings


def survey_all(generations: Sequence[str], brief: bool, only: str, jobs: int) -> list[Finding]:
    """Compile for several generations, `jobs` at a time, in processes of their own (a libtpu compiles on one core)."""
    if jobs <= 1 or len(generations) == 1:
        return [finding for each in generations for finding in survey(each, brief, only)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        surveys = pool.map(survey, generations, repeat(brief), repeat(only))
        return [finding for findings in surveys for finding in findings]


def _padded_bytes(row: Row) -> float:
    """Return the bytes of a step's queries with heads padded to whole lanes, which is no copy of the cache."""
    return sum(row.query_lens) * row.spec.num_heads * LANES * itemsize(row.spec.dtype)


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
    elif result.temporary_bytes > max(result.cache_bytes // 8, _TEMPORARIES + _padded_bytes(row)):
        wrong = f"temporaries of {result.temporary_bytes} bytes: something large is copied"
    return Finding(target.generation, row.title, accepted, True, "", wrong, result)


def missing_arguments() -> dict[str, str]:
    """Return, per field that is refused because there is no parameter for it, what is wrong with that (nothing: "")."""
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
        sizes = finding.result
        text = f"{sizes.code_bytes >> 10:5} KiB code, {sizes.temporary_bytes >> 10} KiB temporaries"
        text += f", {sizes.seconds:.1f} s"
    return f"{finding.generation:4} {finding.name:36} {text}"


def versions() -> dict[str, str]:
    """Return which compiler it was, and whose kernels."""
    return {name: Packages().version(name) or "none" for name in ("jax", "jaxlib", "libtpu", "tpu-inference")}


def as_markdown(findings: Sequence[Finding], seconds: float, signature: dict[str, str]) -> str:
    """Return the table: rows down, generations across."""
    generations = list(dict.fromkeys(f.generation for f in findings))
    by = {(f.name, f.generation): f for f in findings}
    names = list(dict.fromkeys(f.name for f in findings))
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        "# Compiled for TPUs",
        "",
        f"Made by `{COMMAND}`: {used}; {len(findings)} programs in {seconds:.0f} s,",
        "without a TPU. Each is a layer's whole step (cache update and attention), compiled ahead of time to machine",
        "code. It shows that the compiler takes the kernel and that the cache is updated in place. Nothing here ran on",
        "a TPU.",
        "",
        "An entry: machine code in KiB / temporaries in KiB / seconds to compile.",
        "",
        "| the verdict says yes | " + " | ".join(generations) + " |",
        "|---" * (len(generations) + 1) + "|",
    ]
    refused = [name for name in names if not by[name, generations[0]].verdict]
    lines += [
        f"| {name} | " + " | ".join(_entry(by.get((name, g))) for g in generations) + " |"
        for name in names
        if name not in refused
    ]
    lines += ["", "| the verdict says no | " + " | ".join(generations) + " | the compiler |"]
    lines.append("|---" * (len(generations) + 2) + "|")
    for name in refused:
        entries = " | ".join(_entry(by.get((name, g))) for g in generations)
        lines.append(f"| {name} | {entries} | {by[name, generations[0]].refusal.replace('|', '/')[:120]} |")
    fields = ", ".join(f"`{field}`" for field, wrong in signature.items() if not wrong)
    lines += ["", f"Refused because the kernel's signature has no parameter for it: {fields}.", ""]
    return "\n".join(lines)


def _entry(finding: Finding | None) -> str:
    if finding is None:
        return "-"
    if finding.wrong:
        return "**WRONG**"
    if finding.result is None:
        return "refused"
    sizes = finding.result
    return f"{sizes.code_bytes >> 10} / {sizes.temporary_bytes >> 10} / {sizes.seconds:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; return 0, or 1 when something is not as it must be."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--generations", default=",".join(GENERATIONS), help="of: %(default)s")
    parser.add_argument("--brief", action="store_true", help="a short matrix")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--output", default="docs/evidence", help="folder for tpu-compile.md; '' for none")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 4), help="processes")
    choice = parser.parse_args(arguments)
    generations = choice.generations.split(",")
    if unknown := [g for g in generations if g not in GENERATIONS]:
        parser.error(f"generation {unknown[0]!r} is none of {', '.join(GENERATIONS)}")
    began = time.monotonic()
    findings = survey_all(generations, choice.brief, choice.only, choice.jobs)
    signature = missing_arguments()
    seconds = time.monotonic() - began
    wrong = [f"{f.generation} {f.name}: {f.wrong}" for f in findings if f.wrong]
    wrong += [f"{field}: {text}" for field, text in signature.items() if text]
    if not findings:
        wrong.append(f"no row is called {choice.only!r}")
    if choice.output and findings:
        folder = Path(choice.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tpu-compile.md").write_text(as_markdown(findings, seconds, signature))
    print(f"{len(findings)} programs for {', '.join(generations)} in {seconds:.0f} s: {len(wrong)} not as they must be")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
