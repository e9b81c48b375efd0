"""The matrix: one job per environment, read from every pyproject.toml. Standard library only.

A job is `[[tool.attn-dispatch.ci.jobs]]` in `pyproject.toml` (the core's), `platforms/*/pyproject.toml` or
`clients/*/pyproject.toml`:

    name       unique
    needs      hardware without which it is not run: a device kind of attn_dispatch/hardware/platforms.py ("": none)
    python     "3.11"
    pins       requirements, exact; the environment is kept under their hash
    no-deps    requirements, exact, that are installed without their dependencies
    extras     extras of the distribution itself
    core       extras of attn-dispatch (["conformance"] by default)
    with       other platforms or clients of this repository that are installed as well
    any-torch  true: take torch's default build where no CPU build of that version is available (several GB)
    commands   run in the repository's root, with the job's Python as `python`
    minutes    limit for the commands (20)
"""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# A module of the standard library alone, taken from its file: the package needs NumPy, which is not installed yet.
_PLATFORMS = runpy.run_path(str(ROOT / "attn_dispatch" / "hardware" / "platforms.py"))
NEEDS = {"", *_PLATFORMS["DEVICE_KINDS"]}
KEYS = {"name", "needs", "python", "pins", "no-deps", "extras", "core", "with", "any-torch", "commands", "minutes"}


@dataclass(frozen=True)
class Job:
    """One row of the matrix."""

    name: str
    folder: Path
    commands: tuple[str, ...]
    needs: str = ""
    python: str = "3.11"
    pins: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    core: tuple[str, ...] = ("conformance",)
    companions: tuple[str, ...] = ()
    any_torch: bool = False
    minutes: float = 20.0

    @property
    def folders(self) -> list[Path]:
        """The distributions that are installed from this checkout, the core first."""
        folders = [ROOT, *map(_folder, self.companions)]
        return folders if self.folder == ROOT else [*folders, self.folder]

    def requirements(self) -> list[str]:
        """Everything that must be installed, without this repository's own distributions."""
        requirements = [*self.pins, *_requirements(ROOT, ("cli", *self.core)), "hatchling", "hatch-vcs", "editables"]
        for name in self.companions:
            requirements += _requirements(_folder(name), ())
        if self.folder != ROOT:
            requirements += _requirements(self.folder, self.extras)
        return list(dict.fromkeys(requirements))

    def constraints(self) -> list[str]:
        """Versions of everything else; the job's own pins come first."""
        pinned = {pin.partition("==")[0] for pin in self.pins}
        lines = (ROOT / "ci" / "constraints.txt").read_text().split()
        return [line for line in lines if line.partition("==")[0] not in pinned]

    def key(self) -> str:
        """The hash under which its environment is kept."""
        parts = [
            self.python,
            *self.requirements(),
            *self.without_dependencies,
            *self.constraints(),
            str(self.any_torch),
            sys.platform,
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _folder(name: str) -> Path:
    """The folder of a platform or a client of this repository."""
    platform = ROOT / "platforms" / name
    return platform if platform.exists() else ROOT / "clients" / name


def _requirements(folder: Path, extras: tuple[str, ...]) -> list[str]:
    """The dependencies of a distribution with these extras; its own extras of extras resolved."""
    tables = tomllib.loads((folder / "pyproject.toml").read_text())
    project = tables["project"]
    # The core's own are a part of what its metadata hook fills in.
    hook = tables.get("tool", {}).get("hatch", {}).get("metadata", {}).get("hooks", {}).get("custom", {})
    optional = project.get("optional-dependencies", hook.get("extras", {}))
    requirements, pending, seen = list(project.get("dependencies", [])), list(extras), set()
    while pending:
        extra = pending.pop()
        if extra in seen:
            continue
        seen.add(extra)
        requirements += optional[extra]
        pending += [
            e for w in requirements if w.startswith(f"{project['name']}[") for e in w.partition("[")[2][:-1].split(",")
        ]
    foreign = [w for w in requirements if w.startswith("attn-dispatch[") and folder != ROOT]
    core = [e for w in foreign for e in w.partition("[")[2][:-1].split(",")]
    requirements = [w for w in requirements if not w.startswith("attn-dispatch")]
    return [*requirements, *(_requirements(ROOT, tuple(core)) if core else [])]


def jobs() -> list[Job]:
    """Every job of the repository.

    Raises:
        ValueError: a job is not well formed, or two have one name.
    """
    matrix: list[Job] = []
    plugins = sorted(ROOT.glob("platforms/*/pyproject.toml")) + sorted(ROOT.glob("clients/*/pyproject.toml"))
    for file in [ROOT / "pyproject.toml", *plugins]:
        tool = tomllib.loads(file.read_text()).get("tool", {}).get("attn-dispatch", {})
        matrix += [_job(file, row) for row in tool.get("ci", {}).get("jobs", [])]
    names = [job.name for job in matrix]
    if len(set(names)) != len(names):
        raise ValueError(f"two jobs have one name: {sorted(names)}")
    return matrix


def _job(file: Path, row: dict[str, Any]) -> Job:
    unknown = set(row) - KEYS
    if unknown or "name" not in row or not row.get("commands") or row.get("needs", "") not in NEEDS:
        raise ValueError(
            f"{file}: job {row.get('name')}: unknown keys {sorted(unknown)}, or no name, commands or needs"
        )
    return Job(
        name=row["name"],
        folder=file.parent,
        commands=tuple(row["commands"]),
        needs=row.get("needs", ""),
        python=row.get("python", "3.11"),
        pins=tuple(row.get("pins", ())),
        without_dependencies=tuple(row.get("no-deps", ())),
        extras=tuple(row.get("extras", ())),
        core=tuple(row.get("core", ("conformance",))),
        companions=tuple(row.get("with", ())),
        any_torch=row.get("any-torch", False),
        minutes=float(row.get("minutes", 20)),
    )


if __name__ == "__main__":
    # For the hosted matrix: jobs that a machine without an accelerator can run.
    json.dump([{"name": c.name, "python": c.python} for c in jobs() if not c.needs], sys.stdout)
