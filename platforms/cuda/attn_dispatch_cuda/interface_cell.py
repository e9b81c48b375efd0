"""The interface cell: every call of this package held against the vendors' real packages, without a GPU.

    python -m attn_dispatch_cuda.vendors                       # fetches FlashAttention's sources, once
    python -m attn_dispatch_cuda.interface_cell [--output docs/evidence]

For each case of the conformance kit that a backend's verdict accepts on an NVIDIA H200 that is not here, the batch is
planned on the host and a layer's whole pass is made, up to the vendor's door: there stands the signature of the real
function, which what is passed must bind to (FlashAttention's from its sources, FlashInfer's and xFormers' from the
installed packages). Nothing here ran on a GPU, and no row says so. Exit status 1 when something fails.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.conformance import CASES, Case, Row, report_text, without_hardware
from attn_dispatch.conformance.problem import make_problem
from attn_dispatch.contract import BatchView, LayerParameters
from attn_dispatch.hardware import Device, Platform

from . import layer as layers
from .doors import Doors, FlashDoor, flashinfer_doors, xformers_doors
from .flash_attention import FlashAttentionBackend
from .flash_calls import CALLS, FlashStep
from .flash_versions import Installed, installed, refusals
from .flashinfer import MIXED, MIXED_VARIABLE, FlashInferBackend
from .machine import Machine
from .paged import PagedCudaBackend
from .plans import CudaPlan
from .step import Step
from .store import Store
from .vendors import PACKAGES, beside, unpacked
from .xformers import XformersBackend

__all__ = ["fitted", "main", "pretended", "rows"]

MODEL = "NVIDIA H200"
_CAPABILITY = (9, 0)
_HOST = torch.device("cpu")
_WHERE = f"{MODEL} (not here)"

MakeStep = Callable[[BatchView, bool], Step]


def pretended(*folders: Path) -> Machine:
    """Return a machine with one H200, torch's CUDA build, and the packages of these folders."""
    device = Device("nvidia", MODEL, "pretended")
    return Machine(Platform("cuda", f"1x {MODEL}", {"torch_flavor": "cu130"}, (device,)), list(map(str, folders)))


def fitted(case: Case, page: int | None) -> Case:
    """Return a case with a page size (None: its own) and a type that the vendors compute.

    A case that is about pages, or about float32, stays as it is.
    """
    spec = case.spec
    fields: dict[str, Any] = {}
    if page is not None and not case.feature.startswith("block size"):
        fields["block_size"] = page
    if spec.dtype == "float32" and case.feature != "float32":
        fields["dtype"] = "bfloat16"
        fields["kv_cache_dtype"] = "bfloat16" if spec.kv_cache_dtype == "float32" else spec.kv_cache_dtype
    return replace(case, spec=replace(spec, **fields))


def passed(backend: PagedCudaBackend, case: Case, make: MakeStep, doors: Doors) -> None:
    """Make a layer's whole pass on the host, for a case.

    Args:
        backend: whose.
        case: what is computed.
        make: return the batch on the host, given the view and whether there is a cache.
        doors: where the vendor would be entered; at least one must be.
    """
    problem = make_problem(replace(case, spec=replace(case.spec, dtype="float32", kv_cache_dtype="float32")))
    spec = case.spec
    view = problem.batch.view(spec.kind)
    paged = spec.kind != "encoder" or view.side.has_blocks
    before = doors.entered
    step = make(view, paged)
    store = Store(backend.allocate(spec, problem.num_blocks, "cpu")) if paged else None
    owned = layers.owned(LayerParameters(spec, **problem.parameters), _HOST)
    dtype = getattr(torch, spec.dtype)
    q, k, v = (None if a is None else torch.from_numpy(a).to(dtype) for a in (problem.q, problem.k, problem.v))
    assert q is not None
    out = torch.empty(len(q), spec.num_heads, spec.value_head_size, dtype=dtype)
    layers.run(backend, step, q, k, v, store, owned, out, return_lse=spec.returns_lse)
    if doors.entered == before:
        raise ValueError("the vendor was not called")


# FlashAttention: none of the three is imported, their signatures are read from their sources.


def flash_site(made: Path) -> Path:
    """Return a folder with FlashAttention 2, 3 and 4, installed there as pip and their own setups do.

    3 is the interface in flash-attn's sources, of a build that has everything.
    """
    sources, fourth = _needed("flash-attn"), _needed("flash-attn-4")
    site = beside(made / "site", sources, fourth)
    third = sources / "hopper"
    (site / "flash_attn_interface.py").symlink_to(third / "flash_attn_interface.py")
    found = re.search(r'__version__ = "(.+)"', (third / "__init__.py").read_text())
    info = site / "flash_attn_3-0.dist-info"
    info.mkdir()
    number = found[1] if found else "0"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn_3\nVersion: {number}\n")
    return site


