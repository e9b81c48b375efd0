"""The signature check: every call of this package against the vendors' real packages, without a GPU.

    python -m platforms.rocm.evidence.packages                 # fetches them, once
    python -m platforms.rocm.evidence.signature_check [--output docs/evidence]

Each case of the conformance kit that a backend's verdict accepts on an AMD GPU that is not here runs through the whole
adapter up to the vendor's function. Its arguments must bind to the real signature, with the types and strides that its
checks demand; behind it is computed in float64 what the vendor documents that they mean, and the result must be the
contract's (`stubs`). AITER's Triton kernel is also compiled for that GPU, with those arguments, by the real compiler,
where Triton is installed. Nothing here ran on a GPU, and no row says so. Exit status 1 when something fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.conformance import CASES, Case, ConformanceError, Row, report_text, run_case, without_hardware
from attn_dispatch.conformance.interface import Package, SignatureStub
from attn_dispatch_rocm.aiter_kernels import UNIFIED
from attn_dispatch_rocm.backend import RocmBackend

from . import aiter_triton
from .packages import AITER, COMMAND, FLASH_ATTN, PACKAGES
from .source_facts import FACTS
from .stubs import Arguments, HostAiter, HostFlashAttention, fake_machine, stubbed

__all__ = ["adapt_case", "check", "main", "resources"]

TARGET = "gfx942"
_COMMAND = "python -m platforms.rocm.evidence.signature_check --output docs/evidence"


def adapt_case(case: Case, page: int) -> Case:
    """Return a case with a page size and a type that the vendors compute, unless these are what it is about."""
    spec = case.spec
    fields: dict[str, Any] = {}
    if not case.feature.startswith("block size"):
        fields["block_size"] = page
    if spec.dtype == "float32" and case.feature != "float32":
        fields["dtype"] = "bfloat16"
        fields["kv_cache_dtype"] = "bfloat16" if spec.kv_cache_dtype == "float32" else spec.kv_cache_dtype
    return replace(case, spec=replace(spec, **fields))


class _Compiler:
    """AITER's Triton kernel, compiled for a target with the arguments of each call."""

    def __init__(self, module: Any, target: aiter_triton.Target) -> None:
        self._module, self._target = module, target

    def compile(self, name: str, arguments: Arguments) -> None:
        """Compile what a call would launch.

        Raises:
            ValueError: a kernel needs more LDS than the target has.
        """
        if name != UNIFIED:
            return
        with aiter_triton.compiling() as kernels:
            self._module.unified_attention(**arguments)
        for kernel in kernels:
            if kernel.lds_bytes > self._target.lds_bytes:
                raise ValueError(f"{kernel.name} needs {kernel.lds_bytes} B of LDS, there are {self._target.lds_bytes}")


def check(backend: RocmBackend, package: Package, page: int, stub: SignatureStub, compiled: bool = False) -> Row:
    """Return the row of a backend whose functions are stubs.

    Args:
        backend: on the host.
        package: the vendor's.
        page: tokens, for cases that are not about pages.
        stub: in the place of the vendors' functions.
        compiled: AITER's Triton kernel is compiled with each call's arguments.
    """

    def run(case: Case) -> str:
        before = stub.calls.total()
        run_case(backend, case, mutations=False)  # that mistakes are noticed is shown by the tests
        if stub.calls.total() == before and any(case.new):
            raise ConformanceError("the vendor was not called")
        return "computed"

    name, _, version = package.requirement.partition("==")
    reason = (
        f"Calls checked against the real signatures and checks of {name} {version}, and computed by what it documents; "
        f"verdicts are those on {TARGET}. Cases take bfloat16 where the kit has float32, and pages of {page} unless "
        f"they are about pages{compiled * '. Triton kernels were compiled with the arguments of each call'}"
    )
    cases = [adapt_case(case, page) for case in CASES]
    machine = f"AMD {TARGET} (not here)"
    return without_hardware(backend, run, reason=reason, version=version, machine=machine, cases=cases)


def rows(compile_too: bool) -> Iterator[Row]:
    """Give the row of each backend of this distribution.

    Raises:
        FileNotFoundError: a vendor's package was not fetched.
    """
    aiter, flash = (package.needed(COMMAND) for package in (AITER, FLASH_ATTN))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # What the CK build installs beside its package; that it is there is all that is looked for.
        (Path(folder) / "flash_attn_2_cuda.py").touch()
        compiler = None
        if compile_too:
            target = aiter_triton.TARGETS[TARGET]
            compiler = _Compiler(stack.enter_context(aiter_triton.load(aiter, target)), target)
        stub = stack.enter_context(stubbed(aiter, flash, before=compiler.compile if compiler else lambda *_: None))
        yield check(HostAiter("rocm/aiter", fake_machine(TARGET, aiter)), AITER, 64, stub, compiler is not None)
        machine = fake_machine(TARGET, flash, Path(folder))
        yield check(HostFlashAttention("rocm/flash-attention", machine), FLASH_ATTN, 128, stub)


# (head size, page, query heads of a key head, queries, context): a decode that is split, one that is not, a prefill.
_PROGRAMS = tuple(
    (size, page, group, queries, context)
    for size, page, group in ((64, 16, 4), (128, 16, 8), (128, 64, 8), (256, 64, 2))
    for queries, context in ((1, 4096), (1, 400), (300, 4096))
)


