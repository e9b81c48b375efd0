"""Caches over memory that an engine owns: every available backend computes on them exactly, or refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.errors import CacheError

BACKENDS = [name for name, available in ad.backends().items() if available]
SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, dtype="float32", block_size=32)


def views(kind: str, attn: ad.Attention, blocks: int) -> list[Any]:
    """Return (key, value) arrays of an engine, zeroed: its own, a joint array's halves, or every second block."""
    shapes = attn.backend.layout(SPEC).shapes(SPEC.geometry, blocks)
    if kind == "dense":
        return [np.zeros(shapes[name], np.float32) for name in ("key", "value")]
    if kind == "halves":
        joint = np.zeros((*shapes["key"][:-1], 64), np.float32)
        return [joint[..., :32], joint[..., 32:]]
    spread = np.zeros((2 * blocks, *shapes["key"][1:]), np.float32)
    return [spread[::2], spread[1::2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "halves", "blocks"])
def test_an_engines_memory(backend: str, kind: str) -> None:
    if not ad.explain(SPEC, backend).chosen:
        pytest.skip(str(ad.explain(SPEC, backend).verdicts[0]))
    attn = ad.attention(SPEC, backend)
    if len(attn.backend.layout(SPEC).arrays) != 2:
        with pytest.raises(CacheError, match="consists of"):
            attn.adopt(*views("dense", ad.attention(SPEC, "reference"), 8))
        return
    rng = np.random.default_rng(0)
    arrays = views(kind, attn, 8)
    allowed = {"dense": ("dense", "blocks", "strided"), "blocks": ("blocks", "strided"), "halves": ("strided",)}[kind]
    if attn.backend.capabilities.cache_views not in allowed:
        with pytest.raises(CacheError, match="contiguous"):
            attn.adopt(*arrays)
        return
    own, engines = attn.allocate(8), attn.adopt(*arrays)
    assert engines.num_blocks == 8
    results = []
    for cache in (own, engines):
        rng = np.random.default_rng(0)
        outs = []
        for new, lens in (([40, 3], [40, 3]), ([1, 1], [41, 4])):
            batch = ad.AttentionMetadata.build(new, lens, [[5, 2], [7]], 32)
            x = [rng.standard_normal((sum(new), heads, 32)).astype(np.float32) for heads in (4, 2, 2)]
            outs.append(attn.run(attn.plan(batch), *x, cache))
        results.append([*outs, *cache.gather(range(8))])
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    assert arrays[0].any()  # it is the engine's memory that was written
    np.testing.assert_array_equal(
        attn.backend.layout(SPEC).to_logical({"key": arrays[0], "value": arrays[1]})[0][5], own.gather([5])[0][0]
    )


def test_memory_that_would_lose_or_mix_tokens() -> None:
    attn = ad.attention(SPEC, "reference")
    good = np.zeros((8, 2, 32, 32), np.float32)
    other = np.zeros_like(good)
    wide = np.zeros((8, 2, 32, 64), np.float32)
    torn = np.zeros((8, 2, 32, 32, 2), np.float32)[..., 0]
    for key, value, words in (
        (torn, other, "side by side"),
        (good, good, "key and value|value and key"),
        (wide[..., :32], wide[..., 16:48], "overlap"),
        (np.broadcast_to(good[:1], (8, 2, 32, 32)).copy()[:, :1], other, "needs float32"),
        (good.astype(np.float16), other, "float16"),
        (
            np.lib.stride_tricks.as_strided(good, strides=(0, *good.strides[1:]), writeable=True),
            other,
            "overlaps itself",
        ),
        (good[:4], other, r"\(8, 2, 32, 32\)"),
        (good[::-1], other, "backwards"),
    ):
        with pytest.raises(CacheError, match=words):
            attn.adopt(key, value)
    with pytest.raises(CacheError, match="reads layout HND, the arrays are in NHD"):
        attn.adopt(good, other, layout="NHD")
    with pytest.raises(CacheError, match="cannot be made of 1 arrays"):
        attn.adopt(good)
