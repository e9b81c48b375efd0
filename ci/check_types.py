"""`mypy --strict` over the core, every platform, every client and ci, in one process: what they share is read once.

The rules are the root's `[tool.mypy]`. Which vendors have no type information is said by whoever imports them: each
platform's and client's pyproject.toml brings its own `[[tool.mypy.overrides]]`. Standard library only; mypy must be
installed beside the interpreter that runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import ROOT


def distributions(root: Path) -> list[Path]:
    """Return the folders of the platforms and clients."""
    return sorted(path.parent for kind in ("platforms", "clients") for path in root.glob(f"{kind}/*/pyproject.toml"))


def rules(root: Path) -> dict[str, Any]:
    """Return mypy's rules with everybody's overrides."""
    merged: dict[str, Any] = {}
    for folder in [root, *distributions(root)]:
        tables = tomllib.loads((folder / "pyproject.toml").read_text()).get("tool", {}).get("mypy", {})
        if folder != root and set(tables) - {"overrides"}:
            raise ValueError(f"{folder / 'pyproject.toml'}: [tool.mypy] is the root's; overrides alone are its own")
        merged = {**tables, **merged, "overrides": [*merged.get("overrides", []), *tables.get("overrides", [])]}
    return merged


def as_toml(rules: Mapping[str, Any]) -> str:
    """Return the text of the table `tool.mypy`; its values are such that TOML writes them as JSON does."""
    lines = ["[tool.mypy]", *(f"{key} = {json.dumps(value)}" for key, value in rules.items() if key != "overrides")]
    for override in rules["overrides"]:
        lines += ["[[tool.mypy.overrides]]", *(f"{key} = {json.dumps(value)}" for key, value in override.items())]
    return "\n".join(lines) + "\n"


def packages(root: Path) -> tuple[list[str], list[Path]]:
    """Return what is checked, by name, and the folders in which it lies."""
    names, bases = ["attn_dispatch"], [root, root / "ci"]
    for folder in distributions(root):
        bases.append(folder)
        names += [path.parent.name for path in sorted(folder.glob("*/__init__.py")) if path.parent.name != "tests"]
        # What is run from the repository's root goes by its place there.
        if any((folder / "evidence").glob("*.py")):
            names.append(".".join([*folder.relative_to(root).parts, "evidence"]))
    return names, bases


def main(root: Path = ROOT) -> int:
    """Check everything; return mypy's exit status."""
    names, bases = packages(root)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(as_toml(rules(root)))
        config.flush()
        command = [sys.executable, "-m", "mypy", "--config-file", config.name, "--cache-dir", str(root / ".mypy_cache")]
        for name in names:
            command += ["-p", name]
        for script in sorted((root / "ci").glob("*.py")):
            command += ["-m", script.stem]
        environ = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, bases))}
        return subprocess.run(command, cwd=root, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
