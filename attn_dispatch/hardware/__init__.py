"""What machine is this: from files of the operating system, with the standard library alone.

No vendor is imported, no device is opened, no process is started, so that asking is safe before `fork` and costs a
millisecond or two. An installed library is no evidence of hardware: a machine with libtpu or a CUDA build of torch and no
such device is a CPU machine. What could not be read is kept in `facts["problems"]`.

A machine can be given as a folder with its /dev, /proc, /sys and /etc files: that is how machines are tested that are not
at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attn_dispatch.hardware.accelerators import PLATFORM_OF, Device, accelerators
from attn_dispatch.hardware.files import Files
from attn_dispatch.hardware.host import host_facts, torch_flavor

__all__ = ["Device", "Platform", "detect"]

# Where a machine has several kinds, the first is what it is: a host is rented for its accelerator, dearest first.
ORDER = ("tpu", "cuda", "rocm", "xpu", "cpu")

_TORCH_FOR = {"cuda": "cu", "rocm": "rocm", "xpu": "xpu"}


@dataclass(frozen=True)
class Platform:
    """A machine.

    Attributes:
        name: "cpu", "cuda", "rocm", "xpu" or "tpu".
        description: one line for people.
        facts: plain values (they can be written as JSON):
            system, machine: "linux", "x86_64".
            cpu_model, cpu_flags, isa: the processor; `isa` are the flags that decide about kernels.
            cpu_count: what this process may use (affinity and cgroup quota).
            memory_bytes: what it may use (cgroup limit).
            wsl: whether this is Windows' Linux.
            torch_flavor: of an installed torch, read from its text: "cpu", "cu130", "rocm6.4", "xpu", or None.
            devices: the accelerators, as dictionaries.
            hidden: accelerators that an environment variable hides from this process.
            problems: what could not be read, and what does not fit together, in words.
            fingerprint: changes when anything changes that a measurement depends on.
        devices: accelerators that this process may use.
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
    """Say what a machine is.

    Args:
        root: the folder that holds its files; "/" is this machine.
        environ: instead of this process's variables (device visibility).
        search: folders in which an installed torch is looked for (default: `sys.path` on this machine, none elsewhere).
    """
    files = Files(root)
    environ = os.environ if environ is None else environ
    facts = host_facts(files)
    found, hidden = accelerators(files, environ)
    # An integrated GPU is listed, but a laptop does not become another platform by it.
    usable = [device for device in found if device.facts.get("integrated") != "yes"]
    names = {PLATFORM_OF[device.kind] for device in usable}
    name = next((platform for platform in ORDER if platform in names), "cpu")
    paths = (sys.path if files.is_here else ()) if search is None else search
    flavor = torch_flavor(paths, files)
    problems = [*files.problems, *_mismatch(name, flavor)]
    facts |= {
        "torch_flavor": flavor,
        "devices": [asdict(device) for device in found],
        "hidden": hidden,
        "problems": problems,
    }
    facts["fingerprint"] = _fingerprint(facts)
    return Platform(name, _describe(name, facts, usable, hidden), facts, tuple(found))


def _mismatch(name: str, flavor: str | None) -> list[str]:
    """Say so when the installed torch cannot use the accelerator that is here."""
    wanted = _TORCH_FOR.get(name)
    if wanted is None or flavor is None or flavor.startswith(wanted):
        return []
    build = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU"}[name]
    return [f"the installed torch is a {flavor} build and cannot use this {name} device: install torch's {build} build"]


def _describe(name: str, facts: Mapping[str, Any], devices: list[Device], hidden: list[str]) -> str:
    own = [device for device in devices if PLATFORM_OF[device.kind] == name]
    parts = []
    if own:
        counts = {label: sum(d.name == label for d in own) for label in dict.fromkeys(d.name for d in own)}
        parts.append(", ".join(f"{n}x {label}" for label, n in counts.items()))
        if driver := own[0].facts.get("driver"):
            parts.append(f"driver {driver}")
    memory = facts["memory_bytes"]
    cores = "1 core" if facts["cpu_count"] == 1 else f"{facts['cpu_count']} cores"
    parts.append(f"{facts['cpu_model'] or facts['machine']}, {cores}")
    if facts["isa"]:
        parts.append(" ".join(facts["isa"]))
    if memory:
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(parts) + (f" ({'; '.join(hidden)})" if hidden else "")


def _fingerprint(facts: Mapping[str, Any]) -> str:
    parts = [facts[key] for key in ("system", "machine", "cpu_model", "isa", "cpu_count", "devices", "torch_flavor")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
