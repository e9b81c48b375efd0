"""Selection: which backend runs a spec on this machine, and what every other one said.

In order of strength: an argument; `use_backend`; ATTN_DISPATCH_BACKEND (each strict: it runs or raises its verdict);
ATTN_DISPATCH_PREFER and _DISABLE; the platform's own order. What does not compute on this machine's accelerator (a CPU
backend beside a GPU, the reference) comes last and is never chosen without a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attn_dispatch import installed
from attn_dispatch.backend import Availability, Backend, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import BackendRefusedError, FallbackWarning, NoBackendError
from attn_dispatch.explanation import Explanation, Specs, alternatives, table
from attn_dispatch.installed import machine, registry, settings, verdict_of
from attn_dispatch.observe import LOGGER
from attn_dispatch.request import Request, Tier, candidates, platform, requested, use_backend

__all__ = [
    "Explanation",
    "Selection",
    "Specs",
    "backends",
    "candidates",
    "choose",
    "default_backend",
    "explain",
    "machine",
    "platform",
    "registry",
    "requested",
    "select",
    "settings",
    "use_backend",
    "verdict_of",
]


def default_backend() -> str | None:
    """Return the backend that is tried first: the one that was named, or the first that could run here."""
    request = Request.read()
    if request.backend is not None:
        return str(request.backend)
    return next((name for name, _ in request.ranking() if installed.availability(name)), None)


def backends() -> dict[str, Availability]:
    """Return every installed backend with whether it could run here, by rank. Initialises no device."""
    installed.settings()
    return {name: installed.availability(name) for name in installed.registry().names()}


def explain(spec: AttentionSpec, backend: str | Backend | None = None, *, scaled: bool = False) -> Explanation:
    """Return what every candidate says of a spec, and who would run.

    A backend that was named heads the table and decides alone; the others follow as what it could be replaced by.
    `scaled`: the layer has a k_scale or v_scale that is not 1.

    Raises:
        UnknownBackendError: the backend that was named is not installed.
        EnvironmentVariableError: see `installed.settings`.
    """
    return _explain(Request.read(backend), spec, scaled)


def _explain(request: Request, spec: AttentionSpec, scaled: bool) -> Explanation:
    named = request.backend
    order: list[str | Backend] = [name for name, _ in request.ranking() if name != named]
    verdicts = tuple(verdict_of(name, spec, scaled) for name in ([*order] if named is None else [named, *order]))
    deciding = verdicts if named is None else verdicts[:1]
    chosen = next((v.backend for v in deciding if v), None)
    where = installed.machine()
    return Explanation(
        spec,
        request.platform,
        None if named is None else str(named),
        request.source,
        chosen,
        verdicts,
        disabled=request.settings.disable,
        system=f"{where.facts.get('system', '?')}/{where.facts.get('machine', '?')}",
    )


@dataclass(frozen=True)
class Selection:
    """A backend, and what decided for it.

    Attributes:
        backend: the one that runs.
        requested: the backend that was named, if one was.
        source: what decided: an argument, a variable, the platform's order.
    """

    backend: Backend
    requested: str | None
    source: str


def choose(
    specs: AttentionSpec | Specs,
    backend: str | Backend | None = None,
    *,
    scaled: bool = False,
    purpose: str = "",
    refuses: Callable[[Backend], Refusal | None] | None = None,
) -> Backend:
    """Return the backend that runs a layer, or everything that a variant is made of. See `select`."""
    return select(specs, backend, scaled=scaled, purpose=purpose, refuses=refuses).backend


def select(
    specs: AttentionSpec | Specs,
    backend: str | Backend | None = None,
    *,
    scaled: bool = False,
    purpose: str = "",
    refuses: Callable[[Backend], Refusal | None] | None = None,
) -> Selection:
    """Choose a backend and say what decided.

    Args:
        specs: what the layer needs; or a sequence, all of which one backend has to run on one cache. An element of the
            sequence that is a tuple holds alternatives: any one of them will do.
        backend: the one to use (strict), by name or as an object; None: chosen.
        scaled: the layer has a k_scale or v_scale that is not 1.
        purpose: what the sequence is for, for messages ("Longformer").
        refuses: asked of a backend that says yes: why it will not do all the same (its cache's layout, say).

    Raises:
        BackendRefusedError: one was named, and says no.
        NoBackendError: none was named, and all say no. Either message is the verdict table.
        UnknownBackendError: the backend that was named is not installed.
        EnvironmentVariableError: see `installed.settings`.
    """
    request = Request.read(backend)
    named = request.backend
    ranking: Iterator[tuple[str | Backend, Tier]] = iter([(named, "named")]) if named is not None else request.ranking()
    verdicts: list[Verdict] = []
    # The first yes is enough: what the others say is asked when somebody wants to know.
    for name, tier in ranking:
        verdict = verdict_of(name, specs, scaled)
        if verdict and named is None and (failure := installed.registry().import_vendor(str(name))):
            verdict = Verdict(str(name), (Refusal("", None, str(failure)),), failed=True)
        if verdict and refuses is not None:
            willing = installed.registry().load(name) if isinstance(name, str) else name
            if refusal := refuses(willing):
                verdict = willing.refuse(refusal)
        if verdict:
            chosen = installed.registry().load(name) if isinstance(name, str) else name
            _report_choice(chosen.name, tier, request, specs, verdicts, scaled, purpose)
            return Selection(chosen, None if named is None else str(named), request.source)
        verdicts.append(verdict)
    raise (NoBackendError if named is None else BackendRefusedError)(
        _refusal(request, specs, verdicts, scaled, purpose)
    )


def _refusal(
    request: Request, specs: AttentionSpec | Specs, verdicts: list[Verdict], scaled: bool, purpose: str
) -> str:
    if isinstance(specs, AttentionSpec) and not purpose:
        return str(_explain(request, specs, scaled))
    passes = "\n".join(f"  {' or '.join(map(str, options))}" for options in alternatives(specs))
    return table(f"{purpose} is made of these passes:\n{passes}\nand no backend runs all of them", verdicts)


def _report_choice(
    name: str,
    tier: Tier,
    request: Request,
    specs: AttentionSpec | Specs,
    refused: list[Verdict],
    scaled: bool,
    purpose: str,
) -> None:
    """Write the choice to the log, and warn of one that nobody asked for on a machine with something better."""
    what = str(specs) if isinstance(specs, AttentionSpec) else purpose
    LOGGER.info(
        "%s runs %s on %s, by %s%s", name, what, request.platform, request.source,
        "".join(f"; {verdict.backend}: {verdict}" for verdict in refused),
    )  # fmt: skip
    for disabled in request.settings.disable:
        LOGGER.warning("%s is disabled by ATTN_DISPATCH_DISABLE", disabled)
    for verdict in refused:
        if verdict.failed:
            LOGGER.warning("%s cannot be used: %s", verdict.backend, verdict)
    if tier == "any":
        text = f"{name} was chosen: exact, but slow. No backend for a device can run this"
    elif tier == "CPU":
        text = (
            f"{name} was chosen, which computes on the CPU: this machine has a device ({request.platform}), but no "
            "backend for it"
        )
        # Why the device cannot be used, where its files tell.
        text = ". ".join([text, *installed.machine().facts.get("problems", ())])
    else:
        return
    LOGGER.warning(text)
    details = _explain(request, specs, scaled) if isinstance(specs, AttentionSpec) else ""
    warnings.warn(FallbackWarning(f"{purpose}{': ' if purpose else ''}{text}.\n{details}".rstrip()), stacklevel=4)
