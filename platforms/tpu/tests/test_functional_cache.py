"""The one live version of a cache: updated in place, and an error to look at once it is replaced."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.errors import ArrayError, CacheError

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32", block_size=16)
BATCH = ad.AttentionMetadata.build([1, 3], [20, 3], [[2, 0], [3]], 16)


def arrays(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((4, h, 64), np.float32)) for h in (4, 2, 2))  # type: ignore[return-value]


def layer() -> tuple[ad.Attention, ad.KVCache]:
    attn = ad.attention(SPEC, "tpu/pallas")
    return attn, attn.allocate(5)


def test_an_array_taken_before_a_step_is_dead_after_it() -> None:
    attn, cache = layer()
    before = cache.arrays["pages"]
    attn.run(attn.plan(BATCH), *arrays(), cache)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(before)
    assert not cache.arrays["pages"].is_deleted()


@pytest.mark.parametrize("change", ["run", "copy_blocks", "copy_slots", "swap_blocks"])
def test_every_change_is_in_place(change: str) -> None:
    attn, cache = layer()
    attn.run(attn.plan(BATCH), *arrays(), cache)
    address, before = cache.arrays["pages"].unsafe_buffer_pointer(), cache.arrays["pages"]
    if change == "run":
        attn.run(attn.plan(BATCH), *arrays(1), cache)
    elif change == "copy_blocks":
        cache.copy_blocks([2], [1])
    elif change == "copy_slots":
        cache.copy_slots([2], [1])
    else:
        attn.allocate(2).swap_blocks(cache, [(0, 1)])
    assert before.is_deleted()
    assert cache.arrays["pages"].unsafe_buffer_pointer() == address


def test_a_layer_that_shares_a_cache_leaves_it_alone() -> None:
    attn, cache = layer()
    attn.run(attn.plan(BATCH), *arrays(), cache)
    pages = cache.arrays["pages"]
    reader = ad.attention(replace(SPEC, writes_kv=False), "tpu/pallas")
    reader.run(reader.plan(BATCH), arrays(1)[0], cache=cache)
    assert cache.arrays["pages"] is pages
    assert not pages.is_deleted()


def test_pages_that_somebody_else_donated_are_an_error_before_anything_runs() -> None:
    attn, cache = layer()
    jax.jit(lambda x: x + 1, donate_argnums=0)(cache.arrays["pages"])
    with pytest.raises(CacheError, match="deleted"):
        attn.run(attn.plan(BATCH), *arrays(), cache)


def test_views_that_would_go_stale_are_not_given() -> None:
    _, cache = layer()
    assert cache.arrays_as("jax")["pages"] is cache.arrays["pages"]
    with pytest.raises(CacheError, match="stale"):
        cache.arrays_as("numpy")


def test_what_gather_gave_outlives_the_step() -> None:
    attn, cache = layer()
    attn.run(attn.plan(BATCH), *arrays(), cache)
    key, _ = cache.gather([2])
    kept = np.asarray(key).copy()
    attn.run(attn.plan(BATCH), *arrays(1), cache)
    assert np.array_equal(np.asarray(key), kept)


def test_out_that_cannot_be_written_is_refused_before_anything_is_written() -> None:
    attn, cache = layer()
    pages = cache.arrays["pages"]
    with pytest.raises(ArrayError, match="out="):
        attn.run(attn.plan(BATCH), *arrays(), cache, out=jnp.zeros((4, 4, 64)))
    assert cache.arrays["pages"] is pages


def test_a_cache_of_another_backend_in_this_layout_is_refused() -> None:
    attn, _ = layer()
    reference = ad.attention(SPEC, "reference").allocate(5)
    converted = reference.to_layout(attn.backend.layout(SPEC))
    with pytest.raises(CacheError, match="tpu/pallas"):
        attn.run(attn.plan(BATCH), *arrays(), converted)


def test_run_inside_jit_names_the_function_that_works_there() -> None:
    attn, cache = layer()
    plan, pages = attn.plan(BATCH), cache.arrays["pages"]
    with pytest.raises(ArrayError, match="step"):
        jax.jit(lambda q, k, v: attn.run(plan, q, k, v, cache))(*arrays())
    assert cache.arrays["pages"] is pages


def test_step_is_what_run_computes_and_works_inside_jit() -> None:
    attn, cache = layer()
    plan = attn.plan(BATCH)
    expected = attn.run(plan, *arrays(), cache)

    @jax.jit
    def model(q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, pages = attn.backend.step(plan, q, k, v, pages, attn.parameters)  # type: ignore[attr-defined]
        return 2 * out, pages

    out, pages = model(*arrays(), attn.allocate(5).arrays["pages"])
    assert np.array_equal(np.asarray(out), 2 * np.asarray(expected))
    assert np.array_equal(np.asarray(pages), np.asarray(cache.arrays["pages"]))
