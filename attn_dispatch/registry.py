"""Which backends are installed: found through entry points, loaded when first asked, a failed load kept as its reason.

Finding reads package metadata only; no plug-in is imported, so one that is broken cannot break `import attn_dispatch`.

    [project.entry-points."attn_dispatch.backends.cpu"]     # a group for each platform that it runs on, or `any`
    "20 mine/paged" = "my_package.paged:PagedBackend"       # "<rank> <folder/library>"; the lowest rank is tried first

    [project.entry-points."attn_dispatch.environment"]      # its own ATTN_DISPATCH_* variables, if it has any
    ATTN_DISPATCH_MINE_DEVICE = "my_package.paged:DEVICE"

    [project.entry-points."attn_dispatch.commands"]         # commands of `attn-dispatch`, if it has any
    mine = "my_package.command:mine"
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

from attn_dispatch.backend import Backend
from attn_dispatch.contract import CONTRACT_VERSION
from attn_dispatch.errors import BackendLoadError, ContractVersionError, UnknownBackendError, nearest

__all__ = ["ENVIRONMENT_GROUP", "GROUP_PREFIX", "Entry", "Registry"]

GROUP_PREFIX = "attn_dispatch.backends."
ENVIRONMENT_GROUP = "attn_dispatch.environment"
COMMANDS_GROUP = "attn_dispatch.commands"
ANY = "any"

# Names are printed in tables and told in messages, and end up in variables that are separated by commas.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*")


@dataclass(frozen=True, order=True)
class Entry:
    """One backend on one platform, as its distribution's metadata declares it."""

    rank: int
    name: str
    platform: str
    entry_point: EntryPoint

    @property
    def distribution(self) -> str:
        """Name and version of the distribution that brought it."""
        return _described(self.entry_point.dist)


class Registry:
    """The installed backends.

    Attributes:
        entries: the declarations, in order of rank.
        problems: declarations and metadata that make no sense, in words.
        environment: names of environment variables that plug-ins declare.
        commands: of the command line, that plug-ins bring.
    """

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        self.problems: list[str] = []
        self._loaded: dict[str, Backend | BackendLoadError] = {}
        self._vendors: dict[str, BackendLoadError | None] = {}
        self._lock = threading.RLock()
        points = list(self._installed() if entry_points is None else entry_points)
        self.environment = tuple(p.name for p in points if p.group == ENVIRONMENT_GROUP)
        self.commands = tuple(p for p in points if p.group == COMMANDS_GROUP)
        self.entries = tuple(sorted(filter(None, map(self._entry, points))))

    def _installed(self) -> Iterator[EntryPoint]:
        for distribution in distributions():
            try:
                # Those of other groups are not looked at: of them it does not matter whether they make sense.
                yield from [p for p in distribution.entry_points if p.group.startswith("attn_dispatch.")]
            except Exception as error:  # its metadata may be anything, and may be of somebody quite unconcerned
                self.problems.append(f"{_described(distribution)}: its entry points cannot be read: {error!r}")

    def _entry(self, point: EntryPoint) -> Entry | None:
        if not point.group.startswith(GROUP_PREFIX):
            return None
        rank, _, name = point.name.partition(" ")
        if not (rank.isdecimal() and _NAME.fullmatch(name.strip())):
            brought_by = _described(point.dist) if point.dist else point.value
            self.problems.append(
                f"{brought_by}: entry {point.name!r} of {point.group} is not '<rank> <folder/library>', as in "
                "'20 mine/paged'"
            )
            return None
        return Entry(int(rank), name.strip(), point.group.removeprefix(GROUP_PREFIX), point)

    def names(self) -> list[str]:
        """Return the name of every installed backend, by rank."""
        return list(dict.fromkeys(entry.name for entry in self.entries))

    def ranked(self, platform: str) -> list[str]:
        """Return the backends of one platform, by rank (`any`: those that ask for no hardware)."""
        return list(dict.fromkeys(entry.name for entry in self.entries if entry.platform == platform))

    def entry(self, name: str) -> Entry:
        """Return a backend's declaration.

        Raises:
            UnknownBackendError: nothing that is installed has this name.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = self.names()
        raise UnknownBackendError(
            f"backend {name!r} is not installed.{nearest(name, known)} Installed: {', '.join(known) or 'none'}"
        )

    def load(self, name: str) -> Backend:
        """Return the backend, importing its plug-in the first time.

        Raises:
            UnknownBackendError: nothing that is installed has this name.
            BackendLoadError: its plug-in failed to import, or is not a backend of this contract's version.
        """
        with self._lock:
            if name not in self._loaded:
                try:
                    self._loaded[name] = self._load(self.entry(name))
                except BackendLoadError as error:
                    self._loaded[name] = error
            loaded = self._loaded[name]
        if isinstance(loaded, BackendLoadError):
            raise loaded
        return loaded

    def vendor_failure(self, name: str) -> BackendLoadError | None:
        """Return why a loaded backend's vendor cannot be imported, as far as that was tried."""
        return self._vendors.get(name)

    def import_vendor(self, name: str) -> BackendLoadError | None:
        """Import what a loaded backend computes with, the first time; return why that failed (None: it did not)."""
        with self._lock:
            if name not in self._vendors:
                self._vendors[name] = None
                try:
                    self.load(name).import_vendor()
                except BaseException as error:
                    self._vendors[name] = _failure(f"{name}: its vendor's library cannot be imported", error)
            return self._vendors[name]

    def _load(self, entry: Entry) -> Backend:
        values = {e.entry_point.value: e.distribution for e in self.entries if e.name == entry.name}
        if len(values) > 1:
            providers = ", ".join(sorted(values.values()))
            raise BackendLoadError(f"{entry.name} is declared twice: by {providers}. Uninstall one")
        try:
            factory: Callable[[str], Backend] = entry.entry_point.load()
            # Asked before it is made: an older plug-in may not even be constructible.
            version = getattr(factory, "contract_version", CONTRACT_VERSION)
            if version != CONTRACT_VERSION:
                raise ContractVersionError(
                    f"{entry.distribution} implements version {version} of the contract, this attn-dispatch version "
                    f"{CONTRACT_VERSION}. Install versions of both that belong together"
                )
            backend = factory(entry.name)
        except BackendLoadError:
            raise
        except BaseException as error:
            raise _failure(f"{entry.distribution} failed to load", error) from error
        if not isinstance(backend, Backend):
            raise BackendLoadError(
                f"{entry.distribution}: {entry.entry_point.value} is a {type(backend).__name__}, not a Backend"
            )
        return backend


def _failure(what: str, error: BaseException) -> BackendLoadError:
    """Return the error for whatever a plug-in, which is somebody else's code, has raised; SystemExit is no exception.

    Raises:
        KeyboardInterrupt: the user wants to stop, which is no fault of the plug-in's.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    failure = BackendLoadError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _described(distribution: Distribution | None) -> str:
    """Return name and version of a distribution, whose metadata may be missing or damaged."""
    try:
        return f"{distribution.name} {distribution.version}" if distribution else "an unnamed distribution"
    except Exception:
        return f"a distribution without readable metadata ({getattr(distribution, '_path', 'place unknown')})"
