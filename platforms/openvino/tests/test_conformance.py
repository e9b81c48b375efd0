"""The conformance kit on the real runtime."""

from importlib.metadata import version
from pathlib import Path

from attn_dispatch.conformance import BackendConformance

EVIDENCE = Path(__file__).parents[3] / "docs" / "evidence" / "openvino-paged.json"


class TestPaged(BackendConformance):
    backend = "openvino/paged"
    # The report is of this release; others refuse more.
    evidence = EVIDENCE if version("openvino").startswith("2026.4.") else None
