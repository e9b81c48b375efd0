"""TPUs: Google's PCI functions with a device id of a TPU.

Google's vendor id alone says nothing (the network card of its virtual machines has it too), nor do `/dev/vfio` (any
device passed to user space) and `/dev/accel/` (NPUs of laptops). Ids: jax/_src/hardware_utils.py and tpu_info.
"""

from __future__ import annotations

from collections.abc import Iterable

from .device import Device
from .pci import FOLDER, Function
from .system_root import SystemRoot

__all__ = ["VENDOR", "find"]

VENDOR = "0x1ae0"

_GENERATIONS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x"}
_V2_OR_V3 = "0x0027"  # they share a device id
_BY_SUBSYSTEM = {"0x004e": "v2", "0x004f": "v3"}


def find(root: SystemRoot, functions: Iterable[Function]) -> list[Device]:
    """Return the TPUs that this process can open."""
    nodes = root.numbered("dev", "accel")
    chips = [(function, name) for function in functions if (name := _generation(function))]
    if chips and not nodes and not root.numbered("dev/vfio", "") and not root.names("dev/vfio/devices"):
        root.problems.append(
            f"{len(chips)}x TPU {chips[0][1]}: no /dev/accel* and no /dev/vfio/* here to open it through. "
            "Give the container its devices (--privileged)"
        )
        return []
    if chips:
        return [_device(function, name) for function, name in chips]
    return [
        Device("tpu", "of unknown generation", f"/dev/{node} of vendor {VENDOR}", {"node": f"/dev/{node}"})
        for node in nodes
        if root.word(f"sys/class/accel/{node}/device/vendor").lower() == VENDOR
    ]


def _generation(function: Function) -> str | None:
    if function.vendor != VENDOR:
        return None
    if function.device == _V2_OR_V3:
        return _BY_SUBSYSTEM.get(function.subsystem, "v2 or v3")
    return _GENERATIONS.get(function.device)


def _device(function: Function, name: str) -> Device:
    evidence = f"/{FOLDER}/{function.slot}: vendor {function.vendor}, device {function.device}"
    return Device("tpu", name, evidence, {"generation": name, "pci": function.id, "slot": function.slot})
