"""Detection: which platform this machine is, and everything that its files say about it."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import amd, cpu, intel, nvidia, pci, torch_build, tpu, wsl
from .device import Device, describe
from .platforms import NAMES, PLATFORMS, Hardware, by_kind, by_name
from .system_root import SystemRoot

__all__ = ["Platform", "detect"]


@dataclass(frozen=True)
class Platform:
    """What a machine is.

    Attributes:
        name: one of `platforms.NAMES`.
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

    @property
    def torch_device(self) -> str:
        """The type of the devices on which the installed torch computes here: "cuda", "xpu" or "cpu".

        "cpu" where torch was built for other hardware, or where this user may not open the platform's devices.
        """
        row = by_name(self.name)
        devices = [device for device in self.devices if device.kind == row.device_kind]
        build = self.facts.get("torch_flavor")
        unusable = build is not None and not torch_build.suits(build, self.name)
        closed = devices and not any(device.openable for device in devices)
        return "cpu" if unusable or closed else row.torch_device


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
    files = SystemRoot(root)
    if search is None:
        search = [os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)] if files.live else ()
    processor = cpu.read(files, environ)
    build = torch_build.flavor(files, search)
    installed = _devices(files)
    devices, hidden = _visible(installed, environ)
    name, notes = _choose(devices, build)
    if not installed and files.exists(wsl.NODE):
        notes.append(
            f"Windows shares a GPU (/{wsl.NODE}), but no library to compute on it: neither CUDA's, which comes "
            "with Windows' NVIDIA driver, nor ROCm's librocdxg"
        )
    deciding = _of(by_name(name), devices)
    drivers = {"nvidia": nvidia.driver(files), "amd": amd.driver(files)}
    facts = {
        "system": sys.platform if files.live else "linux",
        "machine": processor.machine,
        "wsl": "microsoft" in files.word("proc/sys/kernel/osrelease").lower(),
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
        "problems": [*dict.fromkeys(files.problems), *_mismatch(name, build, devices)],
        "hidden": hidden,
        "notes": notes,
        "fingerprint": _fingerprint(name, processor, deciding),
    }
    return Platform(name, _description(processor, deciding, hidden), facts, tuple(devices))


def _devices(files: SystemRoot) -> list[Device]:
    functions = pci.scan(files, (tpu.VENDOR, nvidia.VENDOR, amd.VENDOR))
    return [
        *tpu.find(files, functions),
        *nvidia.find(files, functions),
        *amd.find(files, functions),
        *intel.find(files),
    ]


def _of(hardware: Hardware, devices: Iterable[Device]) -> list[Device]:
    """Return the devices of one kind of hardware."""
    return [device for device in devices if device.kind == hardware.device_kind]


def _visible(devices: Sequence[Device], environ: Mapping[str, str]) -> tuple[list[Device], list[str]]:
    """Return the devices that no variable hides, and what hides the others."""
    visible, hidden = list(devices), []
    for hardware in PLATFORMS:
        matching = _of(hardware, devices)
        if matching and (variable := _hiding_variable(hardware, matching, environ)):
            hidden.append(f"{variable}={environ[variable]!r} hides {describe(matching)}")
            visible = [device for device in visible if device not in matching]
    return visible, hidden


def _hiding_variable(hardware: Hardware, devices: Sequence[Device], environ: Mapping[str, str]) -> str | None:
    """Return the variable that hides all of a platform's devices, or None.

    As in the runtimes, the list ends at its first entry that is no device. HIP's runtime takes an empty list for none
    at all; here it means what it says.
    """
    for group in hardware.hiding_variables:
        name = next((name for name in group if name in environ), None)
        if name is None:
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
    chosen, notes = NAMES[-1], []
    for hardware in PLATFORMS:
        matching = _of(hardware, devices)
        if not matching:
            continue
        use = f"ATTN_DISPATCH_PLATFORM={hardware.name} uses it"
        if all(device.integrated for device in matching) and not torch_build.suits(build, hardware.name):
            notes.append(f"{describe(matching)} is left alone: {use}")
        elif chosen == NAMES[-1]:
            chosen = hardware.name
        else:
            notes.append(f"{describe(matching)} is here too: {use}")
    return chosen, notes


def _mismatch(platform: str, build: str | None, devices: Sequence[Device]) -> list[str]:
    """Say so when the installed torch cannot use the platform's devices."""
    hardware = by_name(platform)
    if build is None or not hardware.torch_build or torch_build.suits(build, platform):
        return []
    text = (
        f"the installed torch is a {build} build and cannot use {describe(_of(hardware, devices))}: "
        f"install torch's {hardware.torch_build} build"
    )
    for other in dict.fromkeys(by_kind(device.kind).name for device in devices):
        if torch_build.suits(build, other):
            text += f", or set ATTN_DISPATCH_PLATFORM={other} for what it was built for"
    return [text]


def _description(processor: cpu.Cpu, devices: Sequence[Device], hidden: Sequence[str]) -> str:
    text = str(processor)
    if devices:
        driver = devices[0].facts.get("driver")
        text = f"{describe(devices)}{f' (driver {driver})' if driver else ''} on {text}"
    return "; ".join([text, *hidden])


def _fingerprint(platform: str, processor: cpu.Cpu, devices: Sequence[Device]) -> str:
    parts = [platform, processor.machine, processor.model, *processor.isa, str(processor.usable), *map(str, devices)]
    # Not a cryptographic hash: importing hashlib takes longer than everything else here.
    return format(zlib.crc32("\n".join(parts).encode()), "08x")
