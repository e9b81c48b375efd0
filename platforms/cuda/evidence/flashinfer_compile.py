"""A compile check: FlashInfer's kernels that this package calls, built by nvcc for a GPU that is not here.

    python -m platforms.cuda.evidence.flashinfer_compile [--arch 9.0a] [--output FOLDER] [--again]

Builds the modules behind `cuda/flashinfer` (append, decode, prefill by the fa2 kernels, BatchAttention, merge)
with FlashInfer's own build files, and reports what each kernel takes: registers, stack, shared memory. Exit status 0:
every module was built and has kernels; 1: something failed. What was built is kept under the hash of the versions that
it was built from. The compiler is that of the wheels (nvidia-cuda-nvcc and its parts), else the one of CUDA_HOME.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["Kernel", "Toolkit", "build", "kernels_in", "main", "prepare", "toolkit"]

_PARTS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
_SOURCES = ("flashinfer-python", "apache-tvm-ffi", "torch")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler.

    Attributes:
        home: its folder.
        release: what it says of itself, "13.0".
        cuobjdump: what reads resources out of a library (None: there is none).
    """

    home: Path
    release: str
    cuobjdump: Path | None


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel takes of a processor.

    Attributes:
        name: its name, mangled.
        registers: of a thread.
        stack_bytes: of a thread: spills and local arrays.
        shared_bytes: of a block, known when compiling (what is asked for at launch comes on top).
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def toolkit() -> Toolkit | None:
    """Return the compiler of the wheels, or of CUDA_HOME, or on the path; None when there is none."""
    nvidia = find_spec("nvidia")
    folders = [Path(p) for p in (nvidia.submodule_search_locations or [])] if nvidia else []
    homes = [home for folder in folders for home in sorted(folder.glob("cu*")) if (home / "bin" / "nvcc").exists()]
    if chosen := os.environ.get("CUDA_HOME"):
        homes.append(Path(chosen))
    if on_path := shutil.which("nvcc"):
        homes.append(Path(on_path).resolve().parent.parent)
    for home in homes:
        if not (home / "bin" / "nvcc").exists():
            continue
        text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        reader = home / "bin" / "cuobjdump"
        return Toolkit(home, release[1] if release else "", reader if reader.exists() else None)
    return None


def key(compiler: Toolkit, arch: str) -> str:
    """Return the hash of everything that modules are built from."""
    parts = [f"{name} {_version(name)}" for name in (*_PARTS, *_SOURCES)]
    parts += [compiler.release, arch, inspect.getsource(modules), inspect.getsource(prepare)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"


def prepare(compiler: Toolkit, work: Path, arch: str) -> None:
    """Point FlashInfer at the compiler, the target and a folder; before it is imported.

    Wheels have neither a `lib64` nor the driver's library: the linker is given both in a folder of their own. A library
    without contents stands for the driver's; nothing that is built here is run.
    """
    stubs = work / "link"
    stubs.mkdir(parents=True, exist_ok=True)
    driver = stubs / "libcuda.so"
    if not driver.exists():
        empty = stubs / "empty.c"
        empty.write_text("")
        subprocess.run(["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", driver, empty], check=True)
    for folder in (compiler.home / "lib64", compiler.home / "lib"):
        for library in sorted(folder.glob("libcudart.so*")):
            if not (stubs / "libcudart.so").exists():
                (stubs / "libcudart.so").symlink_to(library)
    os.environ |= {
        "CUDA_HOME": str(compiler.home),
        "FLASHINFER_CUDA_ARCH_LIST": arch,
        "FLASHINFER_WORKSPACE_BASE": str(work),
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{stubs}",
    }
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))


def modules() -> Mapping[str, Callable[[], Any]]:
    """Return makers of FlashInfer's build specifications, by what this package calls them for."""
    import torch
    from flashinfer.jit import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.attention.modules import _gen_batch_attention_primary_module
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.page import gen_page_module

    bf16 = torch.bfloat16
    # No position encoding (0), no window, no soft-cap; the prefill module is also the decode over tensor cores.
    types = (bf16, bf16, bf16, torch.int32, 128, 128, 0, False, False)
    return {
        "append": gen_page_module,
        "decode": lambda: gen_batch_decode_module(*types),
        "prefill": lambda: gen_batch_prefill_module("fa2", *types, False),
        # As BatchAttention.plan builds it: keys and values in equal strides, no position encoding, no soft-cap, no
        # profiler. The public function builds kernels for other strides with them.
        "batch-attention": lambda: _gen_batch_attention_primary_module(*types[:7], False, False),
        "merge": gen_cascade_module,
    }


def build(name: str, specification: Any, again: bool) -> tuple[Path, float]:
    """Build a module, or find it built; return its library and the seconds that it took.

    Raises:
        RuntimeError: the compiler or the linker failed; its words are part of the message.
    """
    library = Path(specification.jit_library_path)
    done = library.with_suffix(".done")
    if done.exists() and library.exists() and not again:
        return library, 0.0
    done.unlink(missing_ok=True)
    if again:
        shutil.rmtree(library.parent, ignore_errors=True)
    started = time.monotonic()
    specification.build(verbose=False)
    if not library.exists():
        raise RuntimeError(f"{name}: the build ended without an error and without {library.name}")
    done.touch()
    return library, time.monotonic() - started


