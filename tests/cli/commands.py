"""The command line in a process of its own, and plug-ins for it: what the tests of this folder share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ATTN_DISPATCH_")} | {"COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "attn_dispatch", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | environ,
        timeout=300,
    )


def install(folder: Path, name: str, source: str, entry: str = "Backend") -> dict[str, str]:
    (folder / f"{name}.py").write_text(dedent(source))
    info = folder / f"{name}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[attn_dispatch.backends.cpu]\n1 {name}/bad = {name}:{entry}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def reports(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    return {report["name"]: report for report in json.loads(done.stdout)["backends"]}
