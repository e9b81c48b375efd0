"""The processor, what of it this process may use, and which build of torch is installed."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attn_dispatch.hardware.files import Files

__all__ = ["host_facts", "torch_flavor"]

# The flags that decide which kernels a CPU can run, in ascending order of what they are worth.
_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
        "amx_tile", "amx_int8", "amx_bf16", "neon", "bf16", "i8mm", "sve", "sve2")  # fmt: skip
_ARM_NAMES = {"asimd": "neon", "svebf16": "bf16"}


def host_facts(files: Files) -> dict[str, Any]:
    """Return the facts of a machine that are not its accelerators'; keys as in `Platform.facts`."""
    here = files.is_here
    model, flags, listed = _processor(files)
    release = files.text("proc/sys/kernel/osrelease", 256) or files.text("proc/version", 256)
    return {
        "system": sys.platform if here else "linux",
        "machine": platform.machine() if here else _machine(flags),
        "cpu_model": model or (platform.processor() if here else ""),
        "cpu_flags": sorted(flags),
        "isa": [flag for flag in _ISA if flag in flags],
        "cpu_count": _cpu_count(files, listed),
        "memory_bytes": _memory(files),
        "wsl": "microsoft" in release.lower(),
    }


def _processor(files: Files) -> tuple[str, set[str], int]:
    """Return the processor's name, its flags, and how many of it there are."""
    # The first entry tells everything, and flags make each several kilobytes long: a large host has hundreds.
    text = files.text("proc/cpuinfo", 1 << 14)
    first: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() and first:
            break
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    flags = set((first.get("flags") or first.get("Features") or "").split())
    flags |= {new for old, new in _ARM_NAMES.items() if old in flags}
    online = files.text("sys/devices/system/cpu/online", 4096)
    count = sum(int(b or a) - int(a) + 1 for a, b in re.findall(r"(\d+)(?:-(\d+))?", online))
    return first.get("model name") or first.get("CPU implementer", ""), flags, count or text.count("processor\t:") or 1


def _machine(flags: set[str]) -> str:
    return "aarch64" if "neon" in flags else "x86_64"


def _cpu_count(files: Files, listed: int) -> int:
    """Return how many cores this process may use: its affinity, and no more than its cgroup's quota."""
    count = listed
    if files.is_here:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(files)
    return max(1, min(count, round(quota))) if quota else count


def _quota(files: Files) -> float | None:
    """Return the cores that the cgroup grants, or None."""
    words = files.text("sys/fs/cgroup/cpu.max", 64).split()
    if not words:
        folder = "sys/fs/cgroup/cpu"
        words = [files.text(f"{folder}/cpu.cfs_quota_us", 64), files.text(f"{folder}/cpu.cfs_period_us", 64)]
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
        return int(words[0]) / int(words[1])
    return None


def _memory(files: Files) -> int:
    """Return the bytes of memory that this process may use (0: not known)."""
    found = re.search(r"MemTotal:\s*(\d+) kB", files.text("proc/meminfo", 4096))
    total = int(found[1]) * 1024 if found else 0
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = files.text(path, 64)
        if limit.isdecimal() and 0 < int(limit) < total:
            return int(limit)
    return total


def torch_flavor(search: Iterable[str], files: Files) -> str | None:
    """Return which build of torch is installed, read from its version file: importing it would take seconds."""
    for folder in search:
        file = Path(folder or ".") / "torch" / "version.py"
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            files.problems.append(f"{file} could not be read: {error.strerror or error}")
            continue
        version = re.search(r"__version__\s*=\s*['\"]([^'\"]*)['\"]", text)
        local = version[1].partition("+")[2] if version else ""
        for key, name in (("cuda", "cu"), ("hip", "rocm"), ("xpu", "xpu")):
            value = re.search(rf"^{key}[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
            if value:
                short = value[1].replace(".", "") if key == "cuda" else ".".join(value[1].split(".")[:2])
                return local if local.startswith(name) else f"{name}{'' if key == 'xpu' else short}"
        return "cpu"
    return None
