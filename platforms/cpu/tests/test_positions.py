"""Positions beyond 2^24, which float32 cannot count: windows, causality and ALiBi stay exact."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad

FAR = 1 << 24


@pytest.mark.parametrize("new", [1, 20], ids=["decode", "prefill"])
@pytest.mark.parametrize("alibi", [False, True])
def test_a_window_far_out_sees_what_it_sees_nearby(new: int, alibi: bool) -> None:
    """One block again and again, so that 2^24 tokens need no memory; every row's window holds the same keys."""
    rng = np.random.default_rng(0)
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, window=(4, 0), alibi=alibi, writes_kv=False)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32) if alibi else None
    attn = ad.attention(spec, backend="cpu/numba", alibi_slopes=slopes)
    cache = attn.allocate(1)
    for array in (cache.key, cache.value):
        array[...] = rng.standard_normal(array.shape).astype(ml_dtypes.bfloat16)
    q = rng.standard_normal((new, 4, 64)).astype(ml_dtypes.bfloat16)
    results = []
    for length in (64 + new + 1, FAR + 64 + new + 1):
        table = np.zeros((1, -(-length // 32)), np.int32)
        batch = ad.AttentionMetadata.build([new], [length], table, slot_mapping=[-1] * new)
        results.append(attn.run(attn.plan(batch), q, cache=cache).astype(np.float32))
    assert np.array_equal(results[0], results[1])
