"""The conformance kit, public: what a backend must do to be one, as cases, checks and a pytest class.

`CHECKS` is the one list of checks: `verify` runs it (and `attn-dispatch verify`), and so does `BackendConformance`. All
of it needs NumPy alone; only the class needs pytest (the extra `attn-dispatch[conformance]`).
"""

from typing import TYPE_CHECKING, Any

from attn_dispatch.conformance.adaptation import adapt_case
from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checklist import CHECKS, FEATURES, Check, Finding, Limits, perform
from attn_dispatch.conformance.checks import check_mutations, run_case
from attn_dispatch.conformance.findings import ConformanceError, NotRun, Refused
from attn_dispatch.conformance.report import differences, vanished, verify, without_hardware
from attn_dispatch.conformance.table import Row, as_markdown, report_text, rows_of

if TYPE_CHECKING:
    from attn_dispatch.conformance.suite import BackendConformance

__all__ = [
    "CASES",
    "CHECKS",
    "FEATURES",
    "BackendConformance",
    "Case",
    "Check",
    "ConformanceError",
    "Finding",
    "Limits",
    "NotRun",
    "Refused",
    "Row",
    "adapt_case",
    "as_markdown",
    "check_mutations",
    "differences",
    "perform",
    "report_text",
    "rows_of",
    "run_case",
    "vanished",
    "verify",
    "without_hardware",
]


def __getattr__(name: str) -> Any:
    # `verify` runs on machines without pytest; only the class needs it.
    if name == "BackendConformance":
        from attn_dispatch.conformance.suite import BackendConformance

        return BackendConformance
    raise AttributeError(name)
