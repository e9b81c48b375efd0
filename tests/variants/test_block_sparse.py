"""Block-sparse attention against its definition, on every backend that is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import papers
import pytest
from scenes import BACKENDS, BATCHES, Scene, agrees, check, contents, host, made, make_scene, own, poison

import attn_dispatch as ad
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import ArrayError, CacheError, MetadataError, PlanError, SpecError
from attn_dispatch.variants import BlockMask, BlockSparse, LocalStride


def spec_of(**fields: Any) -> ad.AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "dtype": "float32", "block_size": 32}
    return ad.AttentionSpec(**(plain | fields))


def compute(variant: BlockSparse, scene: Scene, return_lse: bool = False, **plan: Any) -> Any:
    cache = variant.allocate(scene.num_blocks)
    poison(cache)
    for context in (True, False):
        batch = scene.batch(context=context)
        heads = (scene.spec.num_heads, scene.spec.head_size)
        q = np.zeros((batch.num_tokens, *heads), numpy_dtype(scene.spec.dtype)) if context else np.concatenate(scene.q)
        k, v = (scene.rows(x, context=context) for x in (scene.keys, scene.values))
        if batch.num_tokens:
            step = variant.plan(batch, **plan)
            found = variant.run(step, own(variant, q), own(variant, k), own(variant, v), cache, return_lse=return_lse)
    for s in range(len(scene.lengths)):
        key, value = contents(cache, scene, s)
        np.testing.assert_array_equal(key, scene.keys[s])
        np.testing.assert_array_equal(value, scene.values[s])
    return tuple(host(x) for x in found) if return_lse else host(found)


def expected(scene: Scene, size: int, keep: Any, to: Any = papers.exact) -> Any:
    """`keep(i, j)` for all heads, or one such function for each."""
    spec = scene.spec

    def one(s: int, q: Any, k: Any, v: Any) -> Any:
        rules = keep if isinstance(keep, list) else [keep] * spec.num_heads
        seen = np.stack([papers.block_sparse_seen(len(q), len(k), size, rule, spec.causal) for rule in rules])
        return papers.softmax_attention(q, k, v, spec.scale, seen, spec.logits_soft_cap, to=to)

    return scene.solve(one)


def verify(scene: Scene, size: int, found: Any, keep: Any, wrong: list[Any]) -> None:
    spec = scene.spec
    to = papers.rounded_to(numpy_dtype(spec.dtype))
    exact, rounded = expected(scene, size, keep), expected(scene, size, keep, to)
    pairs = (
        list(zip(found, exact, rounded, strict=True)) if isinstance(found, tuple) else [(found, exact[0], rounded[0])]
    )
    for i, triple in enumerate(pairs):
        check(*triple, spec.dtype, lse=i == 1)
    for mistake in wrong:
        if same_masks(scene, size, keep, mistake):
            continue
        other = expected(scene, size, mistake)
        assert not agrees(pairs[0][0], other[0], rounded[0] + other[0] - exact[0], spec.dtype)


def same_masks(scene: Scene, size: int, a: list[Any], b: list[Any]) -> bool:
    """Whether two rules keep the same blocks in this very scene."""
    rows = [
        (i, j, h)
        for h in range(scene.spec.num_heads)
        for length, new in zip(scene.lengths, scene.new, strict=True)
        for i in range((length - new) // size, -(-length // size))
        for j in range(-(-length // size) if not scene.spec.causal else i + 1)
    ]
    return all(a[h](i, j) == b[h](i, j) for i, j, h in rows)


def stride_rules(scene: Scene, local: int, stride: int, offsets: tuple[int, ...]) -> Any:
    share = scene.spec.num_heads // len(offsets)
    return [papers.local_stride(local, stride, offsets[h // share]) for h in range(scene.spec.num_heads)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", ["homo", "kv", "query"])
def test_local_and_stripes(backend: str, name: str, dtype: str, heads: str) -> None:
    spec = spec_of(dtype=dtype, block_size=32 if "openvino" in backend else 16)
    size = 32
    scene = make_scene(spec, *BATCHES[name])
    pattern = {
        "homo": LocalStride(1, 3),
        "kv": LocalStride(1, 3, (1, 2)),
        "query": LocalStride.per_head(1, 4, spec.num_heads),
    }[heads]
    variant = made(lambda: BlockSparse(spec, pattern, size, backend))
    assert variant.backend == backend
    found = compute(variant, scene)
    offsets, stride = pattern.offsets, pattern.vert_stride
    wrong = [
        stride_rules(scene, 2, stride, offsets),
        stride_rules(scene, 1, stride + 1, offsets),
        stride_rules(scene, 1, stride, tuple(o + 1 for o in offsets)),
        [papers.local_stride(9, 1, 0)] * spec.num_heads,
    ]
    if len(offsets) > 1:
        wrong.append(stride_rules(scene, 1, stride, offsets[::-1]))
    verify(scene, size, found, stride_rules(scene, 1, stride, offsets), wrong)


def random_mask(patterns: int, blocks: int, *, diagonal: bool, seed: int = 3) -> np.ndarray[Any, Any]:
    mask = np.random.default_rng(seed).random((patterns, blocks, blocks)) < 0.4
    if diagonal:
        mask |= np.eye(blocks, dtype=bool)
    return mask


def rules_of(mask: np.ndarray[Any, Any], num_heads: int) -> list[Any]:
    share = num_heads // len(mask)
    return [lambda i, j, h=h: bool(mask[h // share, i, j]) for h in range(num_heads)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("patterns", [1, 2, 4])
@pytest.mark.parametrize("diagonal", [True, False])
def test_any_mask(backend: str, name: str, patterns: int, diagonal: bool) -> None:
    """Also ones that leave out the diagonal, and rows that then see nothing."""
    spec = spec_of()
    scene = make_scene(spec, *BATCHES[name], seed=1)
    mask = random_mask(patterns, 7, diagonal=diagonal)
    variant = made(lambda: BlockSparse(spec, BlockMask(mask), None, backend))
    found = made(lambda: compute(variant, scene))
    wrong = [rules_of(mask ^ np.eye(7, dtype=bool), 4), rules_of(np.roll(mask, 1, axis=2), 4)]
    verify(scene, 32, found, rules_of(mask, 4), wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_lse_soft_cap_and_other_head_sizes(backend: str) -> None:
    spec = spec_of(returns_lse=True, logits_soft_cap=1.5, value_head_size=16)
    scene = make_scene(spec, *BATCHES["mixed"])
    variant = made(lambda: BlockSparse(spec, LocalStride(1, 3, (1, 2)), None, backend))
    found = compute(variant, scene, return_lse=True)
    verify(scene, 32, found, stride_rules(scene, 1, 3, (1, 2)), [stride_rules(scene, 1, 3, (2, 1))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_encoder_looks_both_ways(backend: str) -> None:
    spec = spec_of(kind="encoder")
    scene = make_scene(spec, (0, 0), (70, 100))
    mask = random_mask(2, 4, diagonal=False)
    mask[:, :, 0] = False  # some rows see the last block only, which is shorter than they are many
    variant = made(lambda: BlockSparse(spec, BlockMask(mask), None, backend))
    verify(scene, 32, compute(variant, scene), rules_of(mask, 4), [rules_of(mask.transpose(0, 2, 1), 4)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_for_each_sequence(backend: str) -> None:
    spec = spec_of()
    scene = make_scene(spec, (60, 90), (20, 1))
    masks = [random_mask(1, 4, diagonal=True, seed=s) for s in (1, 2)]
    variant = made(lambda: BlockSparse(spec, BlockMask(masks[0]), None, backend))
    found = compute(variant, scene, pattern=[BlockMask(m) for m in masks])

    def one(s: int, q: Any, k: Any, v: Any) -> Any:
        rule = rules_of(masks[s], 1)[0]
        seen = papers.block_sparse_seen(len(q), len(k), 32, rule)
        return papers.softmax_attention(q, k, v, spec.scale, seen)

    exact = scene.solve(one)[0]
    check(found, exact, exact, "float32")


def test_padding_attends_to_nothing_and_no_tokens_are_no_trouble() -> None:
    spec = spec_of(returns_lse=True)
    variant = BlockSparse(spec, LocalStride(1, 2, (1, 2)), None, "reference")
    cache = variant.allocate(4)
    rng = np.random.default_rng(0)
    batch = ad.AttentionMetadata.build([1, 3], [40, 0], [[2, 1], []], 32)
    q, k, v = (rng.standard_normal((4, n, 32)).astype(np.float32) for n in (4, 2, 2))
    out, lse = variant.run(variant.plan(batch), q, k, v, cache, return_lse=True)
    assert (out[1:] == 0).all()
    assert (lse[1:] == -np.inf).all()
    assert np.isfinite(lse[0]).all()
    empty = ad.AttentionMetadata.build([], [], np.zeros((0, 1), np.int32), 32)
    assert variant.run(variant.plan(empty), q[:0], k[:0], v[:0], cache).shape == (0, 4, 32)


def test_heads_are_folded_without_a_copy_and_out_is_written() -> None:
    spec = spec_of()
    variant = BlockSparse(spec, LocalStride(1, 2, (1, 2)), None, "reference")
    cache = variant.allocate(4)
    batch = ad.AttentionMetadata.build([1], [40], [[2, 1]], 32)
    q, k = np.ones((1, 4, 32), np.float32), np.ones((1, 2, 32), np.float32)
    out = np.zeros((1, 4, 32), np.float32)
    assert variant.run(variant.plan(batch), q, k, k, cache, out) is out
    assert out.any()
    (folded,) = [x for x in cache.backend_state.values() if isinstance(x, tuple)]
    assert np.shares_memory(folded[1].arrays["key"], cache.arrays["key"])
    assert folded[1].arrays["key"].shape == (8, 1, 32, 32)


def test_cost_follows_the_kept_blocks() -> None:
    spec = spec_of()
    variant = BlockSparse(spec, LocalStride(2, 20), None, "reference")
    batch = ad.AttentionMetadata.build([32], [3200], [list(range(100))], 32)
    plan = variant.plan(batch)
    assert (plan.kept_blocks, plan.dense_blocks) == (6, 100)
    inner = plan.groups[0].passes[0].plan
    assert inner.view.side.table.tolist() == [[19, 39, 59, 79, 98, 99]]
    assert inner.view.max_kv_len == 6 * 32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockSparse(spec_of(window=(9, 0)), LocalStride(1, 2)), SpecError, "window"),
        (lambda: BlockSparse(spec_of(alibi=True), LocalStride(1, 2)), SpecError, "alibi"),
        (lambda: BlockSparse(spec_of(kind="cross"), LocalStride(1, 2)), SpecError, "kind=cross"),
        (lambda: BlockSparse(spec_of(), LocalStride(1, 2), 48), SpecError, "multiple of block_size=32"),
        (lambda: BlockSparse(spec_of(), LocalStride(1, 2, (1, 2, 3))), SpecError, "3 patterns"),
        (lambda: BlockSparse(spec_of(sinks=True), LocalStride(1, 2, (1, 2)), sinks=np.ones(4)), SpecError, "sinks"),
        (lambda: LocalStride(1, 0), SpecError, "vert_stride"),
        (lambda: BlockMask(np.ones((2, 2))), SpecError, "is bool"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_steps_are_refused_before_anything_is_written() -> None:
    spec = spec_of()
    variant = BlockSparse(spec, BlockMask(np.ones((2, 2), bool)), None, "reference")
    cache = variant.allocate(3)
    q, k = np.ones((1, 4, 32), np.float32), np.ones((1, 2, 32), np.float32)
    good = variant.plan(ad.AttentionMetadata.build([1], [40], [[2, 1]], 32))
    for error, call in (
        (SpecError, lambda: variant.plan(ad.AttentionMetadata.build([1], [70], [[2, 1, 0]], 32))),
        (MetadataError, lambda: variant.plan(ad.AttentionMetadata.build([1], [40], [[2, 1, 0]], 16))),
        (
            MetadataError,
            lambda: variant.plan(ad.AttentionMetadata.build([1], [40], [[2, 1]], 32), [variant.pattern] * 2),
        ),
        (SpecError, lambda: variant.plan(good_batch(), LocalStride(1, 2, (1, 2)))),
        (ArrayError, lambda: variant.run(good, q[:, :2], k, k, cache)),
        (ArrayError, lambda: variant.run(good, q, k[:, :1], k, cache)),
        (ArrayError, lambda: variant.run(good, q, None, None, cache)),
        (ArrayError, lambda: variant.run(good, q, k, k, cache, np.ones((1, 4, 31), np.float32))),
        (CacheError, lambda: variant.run(good, q, k, k, variant.allocate(2))),
        (
            PlanError,
            lambda: BlockSparse(spec_of(scale=1.0), variant.pattern, None, "reference").run(good, q, k, k, cache),
        ),
    ):
        with pytest.raises(error):
            call()
    assert not cache.arrays["key"].any()


def good_batch() -> ad.AttentionMetadata:
    return ad.AttentionMetadata.build([1], [40], [[2, 1]], 32)


def test_the_offsets_of_a_part_of_the_heads() -> None:
    """Tensor parallelism: a rank has the stripes of its own heads, as the whole model has them."""
    whole = LocalStride.per_head(1, 32, 16)
    assert LocalStride.per_head(1, 32, 16, first=8, count=4).offsets == whole.offsets[8:12] == (17, 19, 21, 23)
    assert LocalStride.per_head(1, 32, 16, first=12).offsets == whole.offsets[12:]
    with pytest.raises(SpecError, match=r"heads 14\.\.17 are not among the model's 16"):
        LocalStride.per_head(1, 32, 16, first=14, count=4)
