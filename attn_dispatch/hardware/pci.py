"""The PCI bus: which functions of the makers that matter are on it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .system_root import SystemRoot

__all__ = ["FOLDER", "Function", "scan"]

FOLDER = "sys/bus/pci/devices"


class Function(NamedTuple):  # half as long to import as a dataclass
    """One PCI function; ids as the kernel writes them, `0x10de`."""

    slot: str
    vendor: str
    device: str
    subsystem: str
    pci_class: str

    @property
    def id(self) -> str:
        """Vendor and device, as `lspci -n` writes them."""
        return f"{self.vendor.removeprefix('0x')}:{self.device.removeprefix('0x')}"


def scan(root: SystemRoot, vendors: Collection[str]) -> list[Function]:
    """Return the functions of some vendors, by address.

    A server has hundreds of functions: only the vendor is read of those that do not matter.
    """
    functions = []
    for slot in root.names(FOLDER):
        folder = f"{FOLDER}/{slot}"
        vendor = root.word(f"{folder}/vendor").lower()
        if vendor in vendors:
            device, subsystem, pci_class = (
                root.word(f"{folder}/{name}").lower() for name in ("device", "subsystem_device", "class")
            )
            functions.append(Function(slot, vendor, device, subsystem, pci_class))
    return functions
