"""The support table: what the kit's cases showed on this machine, and how each entry is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attn_dispatch.backend import Backend
from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checks import check_mutations, run_case
from attn_dispatch.conformance.table import Entry, Row
from attn_dispatch.dispatch import machine, registry

__all__ = ["verify", "without_hardware"]


def verify(
    name: str,
    *,
    max_tokens: int = 1 << 30,
    progress: Callable[[Case], None] | None = None,
    cases: Iterable[Case] = CASES,
) -> Row:
    """Run the kit's cases against one installed backend.

    Raises:
        UnknownBackendError, BackendLoadError: it is not installed, or cannot be loaded.
    """
    backend = registry().load(name)
    available = backend.probe()
    if not available:
        return Row(name, False, available.reason, available.version, "not run", machine().description, ())
    by_feature: dict[str, list[tuple[str, str, int]]] = {}
    for case in cases:
        if progress is not None:
            progress(case)
        by_feature.setdefault(case.feature, []).append(_try(name, case, max_tokens))
    entries = tuple(_entry(feature, found, available.evidence) for feature, found in by_feature.items())
    return Row(name, True, available.reason, available.version, available.evidence, machine().description, entries)


def without_hardware(
    backend: Backend,
    check: Callable[[Case], str],
    *,
    reason: str,
    version: str,
    machine: str,
    cases: Iterable[Case] = CASES,
) -> Row:
    """Return the row of a backend whose hardware is not here: what is known of it without having run it.

    Each case that its verdict accepts is given to `check`. The row shows what that proved instead of a yes, so that
    nothing in the table looks as if it had run; it is never "available".

    Args:
        backend: made for a machine that has the hardware, so that its verdicts speak of that one.
        check: return how a case is known: "interface" (the call was checked against the vendor's real package),
            "compiled" (by the vendor's real compiler); raise when it does not hold.
        reason: what was compared with what.
        version: of the vendor's package.
        machine: the hardware that the verdicts are for.
        cases: of the kit.
    """
    by_feature: dict[str, list[tuple[str, str, int]]] = {}
    known: set[str] = set()
    for case in cases:
        verdict = backend.verdict(case.spec)
        found = ("no", str(verdict), 0)
        if verdict:
            try:
                evidence = check(case)
            except Exception as error:  # what does not hold is the result
                found = ("FAILED", f"{case.name}: {type(error).__name__}: {error}", 0)
            else:
                known.add(evidence)
                found = (evidence, "", 0)
        by_feature.setdefault(case.feature, []).append(found)
    entries = tuple(_known_entry(feature, found) for feature, found in by_feature.items())
    return Row(backend.name, False, reason, version, " and ".join(sorted(known)), machine, entries)


def _known_entry(feature: str, found: list[tuple[str, str, int]]) -> Entry:
    """Return the entry of a feature by its weakest evidence, with what is refused beside."""
    states = [state for state, _, _ in found]
    failed = [text for state, text, _ in found if state == "FAILED"]
    refused = [text for state, text, _ in found if state == "no"]
    proven = sorted({state for state in states if state not in ("no", "FAILED")})
    if failed:
        return Entry(feature, "FAILED", "", "; ".join(dict.fromkeys(failed)), len(states), 0)
    if not proven:
        return Entry(feature, "no", "", "; ".join(dict.fromkeys(refused)), 0, 0)
    weakest = "interface" if "interface" in proven else proven[0]
    state = f"{weakest}, partly" if refused else weakest
    detail = "; ".join(dict.fromkeys(f"not {text}" for text in refused))
    return Entry(feature, state, weakest, detail, len(states) - len(refused), 0)


def _try(name: str, case: Case, max_tokens: int) -> tuple[str, str, int]:
    """Return (state, detail, mistakes noticed) of one case."""
    if case.tokens > max_tokens:
        return "not run", f"{case.tokens} tokens, limited to {max_tokens}", 0
    backend = registry().load(name)
    try:
        result = run_case(backend, case)
        if not result.verdict:
            return "no", str(result.verdict), 0
        return "yes", "", check_mutations(backend, case)
    except Exception as error:  # a vendor may raise anything; it is this table that says so
        return "FAILED", f"{case.name}: {type(error).__name__}: {error}", 0


def _entry(feature: str, found: list[tuple[str, str, int]], evidence: str) -> Entry:
    states = [state for state, _, _ in found]
    for state in ("FAILED", "yes", "no", "not run"):
        if state in states:
            break
    detail = "; ".join(dict.fromkeys(text for s, text, _ in found if text and (s != "no" or state == "no")))
    if state == "yes" and "no" in states:
        detail = "; ".join(dict.fromkeys(f"not {text}" for s, text, _ in found if s == "no"))
    return Entry(
        feature,
        "partly" if state == "yes" and "no" in states else state,
        evidence if state == "yes" else "",
        detail,
        states.count("yes") + states.count("FAILED"),
        sum(n for _, _, n in found),
    )
