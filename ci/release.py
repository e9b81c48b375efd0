"""Build every wheel, and a folder that pip installs from; then show that it does: `python ci/release.py FOLDER`.

FOLDER gets the wheels and `simple/`, an index of them (PEP 503): `pip install --index-url file://FOLDER/simple/ ...` or
`--find-links FOLDER`. Needs hatchling, hatch-vcs and pip beside the interpreter that runs this, as the environments of
jobs have them; nothing is downloaded. Exit status 1: a wheel lacks what every wheel has, or cannot be used.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import html
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from email.message import Message
from pathlib import Path

from check_types import distributions
from environment import python_of, site_packages
from jobs import ROOT

# What is run where the wheels are installed: the doctor, and one layer on whatever is chosen.
_USE = """
import numpy as np, attn_dispatch as ad
spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
attn = ad.attention(spec)
cache = attn.allocate(4)
batch = ad.AttentionMetadata.build(query_lens=[5], seq_lens=[5], block_tables=[[2]])
q, k = np.ones((5, 4, 64), np.float32), np.ones((5, 2, 64), np.float32)
assert np.allclose(attn.run(attn.plan(batch), q, k, k, cache), 1)
print(attn.backend.name, ad.__file__)
"""


def build(folder: Path) -> list[Path]:
    """Build the wheel of every distribution of the repository."""
    folders = [ROOT, *(f for f in distributions(ROOT) if not f.name.startswith("_"))]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, *map(str, folders)], check=True)
    return sorted(folder.glob("*.whl"))


def metadata_of(wheel: Path) -> Message:
    """Return a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def shortcomings(wheel: Path) -> list[str]:
    """Return what a wheel lacks, or has and should not have."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    metadata = metadata_of(wheel)
    lacking = [f"no {key}" for key in ("License-Expression", "Summary", "Requires-Python") if not metadata[key]]
    lacking += [f"no {key}" for key in ("Classifier", "Project-URL", "License-File") if not metadata.get_all(key)]
    lacking += [] if str(metadata.get_payload()).strip() else ["no readme"]
    lacking += [] if any("/licenses/" in name for name in names) else ["no licence's text"]
    packages = {name.partition("/")[0] for name in names if name.endswith("/__init__.py") and name.count("/") == 1}
    lacking += [f"{package} has no py.typed" for package in sorted(packages) if f"{package}/py.typed" not in names]
    strays = [name for name in names if {"tests", "evidence", "__pycache__"} & set(Path(name).parts)]
    return lacking + [f"has {name}" for name in strays]


def write_index(folder: Path, wheels: list[Path]) -> None:
    """Write an index that pip reads (PEP 503) of the wheels in a folder."""
    projects: dict[str, list[Path]] = {}
    for wheel in wheels:
        projects.setdefault(metadata_of(wheel)["Name"], []).append(wheel)
    pages = {"": [f'<a href="{name}/">{name}</a>' for name in sorted(projects)]}
    for name, files in projects.items():
        hashes = {wheel: hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in files}
        pages[name] = [
            f'<a href="../../{html.escape(w.name)}#sha256={digest}">{html.escape(w.name)}</a>'
            for w, digest in hashes.items()
        ]
    for name, links in pages.items():
        page = folder / "simple" / name / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("<!DOCTYPE html>\n<html><body>\n" + "<br>\n".join(links) + "\n</body></html>\n")


def check(folder: Path, extras: list[str]) -> None:
    """Install from the folder into a fresh environment, run the doctor there, and a layer.

    What the distributions need besides is taken from the environment that runs this.

    Raises:
        subprocess.CalledProcessError: something of it failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
        # The folders of third-party packages alone: what is installed here from the checkout must not be lacking.
        packages = (Path(sysconfig.get_paths()["purelib"]) / "packages.pth").read_text()
        (site_packages(fresh) / "packages.pth").write_text(packages)
        python = str(python_of(fresh))
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(folder)]
        subprocess.run([*install, f"attn-dispatch[{','.join(extras)}]"], check=True)
        for command in (["-c", _USE], ["-m", "attn_dispatch", "doctor"]):
            subprocess.run([python, "-P", *command], check=True, cwd=fresh)


def main() -> int:
    """Build, check, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the wheels go (default: nowhere that is kept)")
    parser.add_argument("--extras", default="cpu", help="of attn-dispatch, to install and run; commas between them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wheels = build(folder)
        write_index(folder, wheels)
        problems = [f"{wheel.name}: {text}" for wheel in wheels for text in shortcomings(wheel)]
        print("\n".join(problems or [f"{len(wheels)} wheels, complete"]))
        check(folder, options.extras.split(","))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
