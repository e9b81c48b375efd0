"""The interface cell: every call of this package held against the vendors' real packages, without a GPU.

    python -m platforms.rocm.evidence.vendors                       # fetches them, once
    python -m platforms.rocm.evidence.signature_check [--output docs/evidence]

For each case of the conformance kit that a backend's verdict accepts on an AMD GPU that is not here, the batch is
planned and the call made up to the vendor's door: its arguments must bind to the function's real signature, with the
types and strides that its checks demand. AITER's Triton kernel is besides compiled for that GPU, with those arguments,
by the real compiler, where Triton is installed. Nothing here ran on a GPU, and no row says so. Exit status 1 when
something fails.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.backend import Backend
from attn_dispatch.conformance import CASES, Case, Row, report_text, without_hardware
from attn_dispatch.conformance.problem import make_problem
from attn_dispatch.contract import LayerParameters
from attn_dispatch.dispatch import registry
from attn_dispatch.hardware import Device, Platform
from attn_dispatch_rocm.aiter_kernels import FUNCTIONS, UNIFIED
from attn_dispatch_rocm.calls import Call
from attn_dispatch_rocm.layer import Owned, owned
from attn_dispatch_rocm.machine import Machine
from attn_dispatch_rocm.step import RocmPlan, Step

from . import aiter_triton
from .signatures import signature
from .source_facts import FACTS
from .vendors import PACKAGES, unpacked

__all__ = ["bound", "checked", "fitted", "main", "pretended", "resources"]

TARGET = "gfx942"
_FLASH = "flash_attn/flash_attn_interface.py"
_HOST = torch.device("cpu")
_COMMAND = "python -m platforms.rocm.evidence.signature_check --output docs/evidence"


def pretended(target: str, *folders: Path) -> Machine:
    """Return a machine with one GPU of that target, torch's ROCm build, and the packages of these folders."""
    device = Device("amd", target, "pretended", {"gfx": target})
    facts = {"torch_flavor": "rocm"}
    return Machine(Platform("rocm", f"1x AMD {target}", facts, (device,)), list(map(str, folders)))


def fitted(case: Case, page: int) -> Case:
    """Return a case with a page size and a type that the vendors compute, unless these are what it is about."""
    spec = case.spec
    fields: dict[str, Any] = {}
    if not case.feature.startswith("block size"):
        fields["block_size"] = page
    if spec.dtype == "float32" and case.feature != "float32":
        fields["dtype"] = "bfloat16"
        fields["kv_cache_dtype"] = "bfloat16" if spec.kv_cache_dtype == "float32" else spec.kv_cache_dtype
    return replace(case, spec=replace(spec, **fields))


def prepared(backend: Any, case: Case) -> tuple[Step, Owned, tuple[torch.Tensor, ...]]:
    """Return a case's batch on the host, what its layer owns, and empty q, key, value and output."""
    problem = make_problem(replace(case, spec=replace(case.spec, dtype="float32", kv_cache_dtype="float32")))
    spec = case.spec
    view = problem.batch.view(spec.kind)
    paged = spec.kind != "encoder" or view.side.has_blocks
    step = backend.step(spec, RocmPlan(spec=spec, view=view), _HOST, paged=paged)
    own = owned(LayerParameters(spec, **problem.parameters), _HOST)
    rows, stored = getattr(torch, spec.dtype), getattr(torch, spec.kv_cache_dtype)
    q = torch.zeros(view.num_tokens, spec.num_heads, spec.head_size, dtype=rows)
    out = torch.empty(view.num_tokens, spec.num_heads, spec.value_head_size, dtype=rows)
    if paged:
        shapes = backend.layout(spec).shapes(spec.geometry, problem.num_blocks)
        key, value = (torch.zeros(shapes[name], dtype=stored) for name in ("key", "value"))
    else:
        sizes = (spec.head_size, spec.value_head_size)
        key, value = (torch.zeros(view.num_new, spec.num_kv_heads, n, dtype=rows) for n in sizes)
    return step, own, (q, key, value, out)


def checked(backend: Any, case: Case, folder: Path) -> dict[str, Any]:
    """Return the arguments of a case's call, held against the vendor's function.

    Raises:
        TypeError: they do not bind to its signature.
        AssertionError: an array is not as the vendor's checks demand.
    """
    step, own, (q, key, value, out) = prepared(backend, case)
    call: Call = step.call
    lse = case.spec.returns_lse or (case.spec.sinks and not call.sinks_inside(step))
    given = dict(call.arguments(step, q, key, value, own, out, lse=lse))
    bound(call, folder).bind(**given)
    for name, array in given.items():
        if isinstance(array, torch.Tensor):
            assert array.stride(-1) == 1 if array.dim() else True, f"{name} has strides {array.stride()}"
            if array.dtype == torch.int32:
                assert array.is_contiguous(), f"{name} is not contiguous"
            assert array.dtype not in (torch.int64, torch.float64), f"{name} is {array.dtype}"
    return given


