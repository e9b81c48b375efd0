"""Cascade, split-KV, dual-chunk, MLA and shared caches, on every backend that can."""

from __future__ import annotations

from typing import Any

import numpy as np
import papers
import pytest
from scenes import BACKENDS, BATCHES, Scene, agrees, check, contents, host, made, make_scene, own, poison

import attn_dispatch as ad
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import ArrayError, CacheError, MetadataError, SpecError
from attn_dispatch.variants import Cascade, DualChunk, Latent, SharingMap, SplitKV


def spec_of(**fields: Any) -> ad.AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "dtype": "float32", "block_size": 16}
    return ad.AttentionSpec(**(plain | fields))


def dense(scene: Scene, sinks: Any = None, to: Any = papers.exact) -> Any:
    def one(s: int, q: Any, k: Any, v: Any) -> Any:
        return papers.softmax_attention(
            q, k, v, scene.spec.scale, papers.causal(len(q), len(k)), scene.spec.logits_soft_cap, sinks, to
        )

    return scene.solve(one)


def compute(variant: Any, scene: Scene, return_lse: bool = False) -> Any:
    cache = variant.allocate(scene.num_blocks)
    poison(cache)
    for context in (True, False):
        batch = scene.batch(context=context)
        if not batch.num_tokens:
            continue
        heads = (scene.spec.num_heads, scene.spec.head_size)
        q = np.zeros((batch.num_tokens, *heads), numpy_dtype(scene.spec.dtype)) if context else np.concatenate(scene.q)
        k, v = (scene.rows(x, context=context) for x in (scene.keys, scene.values))
        found = variant.run(
            variant.plan(batch), own(variant, q), own(variant, k), own(variant, v), cache, return_lse=return_lse
        )
    for s in range(len(scene.lengths)):
        np.testing.assert_array_equal(contents(cache, scene, s)[0], scene.keys[s])
        np.testing.assert_array_equal(contents(cache, scene, s)[1], scene.values[s])
    return tuple(host(x) for x in found) if return_lse else (host(found),)


