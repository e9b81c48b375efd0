"""One command for a machine with an NVIDIA GPU: what only that can show, within a time limit, as far as it gets.

    python3 platforms/cuda/evidence/on_gpu.py [--wheels FOLDER] [--output FOLDER] [--minutes 30] [--plan]

It runs in this interpreter (3.11 or later), with the packages that are installed in it, and with those of FOLDER,
which are unpacked beside them: no network, no environment of its own, nothing is installed. This checkout's
distributions are found as they are. In order: the kit on what is portable (`triton/paged`, `torch/sdpa`), on
FlashAttention, on FlashInfer, on xFormers; graphs, swaps and streams (the tests that need a GPU); benchmarks, first a
few shapes, then all.

Every step has a file in the output folder that grows while it runs (one line for each check or shape), and report.json
says after each what became of it: a kill costs what was not yet measured. Exit status: 0 every step passed, 1 one did
not, 2 no NVIDIA GPU (what would run is listed all the same).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
DISTRIBUTIONS = (ROOT, *(ROOT / "platforms" / name for name in ("triton", "torch", "cuda")))
NEEDED = ("numpy", "ml_dtypes", "torch", "triton")
OPTIONAL = ("flash_attn", "flash_attn_interface", "flashinfer", "xformers", "vllm", "pytest", "hypothesis")
BACKENDS = ("triton/paged", "torch/sdpa", "cuda/flash-attention", "cuda/flashinfer", "cuda/xformers")

# FlashInfer's fa3 prefill kernels would be compiled for an hour.
ENVIRONMENT = {"ATTN_DISPATCH_CUDA_FLASHINFER": "fa2"}


@dataclass(frozen=True)
class Step:
    """One step of the run.

    Attributes:
        name: of its files.
        command: what is run, after the interpreter.
        minutes: it is stopped after so many, whatever is left of the whole.
    """

    name: str
    command: tuple[str, ...]
    minutes: float


def steps(output: Path) -> list[Step]:
    """Return the steps, those first that tell most per minute."""
    me, benchmark = str(Path(__file__).resolve()), str(ROOT / "benchmarks" / "cuda_attention.py")
    kit = [(f"kit-{name.replace('/', '-')}", ("--kit", name)) for name in BACKENDS]
    planned = [Step(name, (me, *words, "--output", str(output / f"{name}.jsonl")), 4) for name, words in kit]
    tests = [str(ROOT / "platforms" / name / "tests" / "test_gpu.py") for name in ("cuda", "triton")]
    planned.append(Step("gpu-tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests), 3))
    for name, words, minutes in (("benchmark-quick", ("--quick",), 4), ("benchmark", (), 60)):
        planned.append(Step(name, (benchmark, *words, "--output", str(output / f"{name}.jsonl")), minutes))
    return planned


def prepare(folder: Path, wheels: Path | None) -> dict[str, str]:
    """Return an environment in which this checkout, and the wheels, can be imported and are found by entry point.

    Args:
        folder: empty; wheels are unpacked there, and the checkout's metadata written.
        wheels: a folder of wheels (None: there are none).
    """
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    for distribution in DISTRIBUTIONS:
        project = tomllib.loads((distribution / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = folder / f"{project['name'].replace('-', '_')}-0.dist-info"
        info.mkdir(exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0+checkout\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        lines = []
        for group, entries in project.get("entry-points", {}).items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = [*map(str, DISTRIBUTIONS), str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


_LOOK = """
import json, sys
from importlib import metadata, util
names = metadata.packages_distributions()
found = {}
for module in sys.argv[1:]:
    if util.find_spec(module) is not None:
        owner = names.get(module, [""])[0]
        found[module] = metadata.version(owner) if owner else "of no distribution"
try:
    import attn_dispatch as ad
    gpus = [str(d) for d in ad.platform.devices if d.kind == "nvidia"]
    probes = {}
    from attn_dispatch.dispatch import registry
    for name in registry().ranked("cuda"):
        available = registry().load(name).probe()
        probes[name] = f"{'yes' if available else 'no'}: {available.reason}"
    print(json.dumps([found, gpus, probes]))
