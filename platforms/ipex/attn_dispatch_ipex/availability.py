"""Which of the runtimes could run here, and where IPEX's users should go: from package metadata and files alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.backend import Availability
from attn_dispatch.errors import BackendLoadError

__all__ = [
    "ARCHIVED",
    "INSTALL_CPU",
    "INSTALL_VLLM_XPU",
    "INSTALL_XPU",
    "ipex_on_cpu",
    "ipex_on_xpu",
    "load",
    "vllm_on_xpu",
]

Versions = Callable[[str], str]
"""The version of a distribution; empty when it is not installed."""

IPEX = "intel-extension-for-pytorch"
VLLM_XPU = "vllm-xpu-kernels"
SERIES = "2.8"
"""The torch that IPEX's last release was built for; it has unresolved symbols with any other."""

ARCHIVED = "IPEX is archived: 2.8 is its last release, with known security issues by its own notice"
INSTALL_CPU = 'pip install -e . -e "platforms/ipex[cpu]" in an environment of its own'
INSTALL_XPU = f"pip install torch=={SERIES}.0+xpu {IPEX}=={SERIES}.10+xpu from Intel's package index"
INSTALL_VLLM_XPU = f"pip install {VLLM_XPU} beside the XPU build of torch that it names"
FROM_CPU = "cpu/numba and torch/sdpa replace it on any torch"
FROM_XPU = "ipex/vllm-xpu (the kernels that vLLM moved to) and torch/sdpa on torch's XPU build replace it"


def load(module: str, remedy: str) -> ModuleType:
    """Import torch and a vendor's module.

    Raises:
        BackendLoadError: either does not import (a torch without the libraries that its build links to, an extension
            built for another torch). IPEX ends the whole process when it dislikes the torch beside it: that, too.
    """
    for name in ("torch", module):
        try:
            imported = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a vendor dies of is the reason
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise BackendLoadError(f"{name} is installed but does not import ({text}). {remedy}") from error
    return imported


_installed = Packages().version


def ipex_on_cpu(facts: Mapping[str, object], versions: Versions = _installed) -> Availability:
    """Say whether IPEX's CPU ops could run on a machine with these facts."""
    system, machine, isa = facts.get("system"), facts.get("machine"), facts.get("isa")
    if (system, machine) != ("linux", "x86_64"):
        return Availability(False, f"IPEX is built for linux/x86_64, this is {system}/{machine}", FROM_CPU)
    if isinstance(isa, Sequence) and "avx2" not in isa:
        return Availability(False, "IPEX needs a CPU with AVX2, this one has none", FROM_CPU)
    torch, ipex = versions("torch"), versions(IPEX)
    move = f"{INSTALL_CPU}. Or move on: {FROM_CPU}"
    if problem := _torch_problem(torch, ipex):
        return Availability(False, problem, move, version=ipex)
    if not ipex:
        return Availability(False, f"IPEX {SERIES}.0 is not installed", f"{INSTALL_CPU}. {ARCHIVED}: {FROM_CPU}")
    if not _is_series(ipex) or "xpu" in ipex:
        return Availability(False, f"IPEX {ipex} found, the CPU build of {SERIES}.* needed", move, version=ipex)
    return Availability(True, f"IPEX {ipex} with torch {torch}", f"{ARCHIVED}. {FROM_CPU}", version=ipex)


def ipex_on_xpu(devices: Sequence[str], versions: Versions = _installed) -> Availability:
    """Say whether IPEX's XPU ops could run on these devices (each a description of an Intel GPU)."""
    ipex, torch = versions(IPEX), versions("torch")
    if not devices:
        return Availability(False, _NO_GPU, version=ipex)
    move = f"{INSTALL_XPU}. Or move on: {FROM_XPU}"
    if problem := _torch_problem(torch, ipex):
        return Availability(False, problem, move, version=ipex)
    if "xpu" not in ipex:
        reason = f"IPEX {ipex} is a CPU build" if ipex else "IPEX is not installed"
        return Availability(False, f"{reason}, {devices[0]} needs an XPU build of {SERIES}.*", move, version=ipex)
    return Availability(
        True, f"IPEX {ipex} on {devices[0]}; {_UNVERIFIED}", f"{ARCHIVED}. {FROM_XPU}", ipex, "never run"
    )


def vllm_on_xpu(devices: Sequence[str], versions: Versions = _installed) -> Availability:
    """Say whether vllm-xpu-kernels could run on these devices (each a description of an Intel GPU)."""
    kernels = versions(VLLM_XPU)
    if not devices:
        return Availability(False, _NO_GPU, version=kernels)
    if not kernels:
        return Availability(False, f"{VLLM_XPU} is not installed", INSTALL_VLLM_XPU)
    if not versions("torch"):
        return Availability(False, f"{VLLM_XPU} {kernels} without torch", INSTALL_VLLM_XPU, version=kernels)
    return Availability(True, f"{VLLM_XPU} {kernels} on {devices[0]}; {_UNVERIFIED}", "", kernels, "never run")


_NO_GPU = "no Intel GPU here (no render node of the xe or i915 driver in /dev/dri)"
_UNVERIFIED = "written against the vendor's sources and signatures, never run on an Intel GPU by this project"


def _torch_problem(torch: str, ipex: str) -> str:
    if torch and _is_series(torch):
        return ""
    problem = f"torch {torch} found" if torch else "torch is not installed"
    also = "" if ipex else ", which is not installed" if torch else ", which is not installed either"
    return f"{problem}, {SERIES}.* needed for IPEX {ipex or f'{SERIES}.0'}{also}"


def _is_series(version: str) -> bool:
    return version.split("+")[0].split(".")[:2] == SERIES.split(".")
