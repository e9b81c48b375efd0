"""Differential attention against the paper's equations, in each of its forms, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import papers
import pytest
from scenes import BACKENDS, BATCHES, Scene, agrees, check, host, made, make_scene, own, poison

import attn_dispatch as ad
from attn_dispatch.cache import CacheManager, ScheduledStep
from attn_dispatch.contract.arrays import as_numpy
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import ArrayError, CacheError, SpecError
from attn_dispatch.variants import DIFFERENTIAL, Differential, reference_cache

LAMBDA, LAMBDA_INIT = 0.63, 0.4


def spec_of(**fields: Any) -> ad.AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "head_size": 32, "dtype": "float32", "block_size": 32}
    return ad.AttentionSpec(**(plain | fields))


def layer_of(spec: ad.AttentionSpec, backend: str, form: Any = None, weight: Any = None, **named: Any) -> Any:
    found = made(lambda: Differential(spec, named.pop("lam", LAMBDA), LAMBDA_INIT, form=form, backend=backend, **named))
    if weight is not None:
        found.allocate(1)  # its library is imported now
        found.norm_weight = own(found, weight)
    return found


def compute(layer: Differential, scene: Scene) -> Any:
    cache = layer.allocate(scene.num_blocks)
    poison(cache)
    for context in (True, False):
        batch = scene.batch(context=context)
        if not batch.num_tokens:
            continue
        heads = (scene.spec.num_heads, scene.spec.head_size)
        q = np.ones((batch.num_tokens, *heads), numpy_dtype(scene.spec.dtype)) if context else np.concatenate(scene.q)
        k, v = (scene.rows(x, context=context) for x in (scene.keys, scene.values))
        found = layer.run(layer.plan(batch), own(layer, q), own(layer, k), own(layer, v), cache)
    return host(found)


def paper(scene: Scene, lam: Any = LAMBDA, init: float = LAMBDA_INIT, weight: Any = None, to: Any = papers.exact,
          order: Any = None, window: int | None = None) -> Any:  # fmt: skip
    def one(s: int, q: Any, k: Any, v: Any) -> Any:
        seen = papers.causal(len(q), len(k))
        if window is not None:
            seen = papers.longformer_seen(len(q), len(k), window, None, set())
        if order is not None:
            q = q[:, order]
        return papers.differential(q, k, v, scene.spec.scale, seen, lam, init, weight, to=to)

    return scene.solve(one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["one", "two", "four"])
def test_differential(backend: str, name: str, dtype: str, form: str) -> None:
    spec = spec_of(dtype=dtype)
    scene = make_scene(spec, *BATCHES[name])
    weight = np.random.default_rng(9).uniform(0.5, 1.5, 64).astype(np.float32)
    layer = layer_of(spec, backend, form, weight)
    assert (layer.backend, layer.form) == (backend, form)
    found = compute(layer, scene)
    exact = paper(scene, weight=weight)
    rounded = paper(scene, weight=weight, to=papers.rounded_to(numpy_dtype(dtype)))
    check(found, exact, rounded, dtype)
    striped = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    for mistake in (
        {"lam": LAMBDA * 1.1, "weight": weight},
        {"lam": 0.0, "weight": weight},
        {"init": 0.0, "weight": weight},
        {"weight": weight[::-1]},
        {"weight": weight, "order": striped},  # heads in halves, not in pairs
        {"weight": weight, "order": np.array([1, 0, 3, 2, 5, 4, 7, 6])},  # the two maps swapped
    ):
        other = paper(scene, **mistake)
        assert not agrees(found, other, rounded + other - exact, dtype), mistake


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_a_scale_and_a_lambda_for_each_pair(backend: str) -> None:
    spec = spec_of(window=(19, 0), scale=0.3)
    scene = make_scene(spec, *BATCHES["mixed"])
    lam = np.array([0.1, 0.5, 0.9, 1.3], np.float32)
    found = compute(layer_of(spec, backend, lam=lam), scene)
    exact = paper(scene, lam=lam, window=19)
    check(found, exact, exact, "float32")
    other = paper(scene, lam=lam[::-1], window=19)
    assert not agrees(found, other, other, "float32")


def test_steps_of_many_tokens_compute_no_zeros() -> None:
    """Over the same cache: two passes of half the score work, where the backend reads views of it."""
    spec = spec_of()
    layer = Differential(spec, LAMBDA, LAMBDA_INIT, backend="reference")
    assert layer.form == "one"
    one, two = (layer.plan(ad.AttentionMetadata.build([n], [20], [[0]], 32)).plans[0].spec for n in (1, 20))
    assert (one, two) == (Differential.passes(spec, "one")[0], Differential.passes(spec, "two")[0])
    cache = layer.allocate(1)
    q, k = np.ones((20, 8, 32), np.float32), np.ones((20, 4, 32), np.float32)
    layer.run(layer.plan(ad.AttentionMetadata.build([20], [20], [[0]], 32)), q, k, k, cache)
    (kept,) = [found for name, found in cache.backend_state.items() if "differential" in name]
    assert all(np.shares_memory(half.key, cache.key) for half in kept[1].caches)
    assert (cache.key[0, :, :20] == 1).all()


def test_lambda() -> None:
    rng = np.random.default_rng(0)
    q1, k1, q2, k2 = rng.standard_normal((4, 32)) * 0.1
    expected = np.exp((q1 * k1).sum()) - np.exp((q2 * k2).sum()) + 0.5
    assert Differential.lambda_of(q1, k1, q2, k2, 0.5) == pytest.approx(expected, abs=1e-12)
    assert Differential.lambda_init_of(1) == pytest.approx(0.2)
    assert Differential.lambda_init_of(4) == pytest.approx(0.8 - 0.6 * np.exp(-0.9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["one", "two", "four"])
def test_the_reference_implementation_s_cache_is_read(backend: str, form: str) -> None:
    """(2, 2, N, B, K/2, D) by its name, and as this layer's own cache."""
    spec = spec_of()
    scene = make_scene(spec, (63, 20), (1, 1))
    theirs = np.zeros((2, 2, scene.num_blocks, 32, 2, 32), np.float32)
    for s, table in enumerate(scene.tables):
        for at in range(scene.lengths[s] - 1):
            for head in range(4):
                where = (table[at // 32], at % 32, head // 2)
                theirs[(head % 2, 0, *where)] = scene.keys[s][at, head]
                theirs[(head % 2, 1, *where)] = scene.values[s][at, head]
    layer = layer_of(spec, backend, form)
    layer.allocate(1)
    cache = layer.from_reference(own(layer, theirs))
    batch = scene.batch()
    k, v = (scene.rows(x) for x in (scene.keys, scene.values))
    found = host(layer.run(layer.plan(batch), own(layer, np.concatenate(scene.q)), own(layer, k), own(layer, v), cache))
    exact = paper(scene)
    check(found, exact, exact, "float32")
    named = reference_cache(own(layer, theirs), layer.backend)
    assert named.layout is DIFFERENTIAL
    key, value = named.gather(scene.tables[0])
    for side, arrays in ((key, scene.keys), (value, scene.values)):
        tokens = as_numpy(side).transpose(0, 2, 1, 3).reshape(-1, 4, 32)[:63]
        np.testing.assert_array_equal(tokens, arrays[0][:63])
    converted = named.to_layout("HND")
    np.testing.assert_array_equal(as_numpy(converted.gather([1])[0]), as_numpy(named.gather([1])[0]))


@pytest.mark.parametrize("form", ["one", "two", "four"])
def test_prefix_sharing_and_forks(form: Any) -> None:
    """What the original refuses: chunks, shared prefixes, copy-on-write."""
    spec = spec_of(block_size=4)
    layer = Differential(spec, LAMBDA, LAMBDA_INIT, form=form, backend="reference")
    manager = CacheManager(16, 4, host_blocks=8)
    cache, away = layer.allocate(16), layer.allocate(8)
    table = np.random.default_rng(0).standard_normal((3, 20, 8, 32)).astype(np.float32)

    def advance(*wanted: Any) -> Any:
        step = manager.step(wanted)
        assert isinstance(step, ScheduledStep)
        cache.copy_blocks(step.copy_from, step.copy_to)
        q, k, v = table[:, step.tokens]
        out = layer.run(layer.plan(step.metadata), q, k[:, :4], v[:, :4], cache)
        manager.commit(step)
        return out[np.cumsum(step.query_lens) - 1]

    def alone(tokens: Any) -> Any:
        q, k, v = table[:, tokens].astype(np.float64)
        seen = papers.causal(len(tokens), len(tokens))
        return papers.differential(q, k[:, :4], v[:, :4], spec.scale, seen, LAMBDA, LAMBDA_INIT, None)[-1]

    first = manager.begin([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    advance((first, 3))
    advance(first)
    second = manager.begin([1, 2, 3, 4, 5, 6, 7, 8, 11, 12])
    np.testing.assert_allclose(advance(second)[0], alone(second.tokens), atol=1e-5)
    assert manager.usage().hit_tokens == 8
    (fork,) = manager.fork(first)
    for seq, token in ((first, 13), (fork, 14)):
        manager.append(seq, [token])
    for seq, out in zip((first, fork), advance(first, fork), strict=True):
        np.testing.assert_allclose(out, alone(seq.tokens), atol=1e-5)
    cache.swap_blocks(away, manager.swap_out([first]).pairs)
    away.swap_blocks(cache, manager.swap_in([first]).pairs)
    manager.append(first, [15])
    np.testing.assert_allclose(advance(first)[0], alone(first.tokens), atol=1e-5)
    cache.copy_slots([0], [63])
    assert cache.num_blocks == 16


def test_what_cannot_be_is_refused() -> None:
    for fields in (
        {"num_heads": 6, "num_kv_heads": 3}, {"value_head_size": 16}, {"alibi": True}, {"sinks": True},
        {"kind": "encoder"}, {"returns_lse": True},
    ):  # fmt: skip
        with pytest.raises(SpecError):
            Differential(spec_of(**fields), LAMBDA, LAMBDA_INIT, backend="reference")
    with pytest.raises(SpecError, match="one per pair"):
        Differential(spec_of(), np.ones(8), LAMBDA_INIT, backend="reference")
    one, two = (Differential(spec_of(), LAMBDA, LAMBDA_INIT, form=f, backend="reference") for f in ("one", "two"))
    batch = ad.AttentionMetadata.build([1], [1], [[0]], 32)
    q, k = np.ones((1, 8, 32), np.float32), np.ones((1, 4, 32), np.float32)
    with pytest.raises(CacheError, match="its own allocate"):
        one.run(one.plan(batch), q, k, k, two.allocate(1))
    with pytest.raises(CacheError, match="its own allocate"):
        two.run(two.plan(batch), q, k, k, one.allocate(1))
    with pytest.raises(ArrayError, match="k has shape"):
        one.run(one.plan(batch), q, k[:, :2], k, one.allocate(1))