def flash_row(site: Path, cases: list[Case]) -> Row:
    """Return the row of `cuda/flash-attention`: each case held against every version that accepts it."""
    backend = FlashAttentionBackend("cuda/flash-attention", pretended(site))
    versions = sorted(installed(backend.machine), key=lambda one: one.title)
    held: Counter[str] = Counter()

    def check(case: Case) -> str:
        for one in versions:
            if refusals(one, _CAPABILITY, case.spec, fp8_queries=False):
                continue
            door = FlashDoor(one)

            def make(view: BatchView, paged: bool, one: Installed = one, door: FlashDoor = door) -> Step:
                step = FlashStep(one, case.spec, view, _HOST, paged=paged, capacity=None)
                step.calls = CALLS[one.kind](one)
                vars(step.calls)["module"] = door
                return step

            passed(backend, case, make, door)
            held[str(one)] += 1
        return "interface"

    names = ", ".join(map(str, versions))
    row = without_hardware(backend, check, reason="", version=names, machine=_WHERE, cases=cases)
    counts = ", ".join(f"{one} ({held[str(one)]} cases)" for one in versions)
    reason = (
        f"Calls held against the signatures in the real sources of {counts}, each case against every version that "
        "accepts it; verdicts are those of sm_90 with all of them installed, 3 in a build that has everything. The "
        "operator in vLLM's wheel was not held here. Cases take bfloat16 where the kit has float32, and pages of 256 "
        "unless they are about pages"
    )
    return replace(row, reason=reason)


# FlashInfer and xFormers: installed, and imported without a GPU.


def flashinfer_row(cases: list[Case]) -> Row:
    """Return the row of `cuda/flashinfer`: wrappers made, planned and run, and what is appended.

    Each case twice: mixed batches by two wrappers, and by `BatchAttention`.
    """
    backend = FlashInferBackend("cuda/flashinfer", pretended())
    number = version("flashinfer-python")
    single: list[str] = []

    with flashinfer_doors() as doors:

        def check(case: Case) -> str:
            for mixed in MIXED:
                before = doors.planned["BatchAttention"]
                with _variable(MIXED_VARIABLE, mixed):
                    _held(backend, case, doors)
                if doors.planned["BatchAttention"] > before:
                    single.append(case.name)
            return "interface"

        row = without_hardware(backend, check, reason="", version=number, machine=_WHERE, cases=cases)
    reason = (
        f"Calls held against flashinfer-python {number}: its wrappers' constructors, plan and run, and its append; "
        f"mixed batches by two wrappers, and {len(single)} cases also by BatchAttention; verdicts are those of sm_90. "
        "Cases take bfloat16 where the kit has float32"
    )
    return replace(row, reason=reason)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def xformers_row(cases: list[Case]) -> Row:
    """Return the row of `cuda/xformers`: real inputs and masks, and the operator's own list of reasons against."""
    backend = XformersBackend("cuda/xformers", pretended())
    number = version("xformers")
    reason = (
        f"Inputs and masks made by xformers {number}, which has no reason against them but that no GPU is here; "
        "verdicts are those of sm_90. Cases take bfloat16 where the kit has float32, and pages of 64 unless they are "
        "about pages"
    )
    with xformers_doors() as doors:
        return without_hardware(
            backend,
            lambda case: _held(backend, case, doors),
            reason=reason,
            version=number,
            machine=_WHERE,
            cases=cases,
        )


def _held(backend: PagedCudaBackend, case: Case, doors: Doors) -> str:
    def make(view: BatchView, paged: bool) -> Step:
        return backend.step(case.spec, CudaPlan(spec=case.spec, view=view), _HOST, paged=paged, capacity=None)

    passed(backend, case, make, doors)
    return "interface"


def rows() -> Iterator[Row]:
    """Give the row of each backend of this distribution.

    Raises:
        FileNotFoundError: a vendor's sources were not fetched.
        ImportError: FlashInfer or xFormers is not installed.
    """
    # Of a step without a row no vendor hears anything: there is nothing to compare.
    asking = [case for case in CASES if any((*case.new, *(case.encoder or ()), case.padding))]
    with tempfile.TemporaryDirectory() as made:
        yield flash_row(flash_site(Path(made)), [fitted(case, 256) for case in asking])
    yield flashinfer_row([fitted(case, None) for case in asking])
    yield xformers_row([fitted(case, 64) for case in asking])


def _needed(name: str) -> Path:
    folder = unpacked(name)
    if folder is None:
        raise FileNotFoundError(f"{PACKAGES[name][0]} was not fetched: python -m attn_dispatch_cuda.vendors")
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Check, report, and say by the exit status whether all holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder for cuda-interface.json (docs/evidence)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    found = []
    for row in rows():
        found.append(row)
        counts = Counter(entry.state for entry in row.entries)
        print(f"{row.backend} {row.version}: {', '.join(f'{n} {state}' for state, n in sorted(counts.items()))}")
        for entry in row.entries:
            if entry.state == "FAILED":
                print(f"FAILED: {entry.feature}: {entry.detail}")
    failed = any(row.failed for row in found)
    print(f"{time.monotonic() - began:.0f} s")
    if options.output and not failed:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"name": "none", "description": "no NVIDIA GPU: calls compared with the vendors' packages"}
        text = report_text(found, machine, "python -m attn_dispatch_cuda.interface_cell --output docs/evidence")
        (folder / "cuda-interface.json").write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
