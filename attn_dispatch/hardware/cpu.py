"""The CPU: model, instruction sets, and how much of it and of the memory this process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .limits import cpu_quota, memory_limit_bytes
from .system_root import SystemRoot

__all__ = ["Cpu", "read"]

# Flags of /proc/cpuinfo that kernels are chosen by. `neon` is what 64-bit ARM calls `asimd`.
# fmt: off
_X86 = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
)
_ARM = ("neon", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svebf16", "sme")
# fmt: on

# For people: the widest that is there, then what matters to attention besides.
_WIDTHS = {"avx512f": "AVX-512", "avx2": "AVX2", "sve2": "SVE2", "sve": "SVE", "neon": "NEON"}
_EXTRAS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "BF16"}

# ARM gives numbers only: parts of implementer 0x41 that servers and boards have (util-linux, lscpu-arm.c).
_ARM_PARTS = {
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd83": "Neoverse-V3AE",
    "0xd84": "Neoverse-V3",
}

_GIB = 1 << 30
# One processor's block has about 3 KB; the kernel writes no more blocks than are asked for.
_CPUINFO_BYTES = 8192


class Cpu(NamedTuple):  # half as long to import as a dataclass
    """What the CPU is and what of it this process may use.

    Attributes:
        machine: architecture, as the operating system says it (`x86_64`, `aarch64`); empty when nothing tells.
        model: its name; empty when nothing tells.
        flags: every flag, sorted; empty where no file tells (outside Linux).
        isa: of those flags, the ones that kernels are chosen by.
        usable: CPUs that this process may use: affinity and quota.
        online: CPUs that the machine has switched on.
        quota: CPUs' worth of time that the control group allows, or None.
        memory_bytes: memory that this process may use, or None when nothing tells.
    """

    machine: str
    model: str
    flags: tuple[str, ...]
    isa: tuple[str, ...]
    usable: int
    online: int
    quota: float | None
    memory_bytes: int | None

    def __str__(self) -> str:
        parts = [self.model or self.machine or "unknown CPU"]
        parts.append("1 CPU" if self.usable == 1 else f"{self.usable} CPUs")
        if self.usable < self.online:
            parts[-1] += f" of {self.online}"
        parts += [name for flag, name in _WIDTHS.items() if flag in self.isa][:1]
        parts += [name for flag, name in _EXTRAS.items() if flag in self.isa]
        if self.memory_bytes is not None:
            parts.append(f"{self.memory_bytes / _GIB:.0f} GiB")
        return ", ".join(parts)


def read(root: SystemRoot, environ: Mapping[str, str]) -> Cpu:
    """Return the CPU of a machine; where a file is missing and the machine is this one, Python is asked instead."""
    block = (root.read("proc/cpuinfo", _CPUINFO_BYTES) or "").lstrip().partition("\n\n")[0]
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
    flags = tuple(sorted({*info.get("flags", "").split(), *info.get("Features", "").split()}))
    machine = _machine(root, info, environ)
    online = _cpus_in(root.word("sys/devices/system/cpu/online")) or (root.live and os.cpu_count()) or 1
    allowed = _affinity(root) or online
    quota = cpu_quota(root)
    # Rounded down: a thread more than the quota allows is stopped for a part of every period, and all wait for it.
    usable = allowed if quota is None else max(1, min(allowed, int(quota)))
    limits = [limit for limit in (_memory_bytes(root), memory_limit_bytes(root)) if limit is not None]
    return Cpu(
        machine=machine,
        model=info.get("model name") or _arm_model(root, info),
        flags=flags,
        isa=_isa(flags, machine),
        usable=usable,
        online=online,
        quota=quota,
        memory_bytes=min(limits, default=None),
    )


def _machine(root: SystemRoot, info: Mapping[str, str], environ: Mapping[str, str]) -> str:
    if root.live:
        # Not `platform.machine()`: it takes longer than all else here, and on Windows it asks a service.
        return os.uname().machine if hasattr(os, "uname") else environ.get("PROCESSOR_ARCHITECTURE", "")
    if architecture := root.word("proc/sys/kernel/arch"):
        return architecture
    if "flags" in info:
        return "x86_64"
    return "aarch64" if "asimd" in info.get("Features", "").split() else ""


def _arm_model(root: SystemRoot, info: Mapping[str, str]) -> str:
    board = root.word("proc/device-tree/model")
    implementer, part = info.get("CPU implementer"), info.get("CPU part", "")
    if implementer is None:
        return board
    core = _ARM_PARTS.get(part) if implementer == "0x41" else None
    name = f"ARM {core}" if core else f"ARM implementer {implementer} part {part}"
    return f"{board} ({name})" if board else name


def _isa(flags: Iterable[str], machine: str) -> tuple[str, ...]:
    known = set(flags)
    if known & {"asimd"} or (not known and machine in ("arm64", "aarch64", "ARM64")):
        known.add("neon")  # no 64-bit ARM that runs Python lacks it
    names = _X86 if machine.lower() in ("x86_64", "amd64", "i686", "i386") else _ARM
    return tuple(name for name in names if name in known)


def _affinity(root: SystemRoot) -> int:
    """Return how many CPUs this process may run on, or 0 when nothing tells."""
    if root.live:
        return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
    for line in (root.read("proc/self/status") or "").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return _cpus_in(line.partition(":")[2])
    return 0


def _cpus_in(text: str) -> int:
    """Return how many CPUs a list such as `0-3,8` has."""
    total = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            total += max(0, int(last or first) - int(first) + 1)
    return total


def _memory_bytes(root: SystemRoot) -> int | None:
    for line in (root.read("proc/meminfo", 256) or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal" and (kib := value.removesuffix("kB").strip()).isdecimal():
            return int(kib) * 1024
    if root.live and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
