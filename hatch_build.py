"""What the core's metadata says of the platforms: an extra for each, and what each is for. Used when it is built.

The core names no platform: both are read from `platforms/*/pyproject.toml`, so that a new folder is all that a new
platform needs.
"""

from __future__ import annotations

import json
import runpy
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


def installables(root: Path) -> list[Any]:
    """Return what each platform of the repository declares."""
    # From its file: the package needs NumPy, which a build does not have.
    declared = runpy.run_path(str(root / "attn_dispatch" / "cli" / "installable.py"))["declared"]
    files = [file for file in sorted(root.glob("platforms/*/pyproject.toml")) if not file.parent.name.startswith("_")]
    return [declared(file, f"pip install 'attn-dispatch[{file.parent.name}]'") for file in files]


class PlatformExtras(MetadataHookInterface):
    """`attn-dispatch[cpu]` and so on, beside the extras of the core's own."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the optional dependencies."""
        extras = {entry.extra: [entry.distribution] for entry in installables(Path(self.root))}
        metadata["optional-dependencies"] = {**extras, **self.config["extras"]}


class WrittenInstallables(BuildHookInterface[Any]):
    """A file in the wheel with what could be installed, for `attn-dispatch doctor`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the file and add it to the wheel. An editable one needs none: the platforms lie beside it."""
        if version == "editable" or self.target_name != "wheel":
            return
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "installable.json"
        file.write_text(json.dumps([asdict(entry) for entry in installables(Path(self.root))], indent=1))
        build_data["force_include"][str(file)] = "attn_dispatch/installable.json"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the file."""
        if hasattr(self, "folder"):
            self.folder.cleanup()
