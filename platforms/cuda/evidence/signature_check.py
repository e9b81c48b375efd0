"""The signature check: every call of this platform against the vendors' real packages, and against the reference.

    python -m platforms.cuda.evidence.packages                 # fetches FlashAttention's sources, once
    python -m platforms.cuda.evidence.signature_check [--output docs/evidence]

Each case of the conformance kit that a backend's verdict accepts on an NVIDIA H200 that is not here is run on the host,
as the kit runs it: the cache is filled, the batch planned, the layer run, everything compared with the reference. Only
the vendor's functions are stubs (`stubs.py`): what they are given must bind to the real signatures, and they compute in
float64 what the vendor documents that it means. Nothing here ran on a GPU, and no row says so. Exit status 1 when
something fails.
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

from attn_dispatch.backend import Availability, Backend
from attn_dispatch.conformance import CASES, Case, ConformanceError, Row, report_text, run_case, without_hardware
from attn_dispatch.conformance.interface import SignatureStub, install_together
from attn_dispatch.hardware import Device, Platform
from attn_dispatch_cuda.flash_attention import FlashAttentionBackend
from attn_dispatch_cuda.flash_attention_call import functions_of
from attn_dispatch_cuda.flash_versions import Installed, installed, refusals_of
from attn_dispatch_cuda.flashinfer import MIXED, MIXED_VARIABLE, FlashInferBackend
from attn_dispatch_cuda.machine import Machine
from attn_dispatch_cuda.xformers import XformersBackend

from .packages import needed
from .stubs import flashinfer_stub, stub_of, xformers_stub

__all__ = ["fake_machine", "flash_check", "lifted", "main", "on_host", "rows", "stubbed_flash"]

MODEL = "NVIDIA H200"
_CAPABILITY = (9, 0)
_MACHINE = f"{MODEL} (not here)"


def fake_machine(*folders: Path) -> Machine:
    """Return a machine with one H200, torch's CUDA build, and the packages of these folders."""
    device = Device("nvidia", MODEL, "a fake machine")
    return Machine(Platform("cuda", f"1x {MODEL}", {"torch_flavor": "cu130"}, (device,)), list(map(str, folders)))


def on_host(kind: type[Any], *folders: Path) -> Any:
    """Return a backend that computes in host memory, and judges as on the machine that is not here."""

    class OnHost(kind):  # type: ignore[misc]
        device_type = "cpu"

        def probe(self) -> Availability:
            return Availability(True, "on the host, with a stub for the vendor", evidence="interface")

        def capability_of(self, device: Any) -> tuple[int, int]:
            return _CAPABILITY

    return OnHost(f"on-host/{kind.__name__}", fake_machine(*folders))


def lifted(case: Case, page: int | None) -> Case:
    """Return a case with a page size (None: its own) and a type that the vendors compute.

    A case that is about pages, or about float32, stays as it is; so do the pages of one with many blocks, which would
    take gigabytes.
    """
    spec = case.spec
    fields: dict[str, Any] = {}
    if page is not None and not case.feature.startswith("block size") and not case.first_block:
        fields["block_size"] = page
    if spec.dtype == "float32" and case.feature != "float32":
        fields["dtype"] = "bfloat16"
        fields["kv_cache_dtype"] = "bfloat16" if spec.kv_cache_dtype == "float32" else spec.kv_cache_dtype
    return replace(case, spec=replace(spec, **fields))


def passed(backend: Backend, case: Case, stub: SignatureStub) -> str:
    """Run a case as the kit does; return what that proves.

    Raises:
        ConformanceError: something differs from the reference, or the vendor was not called.
    """
    before = stub.calls.total()
    result = run_case(backend, case, mutations=False)  # what is noticed, the tests of this platform show
    if not result.verdict:
        raise ConformanceError(f"on the host the verdict is another: {result.verdict}")
    if stub.calls.total() == before:
        raise ConformanceError("the vendor was not called")
    return "computed"


# FlashAttention: none of the three is imported, their signatures are read from their sources.


def flash_site(made: Path) -> Path:
    """Return a folder with FlashAttention 2, 3 and 4, installed there as pip and their own setups do.

    3 is the interface in flash-attn's sources, of a build that has everything, and the one in vLLM's wheel.
    """
    sources, fourth = needed("flash-attn"), needed("flash-attn-4")
    site = install_together(made / "site", sources, fourth, needed("vllm"))
    third = sources / "hopper"
    (site / "flash_attn_interface.py").symlink_to(third / "flash_attn_interface.py")
    number = re.search(r'__version__ = "(.+)"', (third / "__init__.py").read_text())
    info = site / "flash_attn_3-0.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: flash_attn_3\nVersion: {number[1] if number else '0'}\n"
    (info / "METADATA").write_text(text)
    return site


@contextmanager
def stubbed_flash(one: Installed, stub: Any) -> Iterator[None]:
    """Put a stub in the place of a version's module."""
    functions = functions_of(one)
    vars(functions)["module"] = stub
    try:
        yield
    finally:
        functions_of.cache_clear()


