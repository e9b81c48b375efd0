"""The reference is the oracle of everything else, so it is compared with arithmetic that is written out here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attn_dispatch import AttentionSpec
from attn_dispatch.conformance import BackendConformance
from attn_dispatch.conformance.tolerance import attend_rounded
from attn_dispatch.contract import LayerParameters
from attn_dispatch.reference import attend


class TestReference(BackendConformance):
    backend = "reference"
    evidence = Path(__file__).parents[1] / "docs" / "evidence" / "reference.json"


@pytest.mark.parametrize("function", [attend, attend_rounded])
@pytest.mark.parametrize("sinks", [True, False])
def test_rows_without_keys_are_zero_whatever_memory_held_before(function: object, sinks: bool) -> None:
    """Padding rows once came out as NaN, in one process of a hundred: `np.einsum` over an axis of no elements."""
    spec = AttentionSpec(num_heads=3, num_kv_heads=3, head_size=8, sinks=sinks, dtype="float32")
    given = {"sinks": np.array([0.5, -1.0, 2.0], np.float32)} if sinks else {}
    layer = LayerParameters(spec, **given)
    none = np.zeros((0, 3, 8))
    for _ in range(50):
        junk = [np.full((2, 3, 8), np.nan) for _ in range(6)]
        del junk
        out, lse = function(spec, np.ones((2, 3, 8)), none, none, layer)  # type: ignore[operator]
        assert not out.any()
        assert np.allclose(lse, given.get("sinks", -np.inf))