def resources(target: aiter_triton.Target, folder: Path) -> list[dict[str, Any]]:
    """Compile AITER's Triton kernels for a target and return what each takes, with the limit of its LDS.

    Args:
        target: the GPU.
        folder: AITER's files.
    """
    programs: list[dict[str, Any]] = []
    with aiter_triton.load(folder, target) as module:
        for size, page, group, queries, context in _PROGRAMS:
            sequences = 4 if queries == 1 else 40
            q = torch.zeros(sequences * queries, 2 * group, size, dtype=torch.bfloat16)
            key = torch.zeros(64, page, 2, size, dtype=torch.bfloat16)
            with aiter_triton.compiling() as kernels:
                module.unified_attention(
                    q=q,
                    k=key,
                    v=key,
                    out=torch.empty_like(q),
                    cu_seqlens_q=torch.arange(sequences + 1, dtype=torch.int32) * queries,
                    max_seqlen_q=queries,
                    seqused_k=torch.full((sequences,), context, dtype=torch.int32),
                    max_seqlen_k=context,
                    softmax_scale=size**-0.5,
                    causal=True,
                    window_size=(-1, -1),
                    block_table=torch.zeros(sequences, 64, dtype=torch.int32),
                    softcap=0.0,
                    q_descale=None,
                    k_descale=None,
                    v_descale=None,
                )
            program = {"target": target.name, "head_size": size, "block_size": page, "group": group}
            step = {"queries": queries, "context": context}
            programs += [program | step | asdict(kernel) | {"lds_limit": target.lds_bytes} for kernel in kernels]
    return programs


def main(arguments: list[str] | None = None) -> int:
    """Check, report, and say by the exit status whether all holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder for rocm-interface.json and rocm-compile.md (docs/evidence)")
    parser.add_argument("--no-compile", action="store_true", help="only signatures")
    options = parser.parse_args(arguments)
    compile_too = not options.no_compile and find_spec("triton") is not None
    began = time.monotonic()
    failed = False
    for fact in FACTS:
        if not fact.holds(PACKAGES[fact.package].needed(COMMAND)):
            print(f"FAILED: {fact.package}: no longer so in {fact.file}: {fact.says}")
            failed = True
    print(f"{len(FACTS)} facts about the vendors' sources looked up")
    checked = []
    for row in rows(compile_too):
        checked.append(row)
        states = [entry.state for entry in row.entries]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        print(f"{row.backend} {row.version}: {counts}")
        for entry in row.entries:
            if entry.state == "FAILED":
                print(f"FAILED: {entry.feature}: {entry.detail}")
                failed = True
    programs: list[dict[str, Any]] = []
    if compile_too:
        for target in aiter_triton.TARGETS.values():
            if target.name != "gfx1100":  # refused: see the page
                programs += resources(target, AITER.needed(COMMAND))
        over = [p for p in programs if p["lds_bytes"] > p["lds_limit"]]
        failed = failed or bool(over)
        for p in over:
            print(f"FAILED: {p['name']} on {p['target']}: {p['lds_bytes']} B of LDS, there are {p['lds_limit']}: {p}")
        print(f"{len(programs)} kernels of AITER compiled for {len({p['target'] for p in programs})} targets")
    print(f"{time.monotonic() - began:.0f} s")
    if options.output and not failed:
        _write(Path(options.output), checked, programs)
    return 1 if failed else 0


def _write(folder: Path, checked: list[Row], programs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"name": "none", "description": "no AMD GPU: compared and compiled"}
    text = report_text(checked, machine, _COMMAND)
    (folder / "rocm-interface.json").write_text(text, encoding="utf-8")
    (folder / "rocm-interface.md").write_text(_page(programs), encoding="utf-8")


def _page(programs: list[dict[str, Any]]) -> str:
    lines = [
        "# AMD: what was compared and compiled without a GPU",
        "",
        f"Written by `{_COMMAND}`; nothing in it ran on a GPU.",
        "What verdicts of `rocm/aiter` and `rocm/flash-attention` rest upon, each looked up in the package's files:",
        "",
    ]
    for name, package in PACKAGES.items():
        says = "; ".join(fact.says for fact in FACTS if fact.package == name)
        lines += [f"- {package.requirement.replace('==', ' ')}: {says}."]
    if programs:
        import triton

        lines += [
            "",
            f"AITER's Triton kernels, compiled by Triton {triton.__version__} to machine code, as `rocm/aiter` calls",
            "them (bfloat16). Vector registers of a thread / spilled, LDS of a group in KiB / of how much there is.",
            "",
            "| target | head size | page | heads a key head | queries, context | kernel | registers | LDS |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for p in programs:
            lds = f"{p['lds_bytes'] / 1024:.0f} / {p['lds_limit'] // 1024}"
            step = f"{p['queries']}, {p['context']}"
            cells = (p["target"], p["head_size"], p["block_size"], p["group"], step, f"`{p['name']}`")
            lines.append(f"| {' | '.join(map(str, cells))} | {p['vgprs']} / {p['spills']} | {lds} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
