"""AITER's Triton kernel without a GPU: loaded from its real sources, compiled for AMD's targets, or interpreted.

AITER itself does not import where there is no ROCm; its Triton files need nothing of the rest. They ask the driver
which GPU is there: `Target` answers for one that is not.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TARGETS", "Compiled", "Target", "compiling", "load"]

_PACKAGES = ("aiter", "aiter.ops", "aiter.ops.triton")
_MODULE = "aiter.ops.triton.unified_attention"


@dataclass(frozen=True)
class Target:
    """A GPU for which kernels are compiled.

    Attributes:
        name: LLVM's.
        wave: threads that run together.
        units: compute units, of the largest GPU of the kind: AITER chooses its split by them.
        lds_bytes: memory that a group of threads has. Triton does not enforce it when compiling.
    """

    name: str
    wave: int
    units: int
    lds_bytes: int


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("gfx90a", 64, 110, 64 << 10),  # MI250X, one of its two dies
        Target("gfx942", 64, 304, 64 << 10),  # MI300X
        Target("gfx950", 64, 256, 160 << 10),  # MI355X
        Target("gfx1100", 32, 96, 64 << 10),  # RX 7900 XTX
    )
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes of a target.

    Attributes:
        name: the kernel's.
        vgprs: vector registers of a thread, accumulators included.
        spills: of those, how many lie in memory.
        lds_bytes: of a group of threads.
        code_bytes: machine code.
        seconds: to compile.
    """

    name: str
    vgprs: int
    spills: int
    lds_bytes: int
    code_bytes: int
    seconds: float


class _Driver:
    """What Triton asks a driver when it compiles."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("hip", target.name, target.wave)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def load(folder: Path, target: Target) -> Iterator[Any]:
    """Give AITER's module `unified_attention` as it is on a target; what was imported is forgotten afterwards.

    Args:
        folder: the folder that holds the package `aiter`.
        target: the GPU that its files believe in.
    """
    import triton

    for name in [n for n in sys.modules if n == "aiter" or n.startswith("aiter.")]:
        del sys.modules[name]
    for name in _PACKAGES:
        # A package without its __init__, which would load AITER's compiled parts.
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    driver = triton.runtime.driver
    before = driver._active  # asking for the default one fails where there is no GPU
    driver.set_active(_Driver(target))
    try:
        module = importlib.import_module(_MODULE)
        module.get_num_sms = lambda: target.units  # type: ignore[attr-defined]  # it asks torch, which finds no GPU
        yield module
    finally:
        driver._active = before
        for name in [n for n in sys.modules if n == "aiter" or n.startswith("aiter.")]:
            del sys.modules[name]


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Turn launches of Triton kernels into compilations; the list fills with what was compiled."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    compiled: list[Compiled] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        began = time.monotonic()
        kernel = launch(self, *args, grid=grid, warmup=True, **named)
        counts = dict(re.findall(r"^\s*\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"], re.MULTILINE))
        compiled.append(
            Compiled(
                self.fn.__name__,
                int(counts["vgpr_count"]),
                int(counts.get("vgpr_spill_count", 0)),
                int(kernel.metadata.shared),
                len(kernel.asm["hsaco"]),
                round(time.monotonic() - began, 2),
            )
        )
        return kernel

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch
