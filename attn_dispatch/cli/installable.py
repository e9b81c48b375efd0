"""What could be installed for a platform, from where this distribution came: said by the platforms' own metadata.

In a checkout each `platforms/*/pyproject.toml` declares the entry-point groups of its backends. A wheel of the core has
the same, written down when it was built (`installable.json`), with the extra that installs each.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Installable", "declared", "install_commands"]

_CORE = Path(__file__).parents[1]
# As in the registry, which imports NumPy: this file is run by itself when a wheel is built.
GROUP_PREFIX = "attn_dispatch.backends."


@dataclass(frozen=True)
class Installable:
    """One distribution with backends.

    Attributes:
        distribution: its name.
        extra: of attn-dispatch, that installs it.
        platforms: those that its backends run on, by name.
        backends: their names.
        command: what installs it.
    """

    distribution: str
    extra: str
    platforms: tuple[str, ...]
    backends: tuple[str, ...]
    command: str


def declared(pyproject: Path, command: str) -> Installable:
    """Return what a platform's pyproject.toml declares.

    Args:
        pyproject: the file.
        command: what installs it.
    """
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups = {
        group.removeprefix(GROUP_PREFIX): [entry.partition(" ")[2] for entry in entries]
        for group, entries in project.get("entry-points", {}).items()
        if group.startswith(GROUP_PREFIX)
    }
    backends = dict.fromkeys(name for names in groups.values() for name in names)
    return Installable(project["name"], pyproject.parent.name, tuple(groups), tuple(backends), command)


def _installables(core: Path) -> list[Installable]:
    files = sorted(core.parent.glob("platforms/*/pyproject.toml"))
    if files:  # a checkout
        return [
            declared(file, f"pip install -e {file.parent}") for file in files if not file.parent.name.startswith("_")
        ]
    written = core / "installable.json"
    rows = json.loads(written.read_text(encoding="utf-8")) if written.exists() else []
    return [_from_json(row) for row in rows]


def _from_json(row: dict[str, Any]) -> Installable:
    lists = {"platforms": tuple(row["platforms"]), "backends": tuple(row["backends"])}
    return Installable(**{**row, **lists})


def install_commands(platform: str, installed: Collection[str] = (), core: Path = _CORE) -> list[str]:
    """Return the commands that install more backends for a platform, those that are made for it alone first.

    Args:
        platform: its name.
        installed: backends that need not be installed, by name.
        core: the folder of attn_dispatch.
    """
    fitting = [e for e in _installables(core) if platform in e.platforms and not set(e.backends) <= set(installed)]
    return [entry.command for entry in sorted(fitting, key=lambda entry: (len(entry.platforms), entry.distribution))]
