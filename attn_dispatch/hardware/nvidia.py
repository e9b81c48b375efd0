"""NVIDIA GPUs: the driver's device nodes, Windows' GPUs seen from WSL, and Tegra (Jetson)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from . import wsl
from .device import Device
from .pci import Function
from .system_root import SystemRoot

__all__ = ["VENDOR", "driver", "find"]

VENDOR = "0x10de"

# CUDA's, which only Windows' NVIDIA driver brings.
_WSL_LIBRARIES = ("usr/lib/wsl/lib/libcuda.so.1", "usr/lib/wsl/lib/libcuda.so")
# The nodes of the GPU inside a Tegra, newest first. (Its /dev/nvidia0 may be the display's.)
_TEGRA_NODES = ("dev/nvgpu/igpu0/ctrl", "dev/nvhost-ctrl-gpu", "dev/nvhost-gpu")
# "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.216.03  ...", "... Open Kernel Module for x86_64  580.95.05  ..."
_VERSION = re.compile(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)\s")
_DISPLAY_CLASS = "0x03"


def driver(root: SystemRoot) -> str | None:
    """Return the version of the loaded kernel driver, if there is one."""
    text = root.read("proc/driver/nvidia/version")
    match = _VERSION.search(text) if text else None
    return match[1] if match else None


def find(root: SystemRoot, functions: Iterable[Function]) -> list[Device]:
    """Return the NVIDIA GPUs that this process can open."""
    if (jetson := _tegra(root)) is not None:
        return jetson
    version = driver(root)
    by_node = dict(_described(root))
    devices = [_device(root, node, by_node.get(node, {}), version) for node in root.numbered("dev", "nvidia")]
    devices = devices or wsl.find(root, "nvidia", _WSL_LIBRARIES)
    cards = [f for f in functions if f.vendor == VENDOR and f.pci_class.startswith(_DISPLAY_CLASS)]
    if cards and not devices:
        root.problems.append(
            f"NVIDIA GPU {cards[0].id} at {cards[0].slot}: no /dev/nvidia* here to open it through. "
            "Install its driver, or give the container its devices (--gpus all)"
        )
    return devices


def _described(root: SystemRoot) -> Iterable[tuple[str, dict[str, str]]]:
    """Yield the device node of each GPU that the driver describes, and the description."""
    folder = "proc/driver/nvidia/gpus"
    for index, slot in enumerate(root.names(folder)):
        text = root.read(f"{folder}/{slot}/information") or ""
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
        yield f"nvidia{facts.get('Device Minor', index)}", {**facts, "slot": slot}


def _device(root: SystemRoot, node: str, described: dict[str, str], version: str | None) -> Device:
    facts = {"node": f"/dev/{node}"}
    if slot := described.get("slot"):
        facts["slot"] = slot
        if device := root.word(f"sys/bus/pci/devices/{slot}/device"):
            facts["pci"] = f"10de:{device.removeprefix('0x')}"
    if version:
        facts["driver"] = version
    facts |= root.access(f"dev/{node}", "Ask for the permission, or for the group that has it")
    return Device("nvidia", described.get("Model") or "GPU", f"/dev/{node}", facts)


def _tegra(root: SystemRoot) -> list[Device] | None:
    """Return the GPU of a Jetson board, or None on any other machine and on a board that has the nodes of a card."""
    compatible = (root.read("proc/device-tree/compatible") or "").split("\0")
    release = root.read("etc/nv_tegra_release")
    chip = next((name.removeprefix("nvidia,") for name in compatible if name.startswith("nvidia,tegra")), None)
    if chip is None and release is None:
        return None
    node = next((name for name in _TEGRA_NODES if root.exists(name)), None)
    if node is None and root.numbered("dev", "nvidia"):
        return None
    if node is None:
        root.problems.append(
            f"{chip or 'Tegra'}: none of /{', /'.join(_TEGRA_NODES)} is here. Run the container with --runtime nvidia"
        )
        return []
    facts = {"node": f"/{node}", "soc": chip or "tegra", **root.access(node, "Add the user to the group video")}
    # The first line: "# R36 (release), REVISION: 4.3, GCID: ..."
    if release and (match := re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release)):
        facts["l4t"] = f"{match[1]}.{match[2]}"
    name = root.word("proc/device-tree/model") or f"NVIDIA {facts['soc']}"
    evidence = f"/proc/device-tree/compatible: nvidia,{chip}" if chip else "/etc/nv_tegra_release"
    return [Device("nvidia", name, f"/{node} with {evidence}", facts)]
