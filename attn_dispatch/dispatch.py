"""Selection: which backend runs a spec on this machine, and what every other one said.

In order of strength: an argument; `use_backend`; ATTN_DISPATCH_BACKEND (each strict: it runs or raises its verdict);
ATTN_DISPATCH_PREFER and _DISABLE; the platform's own order. What is not for this machine's accelerator (a CPU backend
beside a GPU, the reference) comes last and is never chosen without a warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from attn_dispatch import hardware
from attn_dispatch.backend import Availability, Backend, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import (
    BackendLoadError,
    BackendRefusedError,
    EnvironmentVariableError,
    FallbackWarning,
    NoBackendError,
    nearest,
)
from attn_dispatch.registry import ANY, Registry
from attn_dispatch.settings import Settings

__all__ = ["Explanation", "backends", "candidates", "choose", "explain", "platform", "registry", "use_backend"]

_named: ContextVar[str | None] = ContextVar("attn_dispatch_backend", default=None)


@cache
def registry() -> Registry:
    """Return the installed backends (their metadata is read once)."""
    return Registry()


@cache
def machine() -> hardware.Platform:
    """Return what this machine is (its files are read once)."""
    return hardware.detect()


def settings() -> Settings:
    """Return what the environment asks for now.

    Raises:
        EnvironmentVariableError: a variable or a backend that it names is not known.
    """
    found = Settings.read(registry().environment)
    known = registry().names()
    for variable, names in (("PREFER", found.prefer), ("DISABLE", found.disable)):
        for name in names:
            if name not in known:
                raise EnvironmentVariableError(
                    f"ATTN_DISPATCH_{variable} names {name!r}, which is not installed.{nearest(name, known)} "
                    f"Installed: {', '.join(known)}"
                )
    return found


def platform() -> str:
    """Return the platform that is chosen for: the machine's, or ATTN_DISPATCH_PLATFORM."""
    return settings().platform or machine().name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Name the backend for everything chosen inside the block, in this thread or task alone.

    Raises:
        UnknownBackendError: nothing that is installed has this name.
    """
    registry().entry(name)
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def requested(backend: str | None = None) -> tuple[str | None, str]:
    """Return the backend that was named and by what, or None and the order that decides."""
    if backend is not None:
        return backend, "the backend= argument"
    if (named := _named.get()) is not None:
        return named, "use_backend"
    found = settings()
    if found.backend is not None:
        return found.backend, "ATTN_DISPATCH_BACKEND"
    return None, "ATTN_DISPATCH_PREFER" if found.prefer else "the platform's order"


def candidates() -> list[str]:
    """Return the backends that may be chosen when none is named, in order."""
    found, installed, here = settings(), registry(), platform()
    order = [*found.prefer, *installed.ranked(here), *installed.ranked("cpu"), *installed.ranked(ANY)]
    return [name for name in dict.fromkeys(order) if name not in found.disable]


def default_backend() -> str | None:
    """Return the backend that is tried first, from metadata alone; which one runs depends on the spec."""
    return requested()[0] or next(iter(candidates()), None)


def backends() -> dict[str, Availability]:
    """Return every installed backend with whether it could run here, by rank. Initialises no device."""
    settings()
    return {name: _availability(name) for name in registry().names()}


def _availability(name: str) -> Availability:
    try:
        return registry().load(name).probe()
    except BackendLoadError as error:
        return Availability(False, str(error), "attn-dispatch doctor shows each plug-in")


def verdict_of(name: str | Backend, spec: AttentionSpec, scaled: bool = False) -> Verdict:
    """Return what a backend says of a spec on this machine; one that cannot be loaded or has no hardware says no.

    Args:
        name: the backend.
        spec: what the layer needs.
        scaled: the layer has a k_scale or v_scale that is not 1.
    """
    try:
        backend = registry().load(name) if isinstance(name, str) else name
    except BackendLoadError as error:
        return Verdict(str(name), (Refusal("", None, str(error)),), failed=True)
    available = backend.probe()
    if not available:
        return Verdict(backend.name, (Refusal("", None, available.reason, available.remedy),))
    if scaled and not backend.capabilities.applies_scales:
        accepts = "its kernels ignore scales of a quantised cache"
        return backend.refuse(Refusal("k_scale, v_scale", "not 1", accepts, "Use scales of 1, or another backend"))
    return backend.verdict(spec)


@dataclass(frozen=True)
class Explanation:
    """The verdict table of one spec, as data; `str()` is for people.

    Attributes:
        spec: what was asked.
        platform: what it was chosen for.
        requested: the backend that was named, if one was.
        source: what decided: an argument, a variable, the platform's order.
        chosen: the backend that runs, or None.
        verdicts: what each candidate said, in the order of choice.
    """

    spec: AttentionSpec
    platform: str
    requested: str | None
    source: str
    chosen: str | None
    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rows = [
            {
                "backend": v.backend,
                "answer": v.answer,
                "note": v.note,
                "refusals": [{**asdict(r), "value": None if r.value is None else str(r.value)} for r in v.refusals],
            }
            for v in self.verdicts
        ]
        return {
            "spec": asdict(self.spec),
            "platform": self.platform,
            "requested": self.requested,
            "source": self.source,
            "chosen": self.chosen,
            "verdicts": rows,
        }

    def __str__(self) -> str:
        where = f"{self.platform} ({sys.platform}/{machine().facts.get('machine', '?')})"
        if self.chosen:
            head = f"{self.chosen} runs {self.spec} on {where}, by {self.source}"
        elif self.requested:
            head = f"{self.requested}, named by {self.source}, cannot run {self.spec} on {where}"
        else:
            head = f"no backend can run {self.spec} on {where}"
        width = max((len(v.backend) for v in self.verdicts), default=0)
        rows = [f"  {v.backend:<{width}}  {v.answer:<3}  {v}".rstrip() for v in self.verdicts]
        return "\n".join([f"{head}:", *rows])


def explain(spec: AttentionSpec, backend: str | Backend | None = None, *, scaled: bool = False) -> Explanation:
    """Return what every candidate says of a spec, and who would run.

    A backend that was named heads the table and decides alone; the others follow as what it could be replaced by.
    `scaled`: the layer has a k_scale or v_scale that is not 1.

    Raises:
        UnknownBackendError: the backend that was named is not installed.
        EnvironmentVariableError: see `settings`.
    """
    named, source = (backend, "the backend= argument") if isinstance(backend, Backend) else requested(backend)
    if isinstance(named, str):
        registry().entry(named)
    order: list[str | Backend] = [name for name in candidates() if named != name]
    verdicts = tuple(verdict_of(name, spec, scaled) for name in ([*order] if named is None else [named, *order]))
    willing = verdicts if named is None else verdicts[:1]
    chosen = next((v.backend for v in willing if v), None)
    return Explanation(spec, platform(), None if named is None else str(named), source, chosen, verdicts)


def choose(spec: AttentionSpec, backend: str | Backend | None = None, *, scaled: bool = False) -> Backend:
    """Return the backend that runs a spec.

    Raises:
        BackendRefusedError: one was named, and says no.
        NoBackendError: none was named, and all say no. Either message is the verdict table.
        UnknownBackendError: the backend that was named is not installed.
    """
    named = backend if isinstance(backend, Backend) else requested(backend)[0]
    if isinstance(named, str):
        registry().entry(named)
    # The first yes is enough: what the others say is asked when somebody wants to know.
    for name in candidates() if named is None else [named]:
        if verdict_of(name, spec, scaled):
            if named is None:
                _say_fallback(str(name), spec)
            return registry().load(name) if isinstance(name, str) else name
    raise (NoBackendError if named is None else BackendRefusedError)(str(explain(spec, backend, scaled=scaled)))


def _say_fallback(name: str, spec: AttentionSpec) -> None:
    here = platform()
    if name in registry().ranked(here) or name in settings().prefer:
        return
    if name in registry().ranked(ANY):
        text = f"{name} was chosen: exact, but slow. No backend for a device can run this"
    else:
        text = (
            f"{name} was chosen, which computes on the CPU: this machine has a device ({here}), but no backend for it"
        )
    warnings.warn(FallbackWarning(f"{text}.\n{explain(spec)}"), stacklevel=4)
