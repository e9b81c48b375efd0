"""The kit: on a GPU all of it; in Triton's interpreter (TRITON_INTERPRET=1) fewer random problems."""

from __future__ import annotations

import pytest

from attn_dispatch import Backend
from attn_dispatch.conformance import BackendConformance, checks
from attn_dispatch.conformance.checks import Outcome
from attn_dispatch.conformance.problem import Problem
from attn_dispatch_triton.paged import interpreted


class TestPaged(BackendConformance):
    backend = "triton/paged"
    examples = 16 if interpreted() else 60

    @pytest.fixture(autouse=True)
    def _computed_once(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the interpreter a named case is computed once, and judged by both of its tests."""
        name = request.node.originalname
        if not interpreted() or name not in ("test_case", "test_mistake_is_noticed"):
            return
        case, compute = request.getfixturevalue("case"), checks.compute

        def once(backend: Backend, problem: Problem) -> Outcome:
            if case.name not in _OUTCOMES:
                _OUTCOMES[case.name] = compute(backend, problem)
            return _OUTCOMES[case.name]

        monkeypatch.setattr(checks, "compute", once)


_OUTCOMES: dict[str, Outcome] = {}
