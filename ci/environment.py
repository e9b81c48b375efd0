"""Environments for jobs: packages once per hash of their pins, this checkout on top. Standard library only.

The packages live in a folder of the user's cache, complete or absent, shared by every checkout and never changed
afterwards. Each checkout has thin environments of its own (`.env/JOB`) which look into that folder and hold the
repository's distributions, editable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from jobs import ROOT, Job, jobs

Say = Callable[[str], None]


class CannotBuild(Exception):
    """The environment cannot be built on this machine; the message says why."""


def cache_folder() -> Path:
    """Where packages are kept: ATTN_DISPATCH_CACHE_DIR, else the user's cache folder."""
    if chosen := os.environ.get("ATTN_DISPATCH_CACHE_DIR"):
        return Path(chosen).expanduser() / "environments"
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attn-dispatch" / "environments"


def interpreter(version: str) -> str:
    """Return a Python of this version: the running one, one on PATH, or one of pyenv's.

    Raises:
        CannotBuild: there is none.
    """
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [
        shutil.which(f"python{version}"),
        *(str(p / "bin" / "python") for p in sorted(pyenv.glob(f"{version}.*"))),
    ]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    raise CannotBuild(f"needs python {version}")


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(job: Job, say: Say) -> Path:
    """Return the interpreter of the job's environment for this checkout, building what is missing.

    Raises:
        CannotBuild: no such Python, or the packages cannot be installed.
    """
    packages = _packages(job, say)
    folder = ROOT / ".env" / job.name
    stamp = folder / "inputs"
    inputs = "\n".join([str(packages), *map(str, job.folders), *map(_metadata, job.folders)])
    if not (stamp.exists() and stamp.read_text() == inputs):
        say("installing this checkout")
        shutil.rmtree(folder, ignore_errors=True)
        # Without a pip of its own, which takes longer to install than all the rest: that of the packages does it.
        _run([interpreter(job.python), "-m", "venv", "--without-pip", str(folder)])
        site = site_packages(folder)
        (site / "packages.pth").write_text(f"import site; site.addsitedir({str(site_packages(packages))!r})\n")
        pip = [str(python_of(packages)), "-m", "pip", "--python", str(python_of(folder)), "--disable-pip-version-check"]
        editable = [word for distribution in job.folders for word in ("-e", str(distribution))]
        _run([*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", *editable])
        # An editable install leaves byte code to the first import, which a cost of import should not be measured with.
        sources = [str(path) for f in job.folders for path in f.glob("attn_dispatch*") if path.is_dir()]
        _run([str(python_of(folder)), "-m", "compileall", "-q", *sources])
        stamp.write_text(inputs)
    return python_of(folder)


def _metadata(folder: Path) -> str:
    """What an installation of this distribution depends on: its pyproject.toml without the tools' tables."""
    tables = tomllib.loads((folder / "pyproject.toml").read_text())
    return repr([tables.get("project"), tables.get("build-system"), tables.get("tool", {}).get("hatch")])


def _packages(job: Job, say: Say) -> Path:
    """Return the folder with the job's third-party packages."""
    final = cache_folder() / f"{job.python}-{job.key()}"
    if final.exists():
        return final
    python = interpreter(job.python)
    final.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{final.name}.", dir=final.parent))
    try:
        say(f"installing packages, once: {' '.join(job.pins) or 'the core and its tests'}")
        _run([python, "-m", "venv", str(building)])
        pip = [str(python_of(building)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        (building / "constraints.txt").write_text("\n".join(job.constraints()))
        constraints = ["-c", str(building / "constraints.txt")]
        torch = [pin for pin in job.pins if pin.partition("==")[0] == "torch"]
        for pin in torch:
            _install_torch(pip, pin, job, say)
        _run([*pip, *constraints, *(r for r in job.requirements() if r not in torch), *torch])
        if job.without_dependencies:
            _run([*pip, "--no-deps", *job.without_dependencies])
        # Another checkout may have been faster: whoever renames first wins, the loser's work is thrown away.
        if not final.exists():
            building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _install_torch(pip: list[str], pin: str, job: Job, say: Say) -> None:
    """Install torch without CUDA, wherever a CPU build of that version is available."""
    if job.needs:  # the build for the hardware is what the job is about
        _run([*pip, pin])
        return
    if sys.platform == "darwin" or _try([*pip, f"{pin}+cpu"]):
        if sys.platform == "darwin":
            _run([*pip, pin])
        return
    # uv knows where the project keeps its CPU builds.
    python = pip[0]
    if _try([*pip, "uv"]) and _try(
        [python, "-m", "uv", "pip", "install", "-q", "--python", python, "--torch-backend", "cpu", pin]
    ):
        return
    if not job.any_torch:
        raise CannotBuild(f"no CPU build of {pin} is available here, and several GB of CUDA are not installed instead")
    say(f"no CPU build of {pin} is available here: installing the default build, with its CUDA packages")
    _run([*pip, "--no-cache-dir", pin])


def site_packages(folder: Path) -> Path:
    """Where an environment keeps its packages."""
    if os.name == "nt":
        return folder / "Lib" / "site-packages"
    return next((folder / "lib").glob("python3.*")) / "site-packages"


def _try(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"{' '.join(command[:6])} ... failed:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    # The interpreter of a job's environment, for work by hand: `$(python3 ci/environment.py core) -m pytest tests`.
    chosen = next((job for job in jobs() if job.name in sys.argv[1:]), None)
    if chosen is None:
        sys.exit(f"usage: environment.py JOB, one of {', '.join(job.name for job in jobs())}")
    try:
        print(environment(chosen, lambda text: print(text, file=sys.stderr, flush=True)))
    except CannotBuild as error:
        sys.exit(str(error))
