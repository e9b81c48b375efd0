"""AMD GPUs: the nodes of the compute driver's topology that have vector units.

`/dev/kfd` alone says nothing: machines whose GPU it cannot drive have it too, with nodes for their CPUs only. The
topology alone is not enough either: a container sees the host's, whatever devices it was given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from . import wsl
from .device import Device, describe
from .pci import Function
from .system_root import SystemRoot

__all__ = ["VENDOR", "driver", "find", "target"]

VENDOR = "0x1002"

_NODES = "sys/class/kfd/kfd/topology/nodes"
# What Instinct cards call themselves: "processing accelerator", or "display controller" that is not VGA's.
_ACCELERATOR_CLASSES = ("0x12", "0x0380")
# ROCm's bridge to Windows' driver.
_WSL_LIBRARIES = ("opt/rocm/lib/librocdxg.so", "opt/rocm/lib/librocdxg.so.1")

# Targets that LLVM's AMDGPU user guide lists as APU: GPUs that are a part of a CPU.
# fmt: off
_APUS = frozenset({
    "gfx700", "gfx703", "gfx705", "gfx801", "gfx810", "gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035",
    "gfx1036", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153",
})
# fmt: on


def driver(root: SystemRoot) -> str | None:
    """Return the version of the kernel driver, where it is not the kernel's own."""
    return root.word("sys/module/amdgpu/version") or None


def target(version: int) -> str:
    """Return the compiler's name for a GPU: 90402 is gfx942 (major, minor, stepping; the last two hexadecimal)."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def find(root: SystemRoot, functions: Iterable[Function]) -> list[Device]:
    """Return the AMD GPUs that this process can open."""
    version = driver(root)
    nodes = root.names(_NODES)
    devices = [device for node in nodes if (device := _device(root, node, version)) is not None]
    if not root.exists("dev/kfd"):
        _report_missing_node(root, devices, functions)
        return wsl.find(root, "amd", _WSL_LIBRARIES)
    if devices:
        access = root.access("dev/kfd", "Add the user to the group render")
        return [replace(device, facts={**device.facts, **access}) for device in devices]
    if nodes:
        root.problems.append(f"/dev/kfd: none of its {len(nodes)} nodes has simd_count > 0, so there is no GPU to use")
    return []


def _report_missing_node(root: SystemRoot, devices: Iterable[Device], functions: Iterable[Function]) -> None:
    """Say so when the driver or the PCI bus shows a card that cannot be opened (an integrated GPU is not missed)."""
    card = describe(device for device in devices if not device.integrated)
    for function in functions:
        if not card and function.vendor == VENDOR and function.pci_class.startswith(_ACCELERATOR_CLASSES):
            card = f"AMD GPU {function.id} at {function.slot}"
    if card:
        root.problems.append(
            f"{card}: no /dev/kfd here to open it through. Load the amdgpu driver, or give the container its devices "
            "(--device /dev/kfd --device /dev/dri)"
        )


def _device(root: SystemRoot, node: str, version: str | None) -> Device | None:
    name = f"{_NODES}/{node}/properties"
    text = root.read(name)
    if text is None:
        return None
    values: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        try:
            values[key] = int(value)
        except ValueError:
            root.problems.append(f"/{name}: {line!r} is not a name and a number")
    if values.get("simd_count", 0) <= 0:
        return None
    gfx = target(values.get("gfx_target_version", 0))
    facts = {"gfx": gfx, "integrated": "yes" if gfx in _APUS else "no"}
    facts |= {key: str(values[key]) for key in ("simd_count", "wave_front_size", "lds_size_in_kb") if key in values}
    if "device_id" in values:
        facts["pci"] = f"{values.get('vendor_id', int(VENDOR, 16)):04x}:{values['device_id']:04x}"
    if "location_id" in values:
        address = values["location_id"]
        bus, device, function = address >> 8 & 0xFF, address >> 3 & 0x1F, address & 7
        facts["slot"] = f"{values.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"
    if minor := values.get("drm_render_minor"):
        facts["node"] = f"/dev/dri/renderD{minor}"
    if version:
        facts["driver"] = version
    return Device("amd", gfx, f"/{name}: simd_count {values['simd_count']}", facts)
