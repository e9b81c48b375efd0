"""Variants over a layout that keeps keys and values in one array. What they compute: `tests/variants -k tpu/pallas`."""

from __future__ import annotations

import pytest

import attn_dispatch as ad
from attn_dispatch.variants import Differential


@pytest.mark.parametrize("head_size", [65, 96, 128])
def test_differential_layers_that_take_four_passes_are_refused_when_they_are_made(head_size: int) -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=4, head_size=head_size, dtype="float32")
    with pytest.raises(ad.errors.BackendRefusedError, match=f"head_size={head_size}: .*one array of keys and values"):
        Differential(spec, 0.3, 0.8, backend="tpu/pallas")
    with pytest.warns(ad.errors.FallbackWarning):
        assert Differential(spec, 0.3, 0.8).backend == "reference"


def test_differential_layers_that_take_fewer_run() -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=4, head_size=64, dtype="float32")
    assert Differential(spec, 0.3, 0.8, backend="tpu/pallas").form == "one"
