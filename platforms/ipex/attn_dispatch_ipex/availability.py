"""Which of the runtimes could run here, and where IPEX's users should go: from package metadata and files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from attn_dispatch.backend import Availability

__all__ = ["ARCHIVED", "INSTALL_CPU", "installed_version", "ipex_on_cpu", "ipex_on_xpu", "vllm_on_xpu"]

Versions = Callable[[str], str | None]

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


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def ipex_on_cpu(facts: Mapping[str, object], versions: Versions = installed_version) -> Availability:
    """Say whether IPEX's CPU ops could run on a machine with these facts."""
    system, machine, isa = facts.get("system"), facts.get("machine"), facts.get("isa")
    if (system, machine) != ("linux", "x86_64"):
        return Availability(False, f"IPEX is built for linux/x86_64, this is {system}/{machine}", FROM_CPU)
    if isinstance(isa, Sequence) and "avx2" not in isa:
        return Availability(False, "IPEX needs a CPU with AVX2, this one has none", FROM_CPU)
    torch, ipex = versions("torch"), versions(IPEX)
    move = f"{INSTALL_CPU}. Or move on: {FROM_CPU}"
    if problem := _torch_problem(torch, ipex):
        return Availability(False, problem, move, version=ipex or "")
    if ipex is None:
        return Availability(False, f"IPEX {SERIES}.0 is not installed", f"{INSTALL_CPU}. {ARCHIVED}: {FROM_CPU}")
    if not _is_series(ipex) or "xpu" in ipex:
        return Availability(False, f"IPEX {ipex} found, the CPU build of {SERIES}.* needed", move, version=ipex)
    return Availability(True, f"IPEX {ipex} with torch {torch}", f"{ARCHIVED}. {FROM_CPU}", version=ipex)


def ipex_on_xpu(devices: Sequence[str], versions: Versions = installed_version) -> Availability:
    """Say whether IPEX's XPU ops could run on these devices (each a description of an Intel GPU)."""
    ipex, torch = versions(IPEX), versions("torch")
    if not devices:
        return Availability(False, _NO_GPU, version=ipex or "")
    move = f"{INSTALL_XPU}. Or move on: {FROM_XPU}"
    if problem := _torch_problem(torch, ipex):
        return Availability(False, problem, move, version=ipex or "")
    if ipex is None or "xpu" not in ipex:
        found = f"IPEX {ipex} is a CPU build" if ipex else "IPEX is not installed"
        return Availability(False, f"{found}, {devices[0]} needs an XPU build of {SERIES}.*", move, version=ipex or "")
    return Availability(True, f"IPEX {ipex} on {devices[0]}; {_UNTRIED}", f"{ARCHIVED}. {FROM_XPU}", version=ipex)


def vllm_on_xpu(devices: Sequence[str], versions: Versions = installed_version) -> Availability:
    """Say whether vllm-xpu-kernels could run on these devices (each a description of an Intel GPU)."""
    kernels = versions(VLLM_XPU)
    if not devices:
        return Availability(False, _NO_GPU, version=kernels or "")
    if kernels is None:
        return Availability(False, f"{VLLM_XPU} is not installed", INSTALL_VLLM_XPU)
    if versions("torch") is None:
        return Availability(False, f"{VLLM_XPU} {kernels} without torch", INSTALL_VLLM_XPU, version=kernels)
    return Availability(True, f"{VLLM_XPU} {kernels} on {devices[0]}; {_UNTRIED}", version=kernels)


_NO_GPU = "no Intel GPU here (no render node of the xe or i915 driver in /dev/dri)"
_UNTRIED = "written against the vendor's sources and signatures, never run on an Intel GPU by this project"


def _torch_problem(torch: str | None, ipex: str | None) -> str | None:
    if torch is not None and _is_series(torch):
        return None
    found = f"torch {torch} found" if torch else "torch is not installed"
    also = "" if ipex else ", which is not installed either" if torch is None else ", which is not installed"
    return f"{found}, {SERIES}.* needed for IPEX {ipex or f'{SERIES}.0'}{also}"


def _is_series(version: str) -> bool:
    return version.split("+")[0].split(".")[:2] == SERIES.split(".")
