"""Which backends are installed: found through entry points, loaded when first asked, a failed load kept as its reason.

Finding reads package metadata only; no plug-in is imported, so one that is broken cannot break `import attn_dispatch`.

    [project.entry-points."attn_dispatch.backends.cpu"]     # a group for each platform that it runs on, or `any`
    "20 mine/paged" = "my_package.paged:PagedBackend"       # "<rank> <folder/library>"; the lowest rank is tried first

    [project.entry-points."attn_dispatch.environment"]      # its own ATTN_DISPATCH_* variables, if it has any
    ATTN_DISPATCH_MINE_DEVICE = "my_package.paged:DEVICE"
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions

from attn_dispatch.backend import Backend
from attn_dispatch.contract import CONTRACT_VERSION
from attn_dispatch.errors import BackendLoadError, ContractVersionError, UnknownBackendError, nearest

__all__ = ["ENVIRONMENT_GROUP", "GROUP_PREFIX", "Entry", "Registry"]

GROUP_PREFIX = "attn_dispatch.backends."
ENVIRONMENT_GROUP = "attn_dispatch.environment"
ANY = "any"


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
        dist = self.entry_point.dist
        return f"{dist.name} {dist.version}" if dist else "an unnamed distribution"


class Registry:
    """The installed backends.

    Attributes:
        entries: what was found, in order of rank.
        problems: declarations that make no sense, in words.
        environment: names of environment variables that plug-ins declare.
    """

    def __init__(self, found: Iterable[EntryPoint] | None = None) -> None:
        self.problems: list[str] = []
        self._loaded: dict[str, Backend | BackendLoadError] = {}
        self._lock = threading.RLock()
        points = [p for d in distributions() for p in d.entry_points] if found is None else list(found)
        self.environment = tuple(p.name for p in points if p.group == ENVIRONMENT_GROUP)
        self.entries = tuple(sorted(filter(None, map(self._entry, points))))

    def _entry(self, point: EntryPoint) -> Entry | None:
        if not point.group.startswith(GROUP_PREFIX):
            return None
        rank, _, name = point.name.partition(" ")
        if not (rank.isdecimal() and name.strip()):
            self.problems.append(
                f"{point.dist.name if point.dist else point.value}: entry {point.name!r} of {point.group} is not "
                "'<rank> <folder/library>', as in '20 mine/paged'"
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
            found = self._loaded[name]
        if isinstance(found, BackendLoadError):
            raise found
        return found

    def _load(self, entry: Entry) -> Backend:
        values = {e.entry_point.value: e.distribution for e in self.entries if e.name == entry.name}
        if len(values) > 1:
            raise BackendLoadError(
                f"{entry.name} is claimed twice: {', '.join(sorted(values.values()))}. Uninstall one"
            )
        try:
            factory: Callable[[str], Backend] = entry.entry_point.load()
            # Asked before it is made: an older plug-in may not even be constructible.
            version = getattr(factory, "contract_version", CONTRACT_VERSION)
            if version != CONTRACT_VERSION:
                raise ContractVersionError(
                    f"{entry.distribution} speaks version {version} of the contract, this attn-dispatch speaks "
                    f"{CONTRACT_VERSION}. Install versions of both that belong together"
                )
            backend = factory(entry.name)
        except BackendLoadError:
            raise
        except Exception as error:  # a plug-in is somebody else's code: whatever it raises is kept as the reason
            text = f"{type(error).__name__}: {error}"
            raise BackendLoadError(f"{entry.distribution} failed to load: {text}") from error
        if not isinstance(backend, Backend):
            raise BackendLoadError(
                f"{entry.distribution}: {entry.entry_point.value} is a {type(backend).__name__}, not a Backend"
            )
        return backend
