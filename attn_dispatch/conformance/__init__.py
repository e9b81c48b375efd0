"""The conformance kit, public: what a backend must do to be one, as cases, checks and a pytest class.

`cases`, `checks`, `rejections`, `storage`, `merging`, `report` and `table` need NumPy alone; `BackendConformance` needs
pytest and hypothesis (the extra `attn-dispatch[conformance]`).
"""

from typing import TYPE_CHECKING, Any

from attn_dispatch.conformance.cases import CASES, FEATURES, Case
from attn_dispatch.conformance.checks import ConformanceError, check_mutations, run_case
from attn_dispatch.conformance.report import verify, without_hardware
from attn_dispatch.conformance.table import Row, as_markdown, report_text

if TYPE_CHECKING:
    from attn_dispatch.conformance.suite import BackendConformance

__all__ = [
    "CASES",
    "FEATURES",
    "BackendConformance",
    "Case",
    "ConformanceError",
    "Row",
    "as_markdown",
    "check_mutations",
    "report_text",
    "run_case",
    "verify",
    "without_hardware",
]


def __getattr__(name: str) -> Any:
    # `verify` runs on machines without pytest; only the class needs it.
    if name == "BackendConformance":
        from attn_dispatch.conformance.suite import BackendConformance

        return BackendConformance
    raise AttributeError(name)
