"""What `Attention` refuses before a kernel sees it: outputs, plans and caches that would end in wrong results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.errors import ArrayError, CacheError, MetadataError, PlanError, SpecError

SPEC = ad.AttentionSpec(num_heads=2, head_size=16, dtype="float32", block_size=8)


def step() -> tuple[ad.Attention, Any, list[Any], ad.KVCache]:
    attn = ad.attention(SPEC, "reference")
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((3, 2, 16)).astype(np.float32) for _ in range(3)]
    return attn, attn.plan(ad.AttentionMetadata.build([3], [3], [[1]], 8)), rows, attn.allocate(2)


def refused(error: type[Exception], words: str, out: Any = None, **replaced: Any) -> None:
    attn, plan, (q, k, v), cache = step()
    arrays = {"q": q, "k": k, "v": v} | replaced
    before = cache.key.copy()
    with pytest.raises(error, match=words):
        attn.run(plan, arrays["q"], arrays["k"], arrays["v"], cache, out)
    np.testing.assert_array_equal(cache.key, before)


def test_an_output_that_cannot_be_written() -> None:
    out = np.zeros((3, 2, 16), np.float32)
    out.flags.writeable = False
    refused(ArrayError, "out is read-only", out)
    refused(ArrayError, "out is read-only", np.frombuffer(bytes(3 * 2 * 16 * 4), np.float32).reshape(3, 2, 16))


def test_an_output_that_shares_memory() -> None:
    q = np.zeros((3, 2, 16), np.float32)
    refused(ArrayError, "out and q overlap", q, q=q)
    wide = np.zeros((4, 2, 16), np.float32)
    refused(ArrayError, "out and v overlap", wide[1:], v=wide[:3])
    refused(ArrayError, "overlaps itself", np.lib.stride_tricks.as_strided(q, strides=(0, 64, 4)))
    attn, plan, (q, k, v), cache = step()
    pair = np.zeros((3, 4, 16), np.float32)  # interleaved, but apart
    out = attn.run(plan, pair[:, ::2], k, v, cache, pair[:, 1::2])
    assert out.base is pair


def test_arrays_that_are_not_what_they_show() -> None:
    q = np.zeros((3, 2, 16), np.float32)
    refused(ArrayError, "q: .*byte order", q=q.astype(">f4"))
    refused(ArrayError, "k: .*MaskedArray", k=np.ma.masked_array(q))


def test_a_plan_of_another_backend() -> None:
    attn, plan, (q, k, v), cache = step()
    plan.backend = "cpu/numba"
    with pytest.raises(PlanError, match="made by cpu/numba, this layer runs on reference"):
        attn.run(plan, q, k, v, cache)


def test_queries_before_the_first_key() -> None:
    attn = ad.attention(SPEC, "reference")
    with pytest.raises(MetadataError, match="sequence 0: 3 queries over 2 keys"):
        attn.plan(ad.AttentionMetadata.read_only([3], [2], [[0]], 8))


def test_a_cache_is_what_its_layout_says() -> None:
    attn, *_ = step()
    good = {"key": np.zeros((4, 2, 8, 16), np.float32), "value": np.zeros((4, 2, 8, 16), np.float32)}
    ad.KVCache(attn.backend, SPEC.geometry, ad.HND, 4, good)
    for bad, words in (
        ({"key": good["key"][:3]}, r"key array is float32 \(3, 2, 8, 16\).*4 blocks.*needs float32 \(4, 2, 8, 16\)"),
        ({"value": good["value"].astype(np.float16)}, "value array is float16"),
        ({"values": good["value"]}, "consists of key, value"),
        ({"key": np.broadcast_to(good["key"][:1], (4, 2, 8, 16))}, "key array is read-only"),
    ):
        with pytest.raises(CacheError, match=words):
            ad.KVCache(attn.backend, SPEC.geometry, ad.HND, 4, good | bad)


def test_memory_that_cannot_be_had() -> None:
    attn = ad.attention(SPEC, "reference")
    with pytest.raises(CacheError, match=r"num_blocks=1000000000000 of .* cannot be had"):
        attn.allocate(10**12)
    with pytest.raises(CacheError, match="device='cuda:0': reference keeps its caches in host memory"):
        attn.allocate(4, "cuda:0")
    assert attn.allocate(1, "cpu").device == "cpu"


def test_sinks_are_finite_or_absent() -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=16, sinks=True)
    with pytest.raises(SpecError, match="infinity"):
        ad.attention(spec, "reference", sinks=np.array([0, np.inf], np.float32))
    ad.attention(spec, "reference", sinks=np.array([0, -np.inf], np.float32))
