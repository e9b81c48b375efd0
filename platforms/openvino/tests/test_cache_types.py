"""What each cache type costs in bytes and in exactness, and that its blocks and tokens can be moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch import AttentionMetadata
from attn_dispatch.contract import HND, KVCache
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import CacheError
from attn_dispatch.reference import attend

NAME = "openvino/paged"

# By (dtype, cache): bytes of one token of one key head of 128, and between what the error lies that it brings
# (root mean square, relative to the result's own). Measured: 3e-7, 3.1e-4, 0.9 %, 15 %; 1.7e-3, 0.9 %, 15 %.
TYPES = {
    ("float32", "float32"): (512, 0, 1e-6),
    ("float32", "float16"): (256, 1e-4, 6e-4),
    ("float32", "uint8"): (8 + 128, 5e-3, 1.5e-2),
    ("float32", "uint4"): (8 + 64, 0.08, 0.2),
    ("bfloat16", "bfloat16"): (256, 5e-4, 4e-3),
    ("bfloat16", "uint8"): (8 + 128, 5e-3, 1.5e-2),
    ("bfloat16", "uint4"): (8 + 64, 0.08, 0.2),
}


@pytest.fixture(params=list(TYPES), ids=[f"{dtype}, {stored} cache" for dtype, stored in TYPES])
def types(request: pytest.FixtureRequest, layer: Callable[..., Any]) -> tuple[str, str]:
    dtype, stored = request.param
    verdict = registry().load(NAME).verdict(layer(dtype=dtype, kv_cache_dtype=stored).spec)
    if not verdict:
        pytest.skip(f"refused: {verdict}")
    return dtype, stored


@pytest.mark.parametrize("context", [64, 700])
def test_the_error_that_a_type_brings(layer: Callable[..., Any], types: tuple[str, str], context: int) -> None:
    token_bytes, at_least, at_most = TYPES[types]
    it = layer(num_heads=8, head_size=128, dtype=types[0], kv_cache_dtype=types[1])
    attn = it.on()
    cache = attn.allocate(22)
    assert cache.key.nbytes == cache.value.nbytes == token_bytes * 22 * 32 * 2
    table = [np.random.default_rng(0).permutation(22).tolist()]
    q, k, v = it.arrays(context)
    for tokens in (context - 1, 1):
        start = 0 if tokens > 1 else context - 1
        rows = slice(start, start + tokens)
        batch = AttentionMetadata.build([tokens], [start + tokens], table)
        out = attn.run(attn.plan(batch), q[rows], k[rows], v[rows], cache)
    exact, _ = attend(it.spec, *(x.astype(np.float64) for x in (q[-1:], k, v)), attn.parameters)
    error = np.sqrt(((out.astype(np.float64) - exact) ** 2).mean() / (exact**2).mean())
    # Too exact would be as wrong: the cache would not be of the type that was asked for.
    assert at_least <= error <= at_most


def test_a_lossy_cache_says_so() -> None:
    for stored, words in (("uint8", "1 %"), ("uint4", "15 %")):
        spec = ad.AttentionSpec(num_heads=2, head_size=64, dtype="float32", kv_cache_dtype=stored)
        verdict = ad.explain(spec, NAME).verdicts[0]
        assert words in verdict.note or not verdict


def test_precisions_are_never_openvinos_defaults(layer: Callable[..., Any]) -> None:
    """By default OpenVINO stores a float32 model's cache as u8, computes it in bf16, and pins its threads."""
    it = layer()
    attn = it.on()
    plan = attn.plan(AttentionMetadata.build([1], [1], [[0]]))
    attn.run(plan, *it.arrays(1), attn.allocate(1))
    options = {key: plan.program.property(key) for key in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")}
    assert {key: value.get_type_name() for key, value in options.items()} == dict.fromkeys(options, "f32")
    assert plan.program.property("ENABLE_CPU_PINNING") is False


def test_a_branch_takes_a_copy_of_part_of_a_block(layer: Callable[..., Any], types: tuple[str, str]) -> None:
    """Two sequences with 40 tokens in common: block 0 is shared, eight tokens of the next one are copied."""
    it = layer(dtype=types[0], kv_cache_dtype=types[1])
    attn = it.on()
    cache = attn.allocate(4)
    attn.run(attn.plan(AttentionMetadata.build([40], [40], [[3, 1]])), *it.arrays(40), cache)
    cache.copy_slots(range(1 * 32, 1 * 32 + 8), range(2 * 32, 2 * 32 + 8))
    q, k, v = (np.concatenate([x, x]) for x in it.arrays(1))
    both = attn.plan(AttentionMetadata.build([1, 1], [41, 41], [[3, 1], [3, 2]]))
    out = attn.run(both, q, k, v, cache)
    np.testing.assert_array_equal(out[0], out[1])
    # From then on they differ, and neither touches the other's.
    mine = cache.key[2].copy()
    attn.run(attn.plan(AttentionMetadata.build([1], [42], [[3, 1]])), *it.arrays(1), cache)
    np.testing.assert_array_equal(cache.key[2], mine)
    assert (cache.key[1] != cache.key[2]).any()


@pytest.mark.parametrize("how", ["copy_blocks", "copy_slots", "swap_blocks"])
def test_blocks_that_were_moved_answer_the_same(layer: Callable[..., Any], types: tuple[str, str], how: str) -> None:
    it = layer(dtype=types[0], kv_cache_dtype=types[1])
    attn = it.on()
    cache, target = attn.allocate(6), attn.allocate(6)
    attn.run(attn.plan(AttentionMetadata.build([50], [50], [[4, 1]])), *it.arrays(50), cache)
    given = it.arrays(1)
    if how == "copy_blocks":
        cache.copy_blocks([4, 1], [0, 5])
        target = cache
    elif how == "copy_slots":
        src, dst = ([32 * block + i for block in pair for i in range(32)] for pair in ([4, 1], [0, 5]))
        cache.copy_slots(src, dst)
        target = cache
    else:
        cache.swap_blocks(target, [(4, 0), (1, 5)])
    moved = target.gather([0, 5])
    for stored, copied in zip(cache.gather([4, 1]), moved, strict=True):
        np.testing.assert_array_equal(stored, copied)
    expected = attn.run(attn.plan(AttentionMetadata.build([1], [51], [[4, 1]])), *given, cache)
    found = attn.run(attn.plan(AttentionMetadata.build([1], [51], [[0, 5]])), *given, target)
    np.testing.assert_array_equal(found, expected)


def test_a_packed_cache_keeps_to_itself(layer: Callable[..., Any]) -> None:
    """Its bytes mean something to OpenVINO alone: other layouts are refused, and gather() gives the values."""
    it = layer(kv_cache_dtype="uint8")
    if not (verdict := registry().load(NAME).verdict(it.spec)):
        pytest.skip(f"refused: {verdict}")
    attn = it.on()
    cache = attn.allocate(2)
    q, k, v = it.arrays(20)
    attn.run(plan := attn.plan(AttentionMetadata.build([20], [20], [[1]])), q, k, v, cache)
    with pytest.raises(CacheError, match=r"gather\(\) gives the values"):
        cache.to_layout("HND")
    key, value = cache.gather([1])
    for stored, rows in ((key, k), (value, v)):
        wide = np.ptp(rows, axis=-1)[..., None]
        assert (np.abs(stored[0, :, :20].transpose(1, 0, 2) - rows) <= wide / 255 * 0.51).all()
    arrays = {name: np.zeros((2, 2, 32, 64), np.uint8) for name in ("key", "value")}
    plain = KVCache(registry().load("reference"), it.spec.geometry, HND, 2, arrays)
    with pytest.raises(CacheError, match="reads layout OPENVINO_U8"):
        attn.run(plan, q, k, v, plain)
