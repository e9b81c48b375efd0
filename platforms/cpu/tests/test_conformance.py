"""The conformance kit: everything that the contract asks of a backend."""

from pathlib import Path

from attn_dispatch.conformance import BackendConformance


class TestNumba(BackendConformance):
    backend = "cpu/numba"
    evidence = Path(__file__).parents[3] / "docs" / "evidence" / "cpu-numba.json"
