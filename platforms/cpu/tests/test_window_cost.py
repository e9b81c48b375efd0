"""Blocks outside a window are not read: by what is in them, and by the time that it takes."""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad


def layer(window: int, context: int) -> tuple[object, ...]:
    """A decode of one sequence, with a window (0: none)."""
    spec = ad.AttentionSpec(num_heads=32, num_kv_heads=8, window=(window - 1, 0) if window else (-1, -1))
    attn = ad.attention(spec, backend="cpu/numba")
    blocks = -(-context // 32)
    cache = attn.allocate(blocks)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((8, 32, 128)).astype(ml_dtypes.bfloat16)
    cache.key[...], cache.value[...] = pool, pool
    table = rng.permutation(blocks).astype(np.int32)[None]
    plan = attn.plan(ad.AttentionMetadata.build([1], [context], table, slot_mapping=[-1]))
    q = rng.standard_normal((1, 32, 128)).astype(ml_dtypes.bfloat16)
    return attn, plan, cache, q, table[0]


def test_what_is_outside_is_not_read() -> None:
    attn, plan, cache, q, table = layer(512, 4096)
    k = np.zeros((1, 8, 128), ml_dtypes.bfloat16)
    before = attn.run(plan, q, k, k, cache)
    cache.key[table[: (4096 - 512) // 32]] = np.nan
    cache.value[table[: (4096 - 512) // 32]] = np.nan
    after = attn.run(plan, q, k, k, cache)
    assert np.array_equal(before.view(np.int16), after.view(np.int16))


def test_cost_follows_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 512 at 32,768 costs what a context of 512 does: 1.3x, best of many turns side by side."""
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "1")
    k = np.zeros((1, 8, 128), ml_dtypes.bfloat16)
    layers = [layer(512, 32768), layer(0, 512)]
    best = [float("inf")] * 2
    for _ in range(300):
        for i, (attn, plan, cache, q, _) in enumerate(layers):
            start = time.perf_counter()
            attn.run(plan, q, k, k, cache)
            best[i] = min(best[i], time.perf_counter() - start)
    assert best[0] < 1.3 * best[1], f"{best[0] * 1e3:.3f} ms against {best[1] * 1e3:.3f} ms"
