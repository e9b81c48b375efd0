"""Longformer and StreamingLLM against the paper's mask, on every backend that returns the log-sum-exp."""

from __future__ import annotations

from typing import Any

import numpy as np
import papers
import pytest
from scenes import BACKENDS, BATCHES, Scene, agrees, check, contents, host, made, make_scene, own, poison

import attn_dispatch as ad
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import MetadataError, SpecError
from attn_dispatch.variants import Longformer


def spec_of(**fields: Any) -> ad.AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "dtype": "float32", "block_size": 16}
    return ad.AttentionSpec(**(plain | {"window": (23, 0)} | fields))


def compute(variant: Longformer, scene: Scene, positions: Any, return_lse: bool = False) -> Any:
    cache = variant.allocate(scene.num_blocks)
    poison(cache)
    blocks = None
    if not isinstance(positions, int):
        spare = list(scene.spare)
        blocks = [[spare.pop() for _ in range(variant.blocks_for(len(p)))] for p in positions]
    for context in (True, False):
        batch = scene.batch(context=context)
        if not batch.num_tokens or (context and scene.spec.kind == "encoder"):
            continue
        heads = (scene.spec.num_heads, scene.spec.head_size)
        q = np.zeros((batch.num_tokens, *heads), numpy_dtype(scene.spec.dtype)) if context else np.concatenate(scene.q)
        k, v = (scene.rows(x, context=context) for x in (scene.keys, scene.values))
        named: Any = positions
        if context and not isinstance(positions, int):
            named = [[p for p in own if p < n] for own, n in zip(positions, batch.seq_lens, strict=True)]
        step = variant.plan(batch, named, blocks)
        found = variant.run(step, own(variant, q), own(variant, k), own(variant, v), cache, return_lse=return_lse)
    for s in range(len(scene.lengths)):
        np.testing.assert_array_equal(contents(cache, scene, s)[0], scene.keys[s])
    return tuple(host(x) for x in found) if return_lse else (host(found),)


def expected(
    scene: Scene, left: int, right: int | None, positions: Any, sinks: Any = None, to: Any = papers.exact
) -> Any:
    def one(s: int, q: Any, k: Any, v: Any) -> Any:
        own = range(positions) if isinstance(positions, int) else positions[s]
        seen = papers.longformer_seen(len(q), len(k), left, right, set(own))
        return papers.softmax_attention(q, k, v, scene.spec.scale, seen, scene.spec.logits_soft_cap, sinks, to)

    return scene.solve(one)


def verify(scene: Scene, found: Any, positions: Any, wrong: list[tuple[Any, ...]], sinks: Any = None) -> None:
    spec = scene.spec
    left, right = spec.window[0], None if spec.causal else spec.window[1]
    exact = expected(scene, left, right, positions, sinks)
    rounded = expected(scene, left, right, positions, sinks, papers.rounded_to(numpy_dtype(spec.dtype)))
    for i, triple in enumerate(zip(found, exact, rounded)):  # noqa: B905 - the LSE may be missing
        check(*triple, spec.dtype, lse=i == 1)
    for mistake in wrong:
        other = expected(scene, *mistake, sinks)[0]
        if not np.array_equal(other, exact[0]):
            assert not agrees(found[0], other, rounded[0] + other - exact[0], spec.dtype), mistake


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sink_tokens", [0, 4, 20])
def test_streaming(backend: str, name: str, dtype: str, sink_tokens: int) -> None:
    """The first tokens and a window: exact to the token, wherever blocks begin."""
    spec = spec_of(dtype=dtype)
    scene = make_scene(spec, *BATCHES[name])
    variant = made(lambda: Longformer(spec, backend))
    assert variant.backend == backend
    found = compute(variant, scene, sink_tokens)
    wrong: list[tuple[Any, ...]] = [(24, None, sink_tokens), (22, None, sink_tokens), (23, None, sink_tokens + 1)]
    if sink_tokens:
        wrong.append((23, None, sink_tokens - 1))
    verify(scene, found, sink_tokens, wrong)


POSITIONS = {"decode": [[3, 20], [0, 1, 50, 149], []], "prefill": [[5, 32], [7, 8, 40, 90, 130]],
             "chunked": [[10, 70, 71], [98], [2, 24]], "mixed": [[1], [30, 49], [5, 64, 130]]}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BATCHES))
def test_global_tokens_anywhere(backend: str, name: str) -> None:
    spec = spec_of(returns_lse=True)
    positions = POSITIONS[name]
    scene = make_scene(spec, *BATCHES[name], spare=12)
    variant = made(lambda: Longformer(spec, backend))
    found = compute(variant, scene, positions, return_lse=True)
    moved = [[p - 1 if p else 2 for p in own] for own in positions]
    verify(scene, found, positions, [(23, None, moved), (23, None, 0), (24, None, positions)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [0, 6, [[0, 40], [3, 50, 51, 99]], [[], [0, 1, 2]]])
def test_an_encoder_looks_both_ways(backend: str, positions: Any) -> None:
    spec = spec_of(kind="encoder", window=(9, 5))
    scene = make_scene(spec, (0, 0), (45, 100), spare=12)
    variant = made(lambda: Longformer(spec, backend))
    blocks = positions
    if isinstance(positions, int):
        # For both directions the tokens are laid out, the first ones too.
        blocks = [list(range(positions))] * 2
    found = compute(variant, scene, blocks)
    wrong = [(9, 4, positions), (9, 6, positions), (8, 5, positions), (10, 5, positions)]
    verify(scene, found, positions, wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_sinks_count_once(backend: str) -> None:
    spec = spec_of(sinks=True, returns_lse=True, logits_soft_cap=2.0)
    sinks = np.array([0.5, 1.5, -1.0, 2.0], np.float32)
    scene = make_scene(spec, *BATCHES["mixed"])
    variant = made(lambda: Longformer(spec, backend, sinks=sinks))
    found = compute(variant, scene, 4, return_lse=True)
    verify(scene, found, 4, [], sinks)
    without = expected(scene, 23, None, 4)
    assert not agrees(found[0], without[0], without[0], "float32")


def test_pages_outside_the_window_are_not_read() -> None:
    spec = spec_of(window=(63, 0))
    variant = Longformer(spec, "reference")
    batch = ad.AttentionMetadata.build([1], [3200], [list(range(200))], 16)
    plan = variant.plan(batch, 4)
    window, sinks = (one.plan.view for one in plan.groups[0].passes)
    assert window.max_kv_len == 64
    assert window.side.table.tolist() == [[196, 197, 198, 199]]
    assert sinks.max_kv_len == 4
    assert len(plan.groups) == 1


def test_what_cannot_be_is_refused() -> None:
    for fields in ({"window": (-1, -1)}, {"alibi": True}, {"kind": "encoder", "window": (4, -1)}):
        with pytest.raises(SpecError):
            Longformer(spec_of(**fields), "reference")
    variant = Longformer(spec_of(), "reference")
    batch = ad.AttentionMetadata.build([1], [40], [[2, 1, 0]], 16)
    for arguments in (([[40]],), ([[-1]],), ([[1], [2]],), ([[5]],), ([[5]], [[]])):
        with pytest.raises(MetadataError):
            variant.plan(batch, *arguments)
    with pytest.raises(MetadataError, match="block_size"):
        variant.plan(ad.AttentionMetadata.build([1], [40], [[2, 1]], 32), 4)
