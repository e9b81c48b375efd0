"""GPUs of Windows, seen from WSL: one device node for all of them, and what a maker's driver or bridge brings."""

from __future__ import annotations

from collections.abc import Iterable

from .device import Device
from .system_root import SystemRoot

__all__ = ["NODE", "find"]

NODE = "dev/dxg"


def find(root: SystemRoot, kind: str, libraries: Iterable[str]) -> list[Device]:
    """Return the GPU behind Windows' driver where one of a maker's libraries is; its model is not told."""
    if not root.exists(NODE):
        return []
    for library in libraries:
        if root.exists(library):
            facts = {"node": f"/{NODE}", "library": f"/{library}", "wsl": "yes"}
            return [Device(kind, "GPU of Windows", f"/{NODE} with /{library}", facts)]
    return []
