"""A NaN that a sequence writes stays in that sequence, on every backend."""

from __future__ import annotations

import numpy as np
import pytest

import attn_dispatch as ad

BACKENDS = [name for name, available in ad.backends().items() if available]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", [[40, 1, 70], [1, 1, 1]], ids=["mixed", "decode"])
def test_a_nan_reaches_no_other_sequence(backend: str, new: list[int]) -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, dtype="float32", block_size=32)
    attn = ad.attention(spec, backend)
    rng = np.random.default_rng(0)
    lens, tables = [40, 33, 70], [[0, 5], [2, 7], [1, 3, 4]]
    before = [length - n for length, n in zip(lens, new, strict=True)]
    results = []
    for poison in (False, True):
        rng = np.random.default_rng(0)
        cache = attn.allocate(8)
        if sum(before):
            rows = [rng.standard_normal((sum(before), heads, 32)).astype(np.float32) for heads in (4, 2, 2)]
            attn.run(attn.plan(ad.AttentionMetadata.build(before, before, tables, 32)), *rows, cache)
        q, k, v = (rng.standard_normal((sum(new), heads, 32)).astype(np.float32) for heads in (4, 2, 2))
        if poison:
            v[new[0] - 1] = np.nan
            k[new[0] - 1] = np.inf
        results.append(
            np.asarray(attn.run(attn.plan(ad.AttentionMetadata.build(new, lens, tables, 32)), q, k, v, cache))
        )
    np.testing.assert_array_equal(results[0][new[0] :], results[1][new[0] :])
    assert np.isnan(results[1][new[0] - 1]).any()
