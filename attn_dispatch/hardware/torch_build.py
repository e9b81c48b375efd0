"""For which hardware the installed torch was built: its version file, read as text (importing it takes seconds)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from .platforms import by_name
from .system_root import SystemRoot

__all__ = ["flavor", "suits"]

_ASSIGNMENT = re.compile(r"""^(cuda|hip|rocm|xpu)\s*(?::[^=\n]*)?=\s*['"]([^'"\n]+)['"]""", re.MULTILINE)


def flavor(root: SystemRoot, folders: Iterable[str]) -> str | None:
    """Return `cpu`, `cu130`, `rocm6.4` or `xpu`; None when torch is in none of the folders.

    Args:
        root: the machine.
        folders: where its Python looks for modules; relative to the machine's root.
    """
    for folder in folders:
        text = root.read(os.path.join(folder, "torch", "version.py"))
        if text is not None:
            return _flavor(dict(_ASSIGNMENT.findall(text)))
    return None


def _flavor(built: dict[str, str]) -> str:
    # Newer builds name ROCm's own version; older ones only that of HIP, whose first two numbers are the same.
    if version := built.get("rocm") or built.get("hip"):
        return "rocm" + ".".join(version.split(".")[:2])
    if version := built.get("cuda"):
        return "cu" + "".join(version.split(".")[:2])
    return "xpu" if "xpu" in built else "cpu"


def suits(build: str | None, platform: str) -> bool:
    """Say whether a build of torch can use a platform's devices."""
    return build is not None and build.startswith(by_name(platform).torch_flavor)
