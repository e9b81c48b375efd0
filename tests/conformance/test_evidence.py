"""Committed evidence: written one entry per line, compared with what runs, and no forgery or loss goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attn_dispatch.backend import Availability
from attn_dispatch.conformance import (
    CHECKS,
    BackendConformance,
    Row,
    differences,
    report_text,
    rows_of,
    vanished,
    verify,
)
from attn_dispatch.conformance.checklist import Check
from attn_dispatch.conformance.findings import NotRun
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.reference import ReferenceBackend

FEW = [check for check in CHECKS if check.feature in ("decode", "LSE", "uint4 cache", "merging")]


class Unable(ReferenceBackend):
    """It refuses what it accepted once."""

    def verdict(self, spec: AttentionSpec) -> object:  # type: ignore[override]
        from attn_dispatch.backend import Refusal

        return self.refuse(Refusal("returns_lse", True, "False")) if spec.returns_lse else super().verdict(spec)


class Gone(ReferenceBackend):
    """Its library was removed."""

    def probe(self) -> Availability:
        return Availability(False, "the library is not installed")


@pytest.fixture(scope="module")
def row() -> Row:
    return verify(ReferenceBackend(), checks=FEW)


def test_a_report_is_read_back_as_it_was_written_one_entry_per_line(tmp_path: Path, row: Row) -> None:
    file = tmp_path / "reference.json"
    file.write_text(report_text([row], {"name": "cpu", "description": "this one"}, "attn-dispatch verify --json"))
    assert rows_of(file) == [row]
    data = json.loads(file.read_text())
    assert {"commit", "date", "contract", "kit", "command", "machine", "rows"} == set(data)
    lines = [line for line in file.read_text().splitlines() if '"feature"' in line]
    assert len(lines) == len(row.entries)


def test_yes_only_when_everything_ran(row: Row) -> None:
    states = {entry.feature: entry.state for entry in row.entries}
    assert states == {"decode": "yes", "LSE": "yes", "uint4 cache": "no", "merging": "yes"}

    def not_run(backend: object, limits: object) -> None:
        raise NotRun("no memory")

    partly = verify(ReferenceBackend(), checks=[*FEW, Check("far", "decode", not_run)])
    entry = next(entry for entry in partly.entries if entry.feature == "decode")
    assert entry.state == f"yes, {len(entry.cases)} of {len(entry.cases) + 1}"
    assert "not no memory" in entry.detail


def test_the_same_run_has_no_differences(row: Row) -> None:
    assert differences(row, verify(ReferenceBackend(), checks=FEW)) == []


@pytest.mark.parametrize("field", ["state", "cases", "mutations", "detail"])
def test_a_forged_entry_is_a_difference(row: Row, field: str) -> None:
    entry = row.entries[0]
    forged = replace(
        entry, **{field: {"state": "no", "cases": entry.cases[1:], "mutations": 999, "detail": "x"}[field]}
    )
    assert differences(replace(row, entries=(forged, *row.entries[1:])), row)
    assert differences(row, replace(row, entries=(forged, *row.entries[1:])))


def test_a_backend_that_begins_to_refuse_is_named_with_its_cases(row: Row) -> None:
    lines = vanished(row, verify(Unable(), checks=FEW))
    assert "LSE float32: passed then, and does not now" in lines
    assert not [line for line in lines if line.startswith("decode")]


def test_a_backend_that_vanishes_is_named(row: Row) -> None:
    assert vanished(row, verify(Gone(), checks=FEW)) == ["reference is not available: the library is not installed"]


def test_the_class_compares_with_committed_evidence(tmp_path: Path, row: Row) -> None:
    file = tmp_path / "row.json"

    def judge(committed: Row, backend: ReferenceBackend) -> None:
        file.write_text(report_text([committed], {"name": "", "description": ""}, ""))

        class Judged(BackendConformance):
            evidence = file

        Judged.backend = backend
        judged = Judged()
        for check in FEW:
            try:
                judged.test_check(check)
            except pytest.skip.Exception:
                continue
        judged.test_what_ran_is_what_is_committed()

    judge(row, ReferenceBackend())
    with pytest.raises(AssertionError, match="LSE float32: passed then"):
        judge(row, Unable())


def test_a_library_that_was_removed_fails_where_evidence_says_that_it_ran(tmp_path: Path, row: Row) -> None:
    file = tmp_path / "row.json"
    file.write_text(report_text([row], {"name": "", "description": ""}, ""))

    class Judged(BackendConformance):
        backend = Gone()
        evidence = file

    with pytest.raises(AssertionError, match="the library is not installed"):
        Judged._must_be_here.__wrapped__(Judged())  # type: ignore[attr-defined]