def verify(scene: Scene, found: Any, exact: Any, rounded: Any) -> None:
    for i, triple in enumerate(zip(found, exact, rounded)):  # noqa: B905 - the LSE may be missing
        check(*triple, scene.spec.dtype, lse=i == 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", [1, 3])
def test_split_kv(backend: str, name: str, dtype: str, part: int) -> None:
    spec = spec_of(dtype=dtype, returns_lse=True)
    scene = make_scene(spec, *BATCHES[name])
    variant = made(lambda: SplitKV(spec, part, backend))
    found = compute(variant, scene, return_lse=True)
    rounded = dense(scene, to=papers.rounded_to(numpy_dtype(dtype)))
    verify(scene, found, dense(scene), rounded)
    before = [length - new for length, new in zip(scene.lengths, scene.new, strict=True)]
    assert variant.plan(scene.batch()).parts == max(0, *(-(-n // (16 * part)) - 1 for n in before))


def shared_scene(spec: ad.AttentionSpec, prefixes: list[int], own_tokens: list[int], new: list[int]) -> Scene:
    """Sequences whose first blocks are the same blocks: `prefixes[s]` numbers which."""
    size = spec.block_size
    scene = make_scene(spec, [3 * size + n for n in own_tokens], new)
    first: dict[int, int] = {}
    for s, prefix in enumerate(prefixes):
        other = first.setdefault(prefix, s)
        scene.tables[s][:3] = scene.tables[other][:3]
        for side in (scene.keys, scene.values):
            side[s][: 3 * size] = side[other][: 3 * size]
    return scene


def compute_shared(variant: Cascade, scene: Scene) -> Any:
    """As `compute`, but each sequence's context goes in by itself: they share blocks that one step may write once."""
    cache = variant.allocate(scene.num_blocks)
    poison(cache)
    spec = scene.spec
    for s, (length, new) in enumerate(zip(scene.lengths, scene.new, strict=True)):
        batch = ad.AttentionMetadata.build([length - new], [length - new], [scene.tables[s]], spec.block_size)
        q = np.zeros((length - new, spec.num_heads, spec.head_size), numpy_dtype(spec.dtype))
        k, v = (x[s][: length - new] for x in (scene.keys, scene.values))
        variant.run(variant.plan(batch), own(variant, q), own(variant, k), own(variant, v), cache)
    q, k, v = np.concatenate(scene.q), scene.rows(scene.keys), scene.rows(scene.values)
    plan = variant.plan(scene.batch())
    found = variant.run(plan, own(variant, q), own(variant, k), own(variant, v), cache, return_lse=True)
    return plan, tuple(host(x) for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefixes", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("sinks", [None, np.array([0.5, 1.5, -1.0, 2.0], np.float32)])
def test_cascade(backend: str, prefixes: list[int], sinks: Any) -> None:
    spec = spec_of(returns_lse=True, sinks=sinks is not None)
    scene = shared_scene(spec, prefixes, [0, 20, 5, 16], [1, 7, 1, 3])
    variant = made(lambda: Cascade(spec, backend, sinks=sinks))
    plan, found = compute_shared(variant, scene)
    exact = dense(scene, sinks)
    verify(scene, found, exact, exact)
    passes = plan.groups[0].passes
    assert len(passes) == (1 if len(set(prefixes)) == 4 else 2)
    if len(passes) == 2:
        # The prefix is read once by each group that shares it.
        shared = passes[1].plan.view
        assert (shared.kv_lens > 0).sum() == len({p for p in prefixes if prefixes.count(p) > 1})
        assert set(shared.kv_lens.tolist()) <= {0, 48}
    if sinks is not None:
        twice = dense(scene, np.logaddexp(sinks, sinks))
        assert not agrees(found[0], twice[0], twice[0], "float32")


def test_a_cascade_shares_only_what_was_there_before() -> None:
    """A block that this step writes, or that one of the sequences has but in part, is nobody else's to read."""
    variant = Cascade(spec_of(), "reference")
    batch = ad.AttentionMetadata.build([1, 20], [40, 40], [[7, 8, 1], [7, 8, 2]], 16, shared_writes=True)
    view = variant.plan(batch).groups[0].passes[1].plan.view
    assert view.kv_lens.tolist() == [16]
    padded = ad.AttentionMetadata.build([1, 1, 2], [40, 40, 0], [[7, 8, 1], [7, 8, 2], []], 16)
    assert variant.plan(padded).groups[0].passes[1].plan.view.kv_lens.tolist() == [32, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dual_chunk(backend: str, name: str, dtype: str) -> None:
    spec = spec_of(dtype=dtype, returns_lse=True)
    scene = make_scene(spec, *BATCHES[name])
    variant = made(lambda: DualChunk(spec, 32, 48, backend))
    kind = numpy_dtype(dtype)
    plain_q, plain_k = scene.q, scene.keys
    turned: list[list[Any]] = [[], [], []]
    keys = []
    for s, (length, new) in enumerate(zip(scene.lengths, scene.new, strict=True)):
        at = variant.positions(np.arange(length))
        keys.append(papers.rotate(plain_k[s].astype(np.float64), at.key).astype(kind))
        for i, form in enumerate((at.intra, at.successive, at.inter)):
            turned[i].append(papers.rotate(plain_q[s].astype(np.float64), form[length - new :]).astype(kind))
    scene.keys = keys
    cache = variant.allocate(scene.num_blocks)
    poison(cache)
    for context in (True, False):
        batch = scene.batch(context=context)
        if not batch.num_tokens:
            continue
        zeros = np.zeros((batch.num_tokens, spec.num_heads, spec.head_size), kind)
        forms = [zeros] * 3 if context else [np.concatenate(form) for form in turned]
        k, v = (own(variant, scene.rows(x, context=context)) for x in (scene.keys, scene.values))
        found = variant.run(variant.plan(batch), tuple(own(variant, q) for q in forms), k, v, cache, return_lse=True)
    found = tuple(host(x) for x in found)

    def paper(chunk: int, trained: int, to: Any = papers.exact) -> Any:
        return scene.solve(
            lambda s, q, k, v: papers.dual_chunk(q, plain_k[s].astype(np.float64), v, spec.scale, chunk, trained, to)
        )

    exact = paper(32, 48)
    # What the layer is given is rounded to the type after turning, as in the yardstick.
    rounded = paper(32, 48, papers.rounded_to(kind))
    verify(scene, found, exact, rounded)
    for chunk, trained in ((48, 64), (32, 47), (32, 50), (1024, 2048)):
        other = paper(chunk, trained)
        if not np.array_equal(other[0], exact[0]):
            assert not agrees(found[0], other[0], rounded[0] + other[0] - exact[0], dtype), (chunk, trained)


def test_dual_chunk_positions() -> None:
    variant = DualChunk(spec_of(), 32, 48, "reference")
    at = variant.positions(np.array([0, 31, 32, 40, 50, 100]))
    assert at.key.tolist() == at.intra.tolist() == [0, 31, 0, 8, 18, 4]
    assert at.successive.tolist() == [32, 47, 32, 40, 47, 36]
    assert at.inter.tolist() == [47] * 6
    assert variant.positions(np.array([31]), furthest=48).successive.tolist() == [48]
    batch = ad.AttentionMetadata.build([1], [40], [[0, 1, 2]], 16)
    q = np.zeros((1, 4, 32), np.float32)
    with pytest.raises(ArrayError, match="three forms"):
        variant.run(variant.plan(batch), q, q[:, :2], q[:, :2], variant.allocate(3))
    for chunk, trained in ((24, 48), (32, 32), (0, 8)):
        with pytest.raises(SpecError):
            DualChunk(spec_of(), chunk, trained, "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("latent", "rotary"), [(512, 64), (32, 16)])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_latent(backend: str, dtype: str, latent: int, rotary: int, name: str) -> None:
    """MLA in its absorbed form is the un-absorbed one of the paper."""
    heads, size, value_size = 4, 24, 20
    scale = (size + rotary) ** -0.5
    layer = made(lambda: Latent(heads, latent, rotary, scale=scale, dtype=dtype, block_size=32, backend=backend))
    context, new = BATCHES[name]
    scene = make_scene(layer.spec, context, new)
    rng = np.random.default_rng(5)
    key_up, value_up = (rng.standard_normal((heads, n, latent)) / latent**0.5 for n in (size, value_size))
    kind = numpy_dtype(dtype)
    tokens = [x[:, 0] for x in scene.keys]  # [length, latent + rotary]
    plain = [rng.standard_normal((n, heads, size)) for n in new]
    turned = [rng.standard_normal((n, heads, rotary)) for n in new]
    cache = layer.allocate(scene.num_blocks)
    if layer.values_are == "view":
        assert cache.arrays["value"].shape[-1] == latent
    arrays = cache.arrays_as("numpy")
    assert np.shares_memory(arrays["key"], arrays["value"])
    absorbed = [
        np.concatenate([layer.absorb(a, key_up), b], axis=2).astype(kind) for a, b in zip(plain, turned, strict=True)
    ]
    for is_context in (True, False):
        batch = scene.batch(context=is_context)
        if not batch.num_tokens:
            continue
        joined = scene.rows(tokens, context=is_context)
        q = np.zeros((batch.num_tokens, heads, latent + rotary), kind) if is_context else np.concatenate(absorbed)
        out = layer.run(
            layer.plan(batch), own(layer, q), own(layer, joined[:, :latent]), own(layer, joined[:, latent:]), cache
        )
    found = np.einsum("thc,hec->the", host(out), value_up)

    def paper(to: Any = papers.exact, drop: int = 0) -> Any:
        def one(s: int, q: Any, k: Any, v: Any) -> Any:
            vectors = tokens[s].astype(np.float64)
            return papers.latent_attention(
                plain[s], turned[s] * (not drop), vectors[:, :latent], vectors[:, latent:], key_up, value_up, scale, to
            )

        return scene.solve(one)

    exact = paper()
    # Rounded where the absorbed form rounds: its queries, scores, shares and result.
    yardstick = []
    to = papers.rounded_to(kind)
    for s, (length, n) in enumerate(zip(scene.lengths, new, strict=True)):
        vectors = tokens[s].astype(np.float64)[:, None]
        part, _ = papers.softmax_attention(
            absorbed[s].astype(np.float64), vectors, vectors[:, :, :latent], scale, papers.causal(n, length), to=to
        )
        yardstick.append(np.einsum("thc,hec->the", part, value_up))
    check(found, exact, np.concatenate(yardstick), dtype)
    other = paper(drop=1)
    assert not agrees(found, other, np.concatenate(yardstick) + other - exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_latent_blocks_are_copied_once(backend: str) -> None:
    """A chain of copies, as if all were read before any is written: also where two arrays are one."""
    layer = made(lambda: Latent(4, 32, 16, scale=1.0, dtype="float32", backend=backend))
    cache, away = layer.allocate(4), layer.allocate(4)
    for array in (cache.arrays_as("numpy")["key"], away.arrays_as("numpy")["key"]):
        array[...] = np.arange(4).reshape(4, *[1] * (array.ndim - 1))
    cache.copy_blocks([0, 1, 2], [1, 2, 3])
    for side in cache.gather([0, 1, 2, 3]):
        assert host(side)[:, 0, 0, 0].tolist() == [0, 0, 1, 2]
    cache.copy_slots([32 * 3, 32 * 2], [32 * 2, 32])
    assert host(cache.gather([1, 2])[1])[:, 0, 0, 0].tolist() == [1, 2]
    cache.swap_blocks(away, {3: 0})
    assert host(away.gather([0])[1])[0, 0, 0, 0] == 2
    with pytest.raises(CacheError, match="keeps its values apart"):
        cache.swap_blocks(ad.attention(layer.spec, backend).allocate(4), {3: 0})


def test_latent_refusals() -> None:
    with pytest.raises(SpecError):
        Latent(4, 0, scale=1.0)
    layer = Latent(4, 32, 16, scale=1.0, dtype="float32", backend="reference")
    assert layer.values_are == "view", layer.note
    batch = ad.AttentionMetadata.build([1], [1], [[0]], 32)
    with pytest.raises(ArrayError, match="rotary_size=16 needs other arrays; found latent"):
        layer.run(
            layer.plan(batch), np.zeros((1, 4, 48), np.float32), np.zeros((1, 32), np.float32), None, layer.allocate(1)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_share_a_cache(backend: str) -> None:
    spec = spec_of(block_size=32)
    sharing = SharingMap.every([spec] * 4, 2)
    layers = [made(lambda one=one: ad.attention(one, backend)) for one in sharing.specs]
    scene = make_scene(spec, *BATCHES["mixed"])
    caches = sharing.caches(lambda layer: layers[layer].allocate(scene.num_blocks))
    assert (caches[0] is caches[1], caches[1] is caches[2], sharing.num_caches) == (True, False, 2)
    rng = np.random.default_rng(0)
    for context in (True, False):
        batch = scene.batch(context=context)
        for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            q = rng.standard_normal((batch.num_tokens, 4, 32)).astype(np.float32)
            k, v = (own(layer, scene.rows(x, context=context)) for x in (scene.keys, scene.values))
            if not sharing.owns(i):
                k, v = (x * 7 for x in (k, v)) if i == 1 else (None, None)  # it must not look at them
            found = host(layer.run(layer.plan(batch), own(layer, q), k, v, cache))
            if not context:
                scene.q = np.split(q, np.cumsum(scene.new)[:-1])
                exact = dense(scene)
                check(found, exact[0], exact[0], "float32")
    np.testing.assert_array_equal(contents(caches[1], scene, 2)[0], scene.keys[2])


@pytest.mark.parametrize(
    ("specs", "reads", "message"),
    [
        ([{}] * 3, {1: 2, 2: 1}, "in a circle: 1 -> 2 -> 1"),
        ([{}] * 3, {1: 1}, "in a circle: 1 -> 1"),
        ([{}] * 3, {0: 2}, "layer 2, which runs later"),
        ([{}] * 3, {1: 3}, "there are layers 0..2"),
        ([{}] * 3, {-1: 0}, "there are layers 0..2"),
        ([{}, {"head_size": 64}], {1: 0}, "needs a cache of"),
        ([{}, {"num_kv_heads": 4}], {1: 0}, "needs a cache of"),
        ([{}, {"kv_cache_dtype": "float16"}], {1: 0}, "needs a cache of"),
        ([{}, {"kind": "cross"}], {1: 0}, "their tokens differ"),
        ([{}, {"writes_kv": False}], {}, "reads no other layer's cache"),
    ],
)
def test_maps_that_make_no_sense(specs: list[dict[str, Any]], reads: dict[int, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SharingMap([spec_of(**fields) for fields in specs], reads)


def test_a_chain_of_sharing_leads_to_the_layer_that_writes() -> None:
    # Layers may differ in what does not concern the cache.
    sharing = SharingMap([spec_of(), spec_of(window=(9, 0)), spec_of(num_heads=8)], {2: 1, 1: 0})
    assert sharing.sources == (0, 0, 0)
    assert [spec.writes_kv for spec in sharing.specs] == [True, False, False]
    with pytest.raises(SpecError):
        SharingMap.every([spec_of()], 0)


def test_wrong_batches() -> None:
    batch = ad.AttentionMetadata.build([1], [40], [[2, 1]], 32)
    for variant in (
        Cascade(spec_of(), "reference"),
        SplitKV(spec_of(), 2, "reference"),
        DualChunk(spec_of(), 32, 48, "reference"),
    ):
        with pytest.raises(MetadataError, match="block_size=32"):
            variant.plan(batch)
    for make in (
        lambda: Cascade(spec_of(window=(3, 0))),
        lambda: SplitKV(spec_of(alibi=True), 2),
        lambda: SplitKV(spec_of(), 0),
    ):
        with pytest.raises(SpecError):
            make()
