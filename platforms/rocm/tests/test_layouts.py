"""vLLM's cache shape: where each element lies, and conversions that lose no bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.contract import HND, NHD, AttentionSpec, CacheLayout
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.contract.layout import layout_named
from attn_dispatch.errors import CacheError
from attn_dispatch_rocm.layouts import VLLM_X4, VLLM_X8, VLLM_X16, vllm_layout

TYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8")


def filled(spec: AttentionSpec, blocks: int, layout: CacheLayout) -> Any:
    """A cache of the reference with random bits in it, all of them (NaN too)."""
    cache = ad.attention(spec, "reference").allocate(blocks)
    rng = np.random.default_rng(0)
    for array in cache.arrays.values():
        array.view(np.uint8)[...] = rng.integers(0, 256, array.view(np.uint8).shape, np.uint8)
    return cache.to_layout(layout)


def bits(array: Any) -> Any:
    return np.ascontiguousarray(array).view(np.uint8)


def spec(stored: str, **fields: Any) -> AttentionSpec:
    plain = {"num_heads": 6, "num_kv_heads": 3, "head_size": 32, "block_size": 16, "dtype": "float32"}
    return AttentionSpec(**(plain | {"kv_cache_dtype": stored} | fields))


@pytest.mark.parametrize("stored", TYPES)
def test_shapes_and_places(stored: str) -> None:
    """Keys [N, K, D/x, B, x], values [N, K, D, B]: element by element, by the formula of vLLM's kernels."""
    layer = spec(stored)
    layout = vllm_layout(stored)
    x = 16 // numpy_dtype(stored).itemsize
    cache = filled(layer, 5, layout)
    assert cache.key.shape == (5, 3, 32 // x, 16, x)
    assert cache.value.shape == (5, 3, 32, 16)
    key, value = cache.gather(range(5))
    for n, k, b, d in [(0, 0, 0, 0), (4, 2, 15, 31), (2, 1, 7, 13), (1, 2, 3, 30)]:
        assert bits(cache.key[n, k, d // x, b, d % x]).tolist() == bits(key[n, k, b, d]).tolist()
        assert bits(cache.value[n, k, d, b]).tolist() == bits(value[n, k, b, d]).tolist()


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("other", [HND, NHD], ids=str)
def test_conversions_lose_no_bit(stored: str, other: CacheLayout) -> None:
    layer = spec(stored)
    cache = filled(layer, 7, other)
    back = cache.to_layout(vllm_layout(stored).name).to_layout(other)
    for name in ("key", "value"):
        assert np.array_equal(bits(cache.arrays[name]), bits(back.arrays[name]))
        assert not np.shares_memory(cache.arrays[name], back.arrays[name])


def test_by_numpy_alone() -> None:
    """Against the permutation written out, with values wider than keys."""
    layer = spec("float16", head_size=40, value_head_size=64)
    cache = filled(layer, 3, HND)
    packed = cache.to_layout("vLLM x8")
    expected = cache.key.reshape(3, 3, 16, 5, 8).transpose(0, 1, 3, 2, 4)
    assert np.array_equal(bits(packed.key), bits(expected))
    assert np.array_equal(bits(packed.value), bits(cache.value.transpose(0, 1, 3, 2)))


def test_blocks_and_slots_move_in_it() -> None:
    layer = spec("bfloat16")
    plain = filled(layer, 6, HND)
    packed = plain.to_layout("vLLM x8")
    for cache in (plain, packed):
        cache.copy_blocks([0, 3], [3, 5])
        cache.copy_slots([2, 17, 40], [81, 3, 2])
    for one, two in zip(plain.gather(range(6)), packed.gather(range(6)), strict=True):
        assert np.array_equal(bits(one), bits(two))
    other = filled(layer, 6, HND).to_layout("vLLM x8")
    packed.swap_blocks(other, [(5, 0), (1, 4)])
    assert np.array_equal(bits(other.gather([0, 4])[0]), bits(packed.gather([5, 1])[0]))


def test_which_layout_holds_which_type() -> None:
    assert (vllm_layout("float32"), vllm_layout("bfloat16"), vllm_layout("float8_e5m2")) == (VLLM_X4, VLLM_X8, VLLM_X16)
    assert layout_named("vLLM x16") is VLLM_X16
    with pytest.raises(CacheError, match="1, 2 or 4 bytes"):
        vllm_layout("float64")
    with pytest.raises(CacheError, match="not a multiple"):
        VLLM_X8.shapes(spec("float16", head_size=36).geometry, 2)