except ImportError as error:
    print(json.dumps([found, [], {"attn_dispatch": f"does not import: {error}"}]))
"""


def main(arguments: list[str] | None = None) -> int:
    """Look, then run what can be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder with wheels that are not installed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--kit", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.kit:
        return run_kit(options.kit, options.output)
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="attn-dispatch-") as folder:
        environment = prepare(Path(folder), options.wheels)
        looked = subprocess.run(
            [sys.executable, "-c", _LOOK, *NEEDED, *OPTIONAL],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if looked.returncode:
            print(looked.stderr[-2000:], file=sys.stderr)
            return 1
        packages, gpus, probes = json.loads(looked.stdout.splitlines()[-1])
        print(f"Python {sys.version.split()[0]} ({sys.executable})")
        for name in (*NEEDED, *OPTIONAL):
            needed = " (needed)" if name in NEEDED else ""
            print(f"  {name:<22} {packages.get(name, f'not found{needed}')}")
        for name, reason in probes.items():
            print(f"  {name:<22} {reason}")
        todo = steps(options.output)
        missing = [name for name in NEEDED if name not in packages]
        if options.plan or not gpus or missing:
            why = f"{', '.join(missing)} not found" if missing else "" if gpus else "no NVIDIA GPU here"
            print(f"{why}: would run" if why else "would run")
            for step in todo:
                print(f"  {step.name:<28} at most {step.minutes:.0f} min: python {' '.join(step.command)}")
            return 2 if not gpus else 1 if missing else 0
        return run_all(todo, options.output, deadline, environment)


def run_all(todo: list[Step], output: Path, deadline: float, environment: dict[str, str]) -> int:
    """Run steps until the deadline; report.json is written anew after each."""
    output.mkdir(parents=True, exist_ok=True)
    report: list[dict[str, Any]] = []
    for step in todo:
        left = deadline - time.monotonic()
        began = time.monotonic()
        state = "not run: no time left" if left < 10 else _run(step, output, min(left, 60 * step.minutes), environment)
        report.append({"step": step.name, "state": state, "seconds": round(time.monotonic() - began, 1)})
        print(f"{step.name:<28} {state} ({report[-1]['seconds']:.0f} s)", flush=True)
        temporary = output / "report.json.new"
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        temporary.replace(output / "report.json")
    return 0 if all(row["state"] == "passed" for row in report) else 1


def _run(step: Step, output: Path, limit_s: float, environment: dict[str, str]) -> str:
    """Run a step in a process group of its own, stopped as one; return what became of it."""
    with (output / f"{step.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "passed" if code == 0 else f"exit status {code}"


def run_kit(name: str, file: Path) -> int:
    """Run the kit on a backend; each check is a line of the file when it is done, and the last line is the row."""
    from dataclasses import asdict

    from attn_dispatch.conformance import CHECKS, perform
    from attn_dispatch.conformance.report import row_of
    from attn_dispatch.dispatch import registry

    backend = registry().load(name)
    available = backend.probe()
    if not available:
        print(f"{name}: not run: {available.reason}")
        return 0
    findings = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for check in CHECKS:
            finding = perform(check, backend)
            findings.append(finding)
            line = {"check": finding.check, "state": finding.state, "detail": finding.detail}
            print(json.dumps(line), file=lines, flush=True)
            if finding.state == "FAILED":
                print(f"{name}: {finding.check}: {finding.detail}", flush=True)
        row = row_of(backend, available, findings)
        print(json.dumps(asdict(row)), file=lines)
    counts = {state: sum(finding.state == state for finding in findings) for state in ("passed", "refused", "FAILED")}
    print(f"{name}: {counts}")
    return 1 if row.failed else 0


if __name__ == "__main__":
    sys.exit(main())