def flash_check(one: Installed, case: Case, folders: list[Path], stub: Any = None) -> None:
    """Run a case by one version of FlashAttention alone.

    Args:
        one: the version.
        case: that the version accepts.
        folders: where packages are installed.
        stub: in the place of its module (None: `stub_of` the version).
    """
    stub = stub or stub_of(one)
    backend = on_host(FlashAttentionBackend, *folders)
    vars(backend)["_installed"] = [one]
    with stubbed_flash(one, stub):
        passed(backend, case, stub)


def flash_row(site: Path, cases: list[Case]) -> Row:
    """Return the row of `cuda/flash-attention`: each case checked against every version that accepts it."""
    backend = FlashAttentionBackend("cuda/flash-attention", fake_machine(site))
    versions = sorted(installed(backend.machine), key=lambda one: one.title)
    checked: Counter[str] = Counter()

    def check(case: Case) -> str:
        for one in versions:
            if not refusals_of(one, _CAPABILITY, case.spec, fp8_queries=False):
                flash_check(one, case, [site])
                checked[str(one)] += 1
        return "computed"

    names = ", ".join(map(str, versions))
    row = without_hardware(backend, check, reason="", version=names, machine=_MACHINE, cases=cases)
    counts = ", ".join(f"{one} ({checked[str(one)]} cases)" for one in versions)
    reason = (
        f"Calls checked against the signatures in the real sources of {counts} (vLLM's: its library's schema), each "
        "case against every version that accepts it, and computed in float64 as those document their arguments; "
        "verdicts are those of sm_90 with all of them installed, 3 in a build that has everything. Cases take bfloat16 "
        "where the kit has float32, and pages of 256 unless they are about pages"
    )
    return replace(row, reason=reason)


# FlashInfer and xFormers: installed, and imported without a GPU.


def flashinfer_row(cases: list[Case]) -> Row:
    """Return the row of `cuda/flashinfer`: wrappers made, planned and run, and what is appended.

    Each case twice: mixed batches by two wrappers, and by `BatchAttention`.
    """
    backend = FlashInferBackend("cuda/flashinfer", fake_machine())
    number = version("flashinfer-python")
    by_one_kernel: list[str] = []

    with flashinfer_stub() as stub:

        def check(case: Case) -> str:
            for mixed in MIXED:
                before = stub.calls["BatchAttention.plan"]
                with _variable(MIXED_VARIABLE, mixed):
                    passed(on_host(FlashInferBackend), case, stub)
                if stub.calls["BatchAttention.plan"] > before:
                    by_one_kernel.append(case.name)
            return "computed"

        row = without_hardware(backend, check, reason="", version=number, machine=_MACHINE, cases=cases)
    reason = (
        f"Calls checked against flashinfer-python {number} (its wrappers' constructors, plan and run, and its append), "
        "and computed in float64 as it documents their arguments; mixed batches by two wrappers, and "
        f"{len(by_one_kernel)} cases also by BatchAttention; verdicts are those of sm_90. Cases take bfloat16 where "
        "the kit has float32"
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
    backend = XformersBackend("cuda/xformers", fake_machine())
    number = version("xformers")
    reason = (
        f"Inputs and masks made by xformers {number}, which has no reason against them but that no GPU is here, and "
        "computed in float64 as its masks say; verdicts are those of sm_90. Cases take bfloat16 where the kit has "
        "float32, and pages of 64 unless they are about pages"
    )
    with xformers_stub() as stub:
        return without_hardware(
            backend,
            lambda case: passed(on_host(XformersBackend), case, stub),
            reason=reason,
            version=number,
            machine=_MACHINE,
            cases=cases,
        )


def rows() -> Iterator[Row]:
    """Give the row of each backend of this distribution.

    Raises:
        FileNotFoundError: a vendor's sources were not fetched.
        ImportError: FlashInfer or xFormers is not installed.
    """
    # Of a step without a row no vendor hears anything: there is nothing to compare.
    asking = [case for case in CASES if any((*case.new, *(case.encoder or ()), case.padding))]
    makers: tuple[tuple[Callable[..., Row], int | None], ...] = ((flashinfer_row, None), (xformers_row, 64))
    with tempfile.TemporaryDirectory() as made:
        yield flash_row(flash_site(Path(made)), [lifted(case, 256) for case in asking])
    for make, page in makers:
        yield make([lifted(case, page) for case in asking])


def main(arguments: list[str] | None = None) -> int:
    """Check, report, and say by the exit status whether all holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder for cuda-interface.json (docs/evidence)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    checked = []
    for row in rows():
        checked.append(row)
        counts = Counter(entry.state for entry in row.entries)
        print(f"{row.backend} {row.version}: {', '.join(f'{n} {state}' for state, n in sorted(counts.items()))}")
        for entry in row.entries:
            if entry.state == "FAILED":
                print(f"FAILED: {entry.feature}: {entry.detail}")
    failed = any(row.failed for row in checked)
    print(f"{time.monotonic() - began:.0f} s")
    if options.output and not failed:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"name": "none", "description": "no NVIDIA GPU: calls compared with the vendors' packages"}
        command = "python -m platforms.cuda.evidence.signature_check --output docs/evidence"
        (folder / "cuda-interface.json").write_text(report_text(checked, machine, command), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
