"""Which backend runs a variant: the first one that says yes to every spec that the variant is made of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from attn_dispatch import dispatch
from attn_dispatch.backend import Backend, Verdict
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import BackendRefusedError, FallbackWarning, NoBackendError
from attn_dispatch.registry import ANY

__all__ = ["Needs", "choose_for", "refusal"]

Needs = Sequence[AttentionSpec | tuple[AttentionSpec, ...]]
"""The specs of a variant's passes; of a tuple, any one will do."""


def refusal(backend: str | Backend, specs: Needs, *, scaled: bool = False) -> Verdict | None:
    """Return the first no that a backend says to one of these specs (None: it runs them all)."""
    for need in specs:
        options = need if isinstance(need, tuple) else (need,)
        verdicts = [dispatch.verdict_of(backend, option, scaled) for option in options]
        if not any(verdicts):
            return verdicts[0]
    return None


def choose_for(what: str, specs: Needs, backend: str | Backend | None = None, *, scaled: bool = False) -> Backend:
    """Return the backend for a variant.

    Args:
        what: the variant's name, for messages.
        specs: all of these are to be run, on one cache.
        backend: the one to use (strict), by name or as an object; None: chosen as for a plain layer.
        scaled: the layer has a k_scale or v_scale that is not 1.

    Raises:
        BackendRefusedError: one was named, and says no to a spec.
        NoBackendError: none was named, and all say no to one or another.
        UnknownBackendError: the backend that was named is not installed.
    """
    named = backend if isinstance(backend, Backend) else dispatch.requested(backend)[0]
    if isinstance(named, str):
        dispatch.registry().entry(named)
    said = []
    for name in dispatch.candidates() if named is None else [named]:
        no = refusal(name, specs, scaled=scaled)
        if no is None:
            found = dispatch.registry().load(name) if isinstance(name, str) else name
            if named is None and found.name in dispatch.registry().ranked(ANY):
                warnings.warn(FallbackWarning(f"{what}: {found.name} was chosen: exact, but slow"), stacklevel=4)
            return found
        said.append(f"  {no.backend}  {no.answer}  {no}")
    passes = "\n".join(f"  {' or '.join(map(str, n)) if isinstance(n, tuple) else n}" for n in specs)
    text = f"{what} is made of these passes:\n{passes}\nand no backend runs all of them:\n" + "\n".join(said)
    raise (NoBackendError if named is None else BackendRefusedError)(text)