def bound(call: Call, folder: Path) -> inspect.Signature:
    """Return the signature of the vendor's function that a call is of."""
    file = f"aiter/{FUNCTIONS[call.function][0]}" if call.module.startswith("aiter") else _FLASH
    return signature(folder / file, call.function)


def _row(name: str, title: str, folders: list[Path], page: int, check: Callable[[Any, Case], str]) -> Row:
    entry = registry().entry(name)
    kind: type[Any] = entry.entry_point.load()
    backend: Backend = kind(name, pretended(TARGET, *folders))
    package = PACKAGES[title][0]
    reason = (
        f"Calls held against the real signatures and checks of {package.replace('==', ' ')}; verdicts are those on "
        f"{TARGET}. Cases take bfloat16 where the kit has float32, and pages of {page} unless they are about pages"
    )
    cases = [fitted(case, page) for case in CASES]
    return without_hardware(
        backend,
        lambda case: check(backend, case),
        reason=reason,
        version=package.partition("==")[2],
        machine=f"AMD {TARGET} (not here)",
        cases=cases,
    )


def rows(compile_too: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Give the row of each backend of this distribution.

    Raises:
        FileNotFoundError: a vendor's package was not fetched.
    """
    aiter, flash = (_needed(name) for name in ("amd-aiter", "flash-attn"))
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        # What the CK build installs beside its package; that it is there is all that is looked for.
        (Path(made) / "flash_attn_2_cuda.py").touch()
        module = stack.enter_context(aiter_triton.load(aiter, aiter_triton.TARGETS[TARGET])) if compile_too else None
        limit = aiter_triton.TARGETS[TARGET].lds_bytes

        def with_aiter(backend: Any, case: Case) -> str:
            given = checked(backend, case, aiter)
            step, _, _ = prepared(backend, case)
            if module is None or step.call.function != UNIFIED:
                return "interface"
            with aiter_triton.compiling() as found:
                module.unified_attention(**given)
            for kernel in found:
                assert kernel.lds_bytes <= limit, f"{kernel.name} needs {kernel.lds_bytes} B of LDS, there are {limit}"
            say(f"  {case.name}: {', '.join(f'{k.name} {k.seconds} s' for k in found)}")
            return "compiled"

        def with_flash(backend: Any, case: Case) -> str:
            checked(backend, case, flash)
            return "interface"

        yield _row("rocm/aiter", "amd-aiter", [aiter], 64, with_aiter)
        yield _row("rocm/flash-attention", "flash-attn", [flash, Path(made)], 128, with_flash)


def _needed(name: str) -> Path:
    folder = unpacked(name)
    if folder is None:
        raise FileNotFoundError(f"{PACKAGES[name][0]} was not fetched: python -m platforms.rocm.evidence.vendors")
    return folder


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
    found: list[dict[str, Any]] = []
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
            found += [program | step | asdict(kernel) | {"lds_limit": target.lds_bytes} for kernel in kernels]
    return found


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
        if not fact.holds(_needed(fact.package)):
            print(f"FAILED: {fact.package}: no longer so in {fact.file}: {fact.says}")
            failed = True
    print(f"{len(FACTS)} facts about the vendors' sources looked up")
    found = []
    for row in rows(compile_too, lambda text: None):
        found.append(row)
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
                programs += resources(target, _needed("amd-aiter"))
        over = [p for p in programs if p["lds_bytes"] > p["lds_limit"]]
        failed = failed or bool(over)
        for p in over:
            print(f"FAILED: {p['name']} on {p['target']}: {p['lds_bytes']} B of LDS, there are {p['lds_limit']}: {p}")
        print(f"{len(programs)} kernels of AITER compiled for {len({p['target'] for p in programs})} targets")
    print(f"{time.monotonic() - began:.0f} s")
    if options.output and not failed:
        _write(Path(options.output), found, programs)
    return 1 if failed else 0


def _write(folder: Path, found: list[Row], programs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"name": "none", "description": "no AMD GPU: compared and compiled"}
    text = report_text(found, machine, _COMMAND)
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
    for name, (requirement, _) in PACKAGES.items():
        lines += [f"- {requirement.replace('==', ' ')}: {'; '.join(f.says for f in FACTS if f.package == name)}."]
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