def kernels_in(library: Path, reader: Path) -> list[Kernel]:
    """Return the kernels of a library and what they take.

    Raises:
        RuntimeError: the library has none.
    """
    done = subprocess.run([reader, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    kernels = []
    name = ""
    for line in done.stdout.splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            taken = {field: int(value) for field, value in re.findall(r"(\w+):(\d+)", line)}
            kernels.append(Kernel(name, taken["REG"], taken.get("STACK", 0), taken.get("SHARED", 0)))
    if not kernels:
        raise RuntimeError(f"{library.name} has no kernel in it")
    return kernels


def main(arguments: list[str] | None = None) -> int:
    """Build, report, and say by the exit status whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="9.0a", help="compute capability to build for (9.0a)")
    parser.add_argument("--only", nargs="*", help="of append, decode, prefill, batch-attention, merge")
    parser.add_argument("--output", help="folder for cuda-compile.json and .md (docs/evidence)")
    parser.add_argument("--again", action="store_true", help="build what is built already")
    options = parser.parse_args(arguments)
    compiler = toolkit()
    if compiler is None or shutil.which("ninja") is None:
        missing = "no nvcc (pip install nvidia-cuda-nvcc nvidia-cuda-cccl)" if compiler is None else "no ninja"
        print(f"compile check: {missing}", file=sys.stderr)
        return 1
    from attn_dispatch.adapters.environment import make_cache_folder

    work = make_cache_folder("flashinfer", key(compiler, options.arch))
    prepare(compiler, work, options.arch)
    print(f"flashinfer-python {_version('flashinfer-python')}, nvcc {compiler.release}, for {options.arch}")
    rows: list[dict[str, Any]] = []
    failed = False
    for name, make in modules().items():
        if options.only and name not in options.only:
            continue
        try:
            library, seconds = build(name, make(), options.again)
            kernels = kernels_in(library, compiler.cuobjdump) if compiler.cuobjdump else []
        except Exception as error:  # whatever the compiler says is the result
            print(f"{name:<15} FAILED\n{str(error)[-4000:]}")
            failed = True
            continue
        row = _row(name, library, seconds, kernels)
        rows.append(row)
        print(_line(row))
    if options.output and not failed:
        _write(Path(options.output), compiler, options.arch, rows)
    return 1 if failed or not rows else 0


def _row(name: str, library: Path, seconds: float, kernels: list[Kernel]) -> dict[str, Any]:
    most = max(kernels, key=lambda kernel: kernel.registers, default=None)
    return {
        "module": name,
        "library": library.name,
        "library_bytes": library.stat().st_size,
        "seconds": round(seconds, 1),
        "kernels": len(kernels),
        "registers": [min((k.registers for k in kernels), default=0), most.registers if most else 0],
        "stack_bytes": max((k.stack_bytes for k in kernels), default=0),
        "shared_bytes": max((k.shared_bytes for k in kernels), default=0),
        "with_stack": sum(k.stack_bytes > 0 for k in kernels),
        "most": asdict(most) if most else None,
    }


def _line(row: Mapping[str, Any]) -> str:
    took = f"{row['seconds']:.0f} s" if row["seconds"] else "built before"
    low, high = row["registers"]
    size = f"{row['library_bytes'] / 2**20:6.1f} MiB  {row['kernels']:4} kernels"
    stack = f"stack up to {row['stack_bytes']} B (in {row['with_stack']})"
    shared = f"static shared up to {row['shared_bytes']} B"
    return f"{row['module']:<15} {size}  {low}-{high} registers  {stack}  {shared}  {took}"


def _write(folder: Path, compiler: Toolkit, arch: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: _version(name) for name in (*_PARTS, *_SOURCES)}
    flashinfer = f"flashinfer-python {versions['flashinfer-python']}"
    report = {"arch": arch, "nvcc": compiler.release, "versions": versions, "modules": rows}
    (folder / "cuda-compile.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# FlashInfer's kernels, compiled for {arch} without a GPU",
        "",
        f"{flashinfer}, nvcc {compiler.release}; bfloat16, head size 128. Written by",
        "`python -m platforms.cuda.evidence.flashinfer_compile --output docs/evidence`. Compiled, not run.",
        "",
        "| module | MiB | kernels | registers | stack, bytes | static shared, bytes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["registers"]
        stack = f"{row['stack_bytes']} (in {row['with_stack']} kernels)" if row["stack_bytes"] else "0"
        size = f"{row['library_bytes'] / 2**20:.1f}"
        cells = (row["module"], size, row["kernels"], f"{low}-{high}", stack, row["shared_bytes"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (folder / "cuda-compile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
