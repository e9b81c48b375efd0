"""What a container was given: the CPU quota and the memory limit of this process's control group (v1 and v2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .system_root import SystemRoot

__all__ = ["cpu_quota", "memory_limit_bytes"]

_MOUNT = "sys/fs/cgroup"
# Where /proc does not tell (gVisor): what is mounted is then taken for the process's own.
_UNKNOWN = "2:memory:/\n1:cpu:/\n0::/\n"
# v1 writes "no limit" as the largest number of pages that fits.
_NO_LIMIT_BYTES = 1 << 60


def cpu_quota(root: SystemRoot) -> float | None:
    """Return how many CPUs' worth of time the process may use, or None without a quota."""
    quotas = []
    for folder in _folders(root, "cpu"):
        # v2: "150000 100000" or "max 100000"; v1: two files, -1 for no quota.
        if text := root.word(f"{folder}/cpu.max"):
            quota, _, period = text.partition(" ")
        else:
            quota, period = root.word(f"{folder}/cpu.cfs_quota_us"), root.word(f"{folder}/cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit_bytes(root: SystemRoot) -> int | None:
    """Return how much memory the process's group may use, or None without a limit."""
    limits = []
    for folder in _folders(root, "memory"):
        text = root.word(f"{folder}/memory.max") or root.word(f"{folder}/memory.limit_in_bytes")
        if text.isdecimal() and int(text) < _NO_LIMIT_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def _folders(root: SystemRoot, controller: str) -> Iterator[str]:
    """Yield the folders whose limits hold: the process's own group and every one above it.

    In a container the path in /proc/self/cgroup may be the host's, of which only the last folder is mounted, as the
    root: that is why the walk goes up to the mount itself.
    """
    for line in (root.read("proc/self/cgroup") or _UNKNOWN).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            yield from _upwards((_MOUNT, f"{_MOUNT}/unified"), group)
        elif controller in controllers.split(","):
            yield from _upwards(dict.fromkeys((f"{_MOUNT}/{controllers}", f"{_MOUNT}/{controller}")), group)


def _upwards(mounts: Iterable[str], group: str) -> Iterator[str]:
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for mount in mounts:
        for depth in range(len(parts), -1, -1):
            yield "/".join([mount, *parts[:depth]])
