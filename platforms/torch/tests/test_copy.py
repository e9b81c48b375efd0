"""A copy of this folder under another name is a backend like any other: found, ranked, and held to the kit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

OWN = Path(__file__).resolve().parent.parent
PACKAGE = next(path.name for path in OWN.iterdir() if path.is_dir() and path.name.startswith("attn_dispatch_"))


def test_a_copy_under_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "somewhere" / "else"
    shutil.copytree(OWN, folder, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (folder / PACKAGE).rename(folder / "attn_dispatch_copied")
    for file in [folder / "pyproject.toml", *folder.rglob("*.py")]:
        text = file.read_text().replace(PACKAGE, "attn_dispatch_copied")
        file.write_text(re.sub(r'"\d+ [\w-]+/sdpa"', '"3 copied/sdpa"', text))
    # What an installer would write of its entry points.
    groups = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "copied-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: copied\nVersion: 0.1\n")
    sections = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items())
    (info / "entry_points.txt").write_text("\n".join(sections))
    environ = os.environ | {"PYTHONPATH": str(folder), "ATTN_DISPATCH_PLATFORM": "cpu"}
    command = [sys.executable, "-m", "attn_dispatch", "verify", "--backend", "copied/sdpa", "--json"]
    features = ["--feature", "mixed", "--feature", "window", "--feature", "everything at once"]
    done = subprocess.run([*command, *features], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert {entry["state"] for entry in row["entries"]} == {"yes"}
    script = "import attn_dispatch as ad; print(ad.attention(ad.AttentionSpec(num_heads=2, dtype='float32')).backend)"
    chosen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    assert chosen.stdout.strip() == "copied/sdpa"
