"""The door: which platform this machine is, and everything that was found on the way."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import amd, cpu, intel, nvidia, pci, torch_build, tpu
from .device import Device, count
from .tree import Tree

__all__ = ["ORDER", "Platform", "detect"]

ORDER = ("tpu", "cuda", "rocm", "xpu", "cpu")
"""Which platform a machine is that has several kinds of accelerator: the first of these."""

_PLATFORM_OF = {"tpu": "tpu", "nvidia": "cuda", "amd": "rocm", "intel-gpu": "xpu"}
_TORCH_BUILDS = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU"}
_HIDING = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}


@dataclass(frozen=True)
class Platform:
    """What a machine is.

    Attributes:
        name: `tpu`, `cuda`, `rocm`, `xpu` or `cpu`.
        description: one line for people.
        facts: everything that was found; can be written as JSON:
            `system` ("linux", as `sys.platform` says it), `machine` ("x86_64"), `wsl` (bool);
            `cpu_model`, `cpu_flags` (sorted), `isa` (the flags that kernels are chosen by; "neon" for ARM's asimd),
            `cpu_count` (CPUs that this process may use: affinity and quota), `cpu_online`, `cpu_quota` (or None),
            `memory_bytes` (that this process may use; None when nothing tells);
            `devices` (each Device as a dict), `drivers` (versions of kernel drivers, by vendor);
            `torch_flavor` (what the installed torch was built for: "cpu", "cu130", "rocm6.4", "xpu", or None);
            `problems` (what could not be read, is there but cannot be used, or does not fit together),
            `hidden` (devices that a variable hides), `notes` (devices that did not decide the platform, and why);
            `fingerprint` (short hash of the hardware that a measurement depends on; the same in every process here).
        devices: the accelerators that this process may use, also those that did not decide the platform.
    """

    name: str
    description: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()


def detect(
    root: str | os.PathLike[str] = "/",
    *,
    environ: Mapping[str, str] | None = None,
    search: Iterable[str] | None = None,
) -> Platform:
    """Find out what a machine is. What cannot be read is not raised: it is one of `facts["problems"]`.

    An integrated GPU (Intel's, or a Ryzen's) decides the platform only when the installed torch was built for it: a
    laptop with an ordinary torch stays a `cpu` machine, a GPU that somebody has set up is used. On Windows and macOS
    accelerators are not looked for: ATTN_DISPATCH_PLATFORM chooses there.

    Args:
        root: folder with the machine's /dev, /etc, /proc, /sys and /usr; anything but "/" is another machine, of which
            nothing outside this folder is read.
        environ: instead of the process's own environment. CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and
            ROCR_VISIBLE_DEVICES hide devices as they do from the vendors' runtimes.
        search: folders, relative to the root, in which torch is looked for. Default: `sys.path` on this machine, none
            on another.
    """
    environ = os.environ if environ is None else environ
    tree = Tree(root)
    if search is None:
        search = [os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)] if tree.live else ()
    processor = cpu.read(tree, environ)
    build = torch_build.flavor(tree, search)
    found = _devices(tree)
    devices, hidden = _visible(found, environ)
    name, notes = _choose(devices, build)
    if not found and tree.exists(nvidia.WSL_NODE):
        notes.append(
            f"Windows shares a GPU (/{nvidia.WSL_NODE}), but no library to compute on it: neither CUDA's, which comes "
            "with Windows' NVIDIA driver, nor ROCm's librocdxg"
        )
    own = [device for device in devices if _PLATFORM_OF[device.kind] == name]
    drivers = {"nvidia": nvidia.driver(tree), "amd": amd.driver(tree)}
    facts = {
        "system": sys.platform if tree.live else "linux",
        "machine": processor.machine,
        "wsl": "microsoft" in tree.word("proc/sys/kernel/osrelease").lower(),
        "cpu_model": processor.model,
        "cpu_flags": processor.flags,
        "isa": processor.isa,
        "cpu_count": processor.usable,
        "cpu_online": processor.online,
        "cpu_quota": processor.quota,
        "memory_bytes": processor.memory_bytes,
        "devices": [asdict(device) for device in devices],
        "drivers": {vendor: version for vendor, version in drivers.items() if version},
        "torch_flavor": build,
        "problems": [*dict.fromkeys(tree.problems), *_mismatch(name, build, devices)],
        "hidden": hidden,
        "notes": notes,
        "fingerprint": _fingerprint(name, processor, own),
    }
    return Platform(name, _description(processor, own, hidden), facts, tuple(devices))


def _devices(tree: Tree) -> list[Device]:
    functions = pci.scan(tree, (tpu.VENDOR, nvidia.VENDOR))
    return [*tpu.find(tree, functions), *nvidia.find(tree, functions), *amd.find(tree), *intel.find(tree)]


def _visible(devices: Sequence[Device], environ: Mapping[str, str]) -> tuple[list[Device], list[str]]:
    """Return the devices that no variable hides, and what hides the others."""
    visible, hidden = list(devices), []
    for platform in _HIDING:
        mine = [device for device in devices if _PLATFORM_OF[device.kind] == platform]
        if mine and (variable := _hiding_variable(platform, mine, environ)):
            hidden.append(f"{variable}={environ[variable]!r} hides {count(mine)}")
            visible = [device for device in visible if device not in mine]
    return visible, hidden


def _hiding_variable(platform: str, devices: Sequence[Device], environ: Mapping[str, str]) -> str | None:
    """Return the variable that hides all of a platform's devices, or None.

    As in the runtimes, the list ends at its first entry that is no device. HIP obeys CUDA_VISIBLE_DEVICES unless its
    own variable is set. HIP's runtime takes an empty list for none at all; here it means what it says.
    """
    for name in _HIDING[platform]:
        if name not in environ or (name.startswith("CUDA") and platform == "rocm" and "HIP_VISIBLE_DEVICES" in environ):
            continue
        first = environ[name].split(",")[0].strip()
        number = int(first) if first.removeprefix("-").isdecimal() else None  # else it is a UUID
        # Windows does not tell WSL how many there are.
        beyond = number is not None and number >= len(devices) and not any(d.facts.get("wsl") for d in devices)
        if not first or (number is not None and number < 0) or beyond:
            return name
    return None


def _choose(devices: Sequence[Device], build: str | None) -> tuple[str, list[str]]:
    """Return the platform, and why each other kind of device did not decide it."""
    chosen, notes = "cpu", []
    for platform in ORDER:
        mine = [device for device in devices if _PLATFORM_OF[device.kind] == platform]
        if not mine:
            continue
        if all(device.integrated for device in mine) and not torch_build.suits(build, platform):
            notes.append(f"{count(mine)} is left alone: ATTN_DISPATCH_PLATFORM={platform} uses it")
        elif chosen == "cpu":
            chosen = platform
        else:
            notes.append(f"{count(mine)} is here too: ATTN_DISPATCH_PLATFORM={platform} uses it")
    return chosen, notes


def _mismatch(platform: str, build: str | None, devices: Sequence[Device]) -> list[str]:
    """Say so when the installed torch cannot use the platform's devices."""
    if build is None or platform not in _TORCH_BUILDS or torch_build.suits(build, platform):
        return []
    mine = count(device for device in devices if _PLATFORM_OF[device.kind] == platform)
    text = (
        f"the installed torch is a {build} build and cannot use {mine}: install torch's {_TORCH_BUILDS[platform]} build"
    )
    for other in _TORCH_BUILDS:
        if torch_build.suits(build, other) and any(_PLATFORM_OF[device.kind] == other for device in devices):
            text += f", or set ATTN_DISPATCH_PLATFORM={other} for what it was built for"
    return [text]


def _description(processor: cpu.Cpu, devices: Sequence[Device], hidden: Sequence[str]) -> str:
    text = str(processor)
    if devices:
        driver = devices[0].facts.get("driver")
        text = f"{count(devices)}{f' (driver {driver})' if driver else ''} on {text}"
    return "; ".join([text, *hidden])


def _fingerprint(platform: str, processor: cpu.Cpu, devices: Sequence[Device]) -> str:
    parts = [platform, processor.machine, processor.model, *processor.isa, str(processor.usable), *map(str, devices)]
    # Not a cryptographic hash: importing hashlib takes longer than everything else here.
    return format(zlib.crc32("\n".join(parts).encode()), "08x")
