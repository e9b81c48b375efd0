"""The mark of tests that compare calls with a vendor's signatures where its hardware is not here."""

from __future__ import annotations

import os

import pytest

# Read when torch is imported. On a machine that others use too, threads that spin while they wait take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interface: compares with a vendor's real package; runs none of its kernels")
