"""What a backend reads of its surroundings: threads, the cache folder, installed packages. Imports no vendor.

One meaning for every backend: a user who sets `ATTN_DISPATCH_NUM_THREADS` or `ATTN_DISPATCH_CACHE_DIR` need not know
which backend was chosen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import attn_dispatch
from attn_dispatch.errors import EnvironmentVariableError

__all__ = ["Packages", "available_cpus", "cache_folder", "choice", "make_cache_folder", "num_threads"]

THREADS_VARIABLE = "ATTN_DISPATCH_NUM_THREADS"
CACHE_VARIABLE = "ATTN_DISPATCH_CACHE_DIR"

_FEWEST_ALLOWED = 64
_ALLOWED_PER_CPU = 8


def available_cpus() -> int:
    """Return how many CPUs this process was given: its affinity, and its control group's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        allowed = os.cpu_count() or 1
    quota = attn_dispatch.platform.facts.get("cpu_quota")
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def num_threads() -> int:
    """Return how many threads a backend computes with: what the user asked for, else `available_cpus`.

    Raises:
        EnvironmentVariableError: the variable is not a whole number, or more than eight times the machine's CPUs.
    """
    text = os.environ.get(THREADS_VARIABLE)
    if not text:
        return available_cpus()
    most = max(_FEWEST_ALLOWED, _ALLOWED_PER_CPU * (os.cpu_count() or 1))
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise EnvironmentVariableError(f"{THREADS_VARIABLE}={text!r} must be a whole number from 1 to {most}")
    return int(text)


def choice(variable: str, *accepted: str) -> str:
    """Return what a variable of a backend's own says: one of `accepted`, the first when it is not set.

    Raises:
        EnvironmentVariableError: it says something else.
    """
    text = os.environ.get(variable) or accepted[0]
    if text not in accepted:
        raise EnvironmentVariableError(f"{variable}={text!r} is not one of {', '.join(accepted)}")
    return text


def cache_folder(*parts: str) -> Path:
    """Return the folder for what is built once (machine code, compiled models, tables); it need not exist.

    Args:
        parts: of a backend's own folder in it.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    base = Path(chosen).expanduser().absolute() if chosen else _users_cache() / "attn-dispatch"
    if sys.platform == "win32" and not chosen:
        base /= "Cache"
    return base.joinpath(*parts)


def _users_cache() -> Path:
    """Return the user's cache folder, as platformdirs defines it."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache").expanduser()


def make_cache_folder(*parts: str) -> Path:
    """Return `cache_folder`, made if it was missing: for its owner alone, since what lies in it may be executed.

    Args:
        parts: see `cache_folder`.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_folder(*parts)
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Packages:
    """The packages that a Python can import, found without importing any.

    Attributes:
        search: folders in which they are looked for (None: as `import` would).
    """

    search: Sequence[str] | None = None

    def folders(self, module: str) -> list[Path]:
        """Return the folders of a top-level package, or the file of a module; none when it is not there."""
        spec = self._spec(module)
        if spec is None:
            return []
        if spec.submodule_search_locations is not None:
            return [Path(folder) for folder in spec.submodule_search_locations]
        return [] if spec.origin is None else [Path(spec.origin)]

    def _spec(self, module: str) -> ModuleSpec | None:
        if self.search is not None:
            return PathFinder.find_spec(module, list(self.search))
        try:
            return util.find_spec(module)
        except ValueError:  # imported already, by somebody who gave it no specification
            return None

    def version(self, *distributions: str) -> str:
        """Return the version of the first of these distributions that is installed; empty when none is."""
        path = sys.path if self.search is None else list(self.search)
        for name in distributions:
            for distribution in metadata.distributions(name=name, path=path):
                return distribution.version or ""
        return ""
