"""What the kit's checks showed of a backend on this machine, as a row of the support table, and how rows compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attn_dispatch.backend import Availability, Backend
from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checklist import CHECKS, Check, Finding, Limits, limits_of, perform
from attn_dispatch.conformance.table import Entry, Row
from attn_dispatch.dispatch import machine, registry

__all__ = ["differences", "row_of", "vanished", "verify", "without_hardware"]

_VARYING = frozenset({"random problems", "blocks beyond 2 GiB"})
"""Features that differ from run to run: by what is drawn, by how much memory is free."""


def verify(
    backend: str | Backend,
    *,
    limits: Limits | None = None,
    progress: Callable[[Check], None] | None = None,
    checks: Iterable[Check] = CHECKS,
) -> Row:
    """Run the kit against a backend.

    Args:
        backend: its name as installed, or the object.
        limits: how much is run (None: all of it, or the subset for simulators).
        progress: called before each check.
        checks: of the kit.

    Raises:
        UnknownBackendError, BackendLoadError: it is not installed, or cannot be loaded.
    """
    subject = registry().load(backend) if isinstance(backend, str) else backend
    available = subject.probe()
    if not available:
        return Row(subject.name, False, available.reason, available.version, "not run", machine().description, ())
    findings = []
    for check in checks:
        if progress is not None:
            progress(check)
        findings.append(perform(check, subject, limits or limits_of(subject)))
    return row_of(subject, available, findings)


def row_of(backend: Backend, available: Availability, findings: Iterable[Finding]) -> Row:
    """Return a backend's row: one entry per feature. A backend that is here and ran no case has failed."""
    findings = list(findings)
    names = {case.name for case in CASES}
    cases = [finding for finding in findings if finding.check in names]
    by_feature: dict[str, list[Finding]] = {}
    for finding in findings:
        by_feature.setdefault(finding.feature, []).append(finding)
    entries = [_entry(feature, group, available.evidence) for feature, group in by_feature.items()]
    if cases and all(finding.state in ("refused", "not run") for finding in cases):
        text = f"{backend.name} is available and ran none of {len(cases)} cases: {cases[0].detail}"
        entries.insert(0, Entry("the kit itself", "FAILED", "", text, ()))
    return Row(
        backend.name,
        True,
        available.reason,
        available.version,
        available.evidence,
        machine().description,
        tuple(entries),
    )


def _entry(feature: str, findings: list[Finding], evidence: str) -> Entry:
    states = [finding.state for finding in findings]
    passed = tuple(finding.check for finding in findings if finding.state == "passed")
    mutations = sum(len(finding.mutations) for finding in findings)
    detail = "; ".join(dict.fromkeys(f"not {f.detail}" for f in findings if f.state in ("refused", "not run")))
    if "FAILED" in states:
        failed = "; ".join(dict.fromkeys(f.detail for f in findings if f.state == "FAILED"))
        return Entry(feature, "FAILED", "", failed, passed, mutations)
    if not passed:
        state = "no" if "refused" in states else "not run"
        own = (f.detail for f in findings if f.state == ("refused" if state == "no" else "not run"))
        return Entry(feature, state, "", "; ".join(dict.fromkeys(own)), (), 0)
    state = "yes" if len(passed) == len(findings) else f"yes, {len(passed)} of {len(findings)}"
    return Entry(feature, state, evidence, detail, passed, mutations)


def vanished(committed: Row, anew: Row) -> list[str]:
    """Return what a committed row shows and this machine does not: the backend, or cases that it accepted then."""
    if committed.available and not anew.available:
        return [f"{committed.backend} is not available: {anew.reason}"]
    passed = {case for entry in anew.entries for case in entry.cases}
    ran = {entry.feature for entry in anew.entries}
    return [
        f"{case}: passed then, and does not now"
        for entry in committed.entries
        if entry.feature in ran - _VARYING
        for case in entry.cases
        if case not in passed
    ]


def differences(committed: Row, anew: Row) -> list[str]:
    """Return where a committed row is not what was found anew: a stale entry, or one that nobody measured."""
    lines = vanished(committed, anew)
    if committed.version != anew.version:
        lines.append(f"the committed row is of version {committed.version}, here is {anew.version}")
    then, now = ({entry.feature: entry for entry in row.entries} for row in (committed, anew))
    for feature in dict.fromkeys([*then, *now]):
        old, new = then.get(feature), now.get(feature)
        if feature not in _VARYING and old != new:
            lines.append(f"{feature}: the committed entry is {_brief(old)}, found was {_brief(new)}")
    return lines


def _brief(entry: Entry | None) -> str:
    if entry is None:
        return "absent"
    detail = f" ({entry.detail[:200]})" if entry.detail else ""
    return f"{entry.state!r} of {len(entry.cases)} checks, {entry.mutations} mistakes noticed{detail}"


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
        backend: of a machine that has the hardware, so that its verdicts are that one's.
        check: return how a case is known ("bound", "computed", "compiled": see `docs/make_support.py`); raise when it
            does not hold.
        reason: what was compared with what.
        version: of the vendor's package.
        machine: the hardware that the verdicts are for.
        cases: of the kit.
    """
    by_feature: dict[str, list[Finding]] = {}
    known: set[str] = set()
    for case in cases:
        verdict = backend.verdict(case.spec)
        finding = Finding(case.name, case.feature, "refused", str(verdict))
        if verdict:
            try:
                evidence = check(case)
            except Exception as error:  # what does not hold is the result
                text = f"{case.name}: {type(error).__name__}: {error}"
                finding = Finding(case.name, case.feature, "FAILED", text)
            else:
                known.add(evidence)
                finding = Finding(case.name, case.feature, evidence)
        by_feature.setdefault(case.feature, []).append(finding)
    entries = tuple(_known_entry(feature, findings) for feature, findings in by_feature.items())
    return Row(backend.name, False, reason, version, " and ".join(sorted(known)), machine, entries)


def _known_entry(feature: str, findings: list[Finding]) -> Entry:
    """Return the entry of a feature by its weakest evidence, with what is refused beside."""
    failed = [finding.detail for finding in findings if finding.state == "FAILED"]
    refused = list(dict.fromkeys(finding.detail for finding in findings if finding.state == "refused"))
    proven = {finding.check: finding.state for finding in findings if finding.state not in ("refused", "FAILED")}
    if failed:
        return Entry(feature, "FAILED", "", "; ".join(dict.fromkeys(failed)), tuple(proven))
    if not proven:
        return Entry(feature, "no", "", "; ".join(refused), ())
    weakest = next((name for name in ("bound", "interface") if name in proven.values()), min(proven.values()))
    state = f"{weakest}, partly" if refused else weakest
    return Entry(feature, state, weakest, "; ".join(f"not {text}" for text in refused), tuple(proven))
