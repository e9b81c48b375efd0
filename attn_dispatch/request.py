"""What decides a choice: the backend that was named, if one was, and the environment, read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from attn_dispatch import installed
from attn_dispatch.backend import Backend
from attn_dispatch.registry import ANY
from attn_dispatch.settings import Settings

__all__ = ["Request", "Tier", "candidates", "platform", "requested", "use_backend"]

Tier = Literal["named", "preferred", "platform", "CPU", "any"]
"""Why a backend stands where it stands: it was named, preferred, computes on the platform's devices, on the CPU of a
machine that has others, or asks for no hardware at all."""

_named: ContextVar[str | None] = ContextVar("attn_dispatch_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What decides a choice.

    Attributes:
        settings: what the environment asks for.
        platform: what is chosen for: the machine's, or ATTN_DISPATCH_PLATFORM.
        backend: the one that was named, by name or as an object.
        source: what decides: an argument, a variable, the platform's order.
    """

    settings: Settings
    platform: str
    backend: str | Backend | None
    source: str

    @classmethod
    def read(cls, backend: str | Backend | None = None) -> Request:
        """Read the environment and the innermost `use_backend`; `backend` is stronger than both.

        Raises:
            EnvironmentVariableError: see `installed.settings`.
            UnknownBackendError: the backend that was named is not installed.
        """
        asked = installed.settings()
        source = "the backend= argument"
        if backend is None:
            backend, source = _named.get(), "use_backend"
        if backend is None:
            backend, source = asked.backend, "ATTN_DISPATCH_BACKEND"
        if backend is None:
            source = "ATTN_DISPATCH_PREFER" if asked.prefer else "the platform's order"
        if isinstance(backend, str):
            installed.registry().entry(backend)
        return cls(asked, asked.platform or installed.machine().name, backend, source)

    def ranking(self) -> Iterator[tuple[str, Tier]]:
        """Yield the backends that may be chosen when none is named, in order, each once.

        One that is for the platform, but would compute on the CPU here (a CPU build of torch beside a GPU), takes the
        place that it has among the CPU's.
        """
        ranked, yielded = installed.registry().ranked, set(self.settings.disable)
        on_cpu: list[str] = []
        tiers: list[tuple[Tier, Sequence[str]]] = [
            ("preferred", self.settings.prefer),
            ("platform", ranked(self.platform)),
            ("CPU", ranked("cpu")),
            ("CPU", on_cpu),
            ("any", ranked(ANY)),
        ]
        for tier, names in tiers:
            for name in names:
                if name in yielded:
                    continue
                if tier == "platform" and self.platform != "cpu" and _computes_on_cpu(name):
                    on_cpu.append(name)
                    continue
                yielded.add(name)
                yield name, tier


def _computes_on_cpu(name: str) -> bool:
    available = installed.availability(name)
    return bool(available) and available.evidence.endswith("on CPU")


def platform() -> str:
    """Return the platform that is chosen for: the machine's, or ATTN_DISPATCH_PLATFORM."""
    return installed.settings().platform or installed.machine().name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Name the backend for everything chosen inside the block, in this thread or task alone.

    Raises:
        UnknownBackendError: nothing that is installed has this name.
    """
    installed.registry().entry(name)
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def requested(backend: str | None = None) -> tuple[str | None, str]:
    """Return the backend that was named and by what, or None and the order that decides."""
    request = Request.read(backend)
    return None if request.backend is None else str(request.backend), request.source


def candidates() -> list[str]:
    """Return the backends that may be chosen when none is named, in order."""
    return [name for name, _ in Request.read().ranking()]
