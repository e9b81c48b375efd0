"""The kit as a pytest class: what a backend's whole test file inherits.

    from attn_dispatch.conformance import BackendConformance

    class TestPaged(BackendConformance):
        backend = "mine/paged"

A check whose spec the backend refuses is skipped with that verdict; there is no other list of what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest

from attn_dispatch.backend import Backend
from attn_dispatch.conformance.checklist import CHECKS, Check, Finding, Limits, limits_of, perform
from attn_dispatch.conformance.report import differences, row_of, vanished
from attn_dispatch.conformance.table import Row, rows_of
from attn_dispatch.dispatch import registry

__all__ = ["BackendConformance"]


class BackendConformance:
    """Every clause of the contract, against one backend.

    Attributes:
        backend: its name as installed, or a `Backend`.
        examples: random problems to try (None: as many as the kit does).
        max_tokens: cases with a longer sequence are not run (None: no limit, but for simulators).
        max_scores: likewise for cases that compute more scores.
        left_out: checks that are not run, with the reason.
        evidence: the report in which this backend's row is kept. What passed then must pass now, and where everything
            was run, the row must be what it says: `attn-dispatch verify --backend B --json > FILE` writes it.
    """

    backend: ClassVar[str | Backend]
    examples: ClassVar[int | None] = None
    max_tokens: ClassVar[int | None] = None
    max_scores: ClassVar[int | None] = None
    left_out: ClassVar[Mapping[str, str]] = MappingProxyType({})
    evidence: ClassVar[Path | None] = None
    _findings: ClassVar[dict[str, Finding]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._findings = {}

    @classmethod
    def subject(cls) -> Backend:
        """Return the backend under test."""
        return registry().load(cls.backend) if isinstance(cls.backend, str) else cls.backend

    @classmethod
    def committed(cls) -> Row | None:
        """Return the row of `evidence`, of a backend that ran."""
        rows = [] if cls.evidence is None else rows_of(cls.evidence)
        return next((row for row in rows if row.backend == cls.subject().name and row.available), None)

    @classmethod
    def limits(cls, backend: Backend) -> Limits:
        """Return how much is run."""
        limits = limits_of(backend)
        own = {"tokens": cls.max_tokens, "scores": cls.max_scores, "examples": cls.examples}
        return replace(limits, **{name: limit for name, limit in own.items() if limit is not None})

    @pytest.fixture(autouse=True)
    def _must_be_here(self) -> None:
        available = self.subject().probe()
        if not available:
            assert self.committed() is None, f"{self.evidence} shows that it ran here: {available.reason}"
            pytest.skip(f"not run: {available.reason}")

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
    def test_check(self, check: Check) -> None:
        """One check of the kit: refused is skipped with the verdict."""
        backend = self.subject()
        if check.name in self.left_out:
            pytest.skip(f"not run: {self.left_out[check.name]}")
        finding = perform(check, backend, self.limits(backend))
        type(self)._findings[check.name] = finding
        if finding.error is not None:
            raise finding.error
        if finding.state != "passed":
            pytest.skip(f"{finding.state}: {finding.detail}")

    def test_what_ran_is_what_is_committed(self) -> None:
        """Some case ran; nothing vanished that ran before; and the committed row is true."""
        backend, findings = self.subject(), self._findings
        everything = all(check.name in findings for check in CHECKS)
        if not findings:
            pytest.skip("not run: no check was run before this")
        row = row_of(backend, backend.probe(), findings.values())
        if everything or self.left_out:
            nothing = [
                entry.detail for entry in row.entries if entry.state == "FAILED" and "ran none of" in entry.detail
            ]
            assert not nothing, nothing[0]
        committed = self.committed()
        if committed is None:
            return
        if everything and self.limits(backend) == limits_of(backend):
            lines = differences(committed, row)
        else:
            partial = replace(row, entries=tuple(e for e in row.entries if self._complete(e.feature)))
            lines = vanished(committed, partial)
        assert not lines, f"{self.evidence} is not what ran here:\n" + "\n".join(lines)

    def _complete(self, feature: str) -> bool:
        """Tell whether every check of a feature was run."""
        return all(check.name in self._findings for check in CHECKS if check.feature == feature)
