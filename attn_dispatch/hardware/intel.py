"""Intel GPUs: render nodes of the xe and i915 drivers, and whether the GPU is a card or a part of the CPU.

A card is told by its PCI id (the discrete families of the kernel's include/drm/intel/pciids.h) or, for one that is
newer than that list, by its address: an integrated GPU sits on bus 0, a card behind a bridge.
"""

from __future__ import annotations

from dataclasses import replace

from .device import Device
from .system_root import SystemRoot

__all__ = ["find"]

_DRM = "sys/class/drm"
_VENDOR = "0x8086"
_DRIVERS = ("xe", "i915")

_CARDS = {
    "DG1": "4905 4906 4907 4908 4909",
    "DG2": "5690 5691 5692 5693 5694 5695 5696 5697 56a0 56a1 56a2 56a3 56a4 56a5 56a6 "
    "56b0 56b1 56b2 56b3 56ba 56bb 56bc 56bd 56be 56bf",
    "ATS-M": "56c0 56c1 56c2",
    "PVC": "0b69 0b6e 0bd4 0bd5 0bd6 0bd7 0bd8 0bd9 0bda 0bdb 0be0 0be1 0be5",
    "BMG": "e202 e209 e20b e20c e20d e210 e211 e212 e216 e220 e221 e222 e223",
    "CRI": "674c 674d 674e 674f 6750",
}
_FAMILIES = {device: family for family, devices in _CARDS.items() for device in devices.split()}


def find(root: SystemRoot) -> list[Device]:
    """Return the Intel GPUs that this process can open, integrated ones too."""
    devices = []
    for node in root.numbered(_DRM, "renderD"):
        if root.word(f"{_DRM}/{node}/device/vendor").lower() != _VENDOR:
            continue
        # DRIVER=xe, PCI_ID=8086:E20B, PCI_SLOT_NAME=0000:03:00.0
        text = root.read(f"{_DRM}/{node}/device/uevent") or ""
        facts = {key: value for key, _, value in (line.partition("=") for line in text.splitlines())}
        driver = facts.get("DRIVER", "")
        if driver not in _DRIVERS:
            continue
        device = _device(node, driver, facts.get("PCI_ID", "").lower(), facts.get("PCI_SLOT_NAME", ""))
        if root.exists(f"dev/dri/{node}"):
            access = root.access(f"dev/dri/{node}", "Add the user to the group render")
            devices.append(replace(device, facts={**device.facts, **access}))
        elif not device.integrated:
            root.problems.append(
                f"{device}: no /dev/dri/{node} here to open it through. "
                "Give the container its device (--device /dev/dri)"
            )
    return devices


def _device(node: str, driver: str, pci: str, slot: str) -> Device:
    family = _FAMILIES.get(pci.partition(":")[2])
    # Without an address nothing says that it is a card: it is then no reason to leave the CPU.
    bus = slot.split(":")[1] if slot.count(":") == 2 else "00"
    facts = {
        "pci": pci,
        "slot": slot,
        "driver": driver,
        "node": f"/dev/dri/{node}",
        "integrated": "no" if family or bus != "00" else "yes",
    }
    if family:
        facts["family"] = family
    return Device(
        "intel-gpu", pci or "of unknown id", f"/{_DRM}/{node}/device: vendor {_VENDOR}, driver {driver}", facts
    )
