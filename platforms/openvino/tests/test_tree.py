"""Trees of new tokens (speculative decoding): every token sees its ancestors and what came before the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from attn_dispatch import AttentionMetadata
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import BackendRefusedError, MetadataError
from attn_dispatch.reference import attend
from attn_dispatch_openvino.releases import installed_version, release_of

NAME = "openvino/paged"
RELEASE = release_of(installed_version())
HAS_TREES = RELEASE is not None and RELEASE.trees

needs_trees = pytest.mark.skipif(not HAS_TREES, reason=f"refused: OpenVINO {installed_version()} has no tree masks")


def tree(parents: list[int]) -> npt.NDArray[np.bool_]:
    """Return the mask of a tree: token i sees itself and its ancestors."""
    mask = np.eye(len(parents), dtype=np.bool_)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
    return mask


#          0
#        1   2
#       3 4   5
#               6
BINARY = tree([-1, 0, 0, 1, 1, 2, 5])
TWO_ROOTS = tree([-1, -1, 0, 1, 2])


def expect(it: Any, q: Any, keys: Any, values: Any, context: int, mask: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Compute each token alone, over its own path, in float64."""
    parameters, rows = it.on().parameters, []
    for i in range(len(mask)):
        path = [*range(context), *(context + np.flatnonzero(mask[i]))]
        given = (x.astype(np.float64) for x in (q[i : i + 1], keys[path], values[path]))
        rows.append(attend(it.spec, *given, parameters)[0])
    return np.concatenate(rows)


@needs_trees
@pytest.mark.parametrize("context", [0, 5, 31, 60])
@pytest.mark.parametrize("fields", [{}, {"sinks": True}, {"head_size": 72}, {"dtype": "bfloat16"}], ids=str)
def test_a_token_sees_its_ancestors_alone(layer: Callable[..., Any], fields: dict[str, Any], context: int) -> None:
    own = {"sinks": np.linspace(-1, 1, 4, dtype=np.float32)} if "sinks" in fields else {}
    it = layer(own, **fields)
    if not (verdict := registry().load(NAME).verdict(it.spec)):
        pytest.skip(f"refused: {verdict}")
    attn = it.on()
    cache = attn.allocate(8)
    tables = [[6, 0, 3], [2, 7, 1], [5]]
    masks = [BINARY, TWO_ROOTS, None]  # the third sequence is a plain decode
    news, before = [7, 5, 1], [context, context + 3, 9]
    total = [b + n for b, n in zip(before, news, strict=True)]
    qs, ks, vs = zip(*(it.arrays(n) for n in total), strict=True)
    for s, n in enumerate(before):
        if n:
            fill = attn.plan(AttentionMetadata.build([n], [n], [tables[s]]))
            attn.run(fill, qs[s][:n], ks[s][:n], vs[s][:n], cache)
    batch = AttentionMetadata.build(news, total, tables)
    plan = attn.backend.plan_tree(it.spec, batch, masks)
    q, k, v = (np.concatenate([x[b:] for x, b in zip(each, before, strict=True)]) for each in (qs, ks, vs))
    found = attn.run(plan, q, k, v, cache).astype(np.float64)
    exact = [
        expect(it, qs[s][before[s] :], ks[s], vs[s], before[s], np.tri(1, dtype=np.bool_) if mask is None else mask)
        for s, mask in enumerate(masks)
    ]
    tolerance = 2e-2 if it.spec.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(found, np.concatenate(exact), atol=tolerance)
    plain = attn.run(attn.plan(batch), q, k, v, cache)
    assert np.abs(plain.astype(np.float64) - found).max() > 3 * tolerance  # the mask matters here


@needs_trees
@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([np.ones((3, 3), np.bool_)], "no token that comes after it"),
        ([~np.eye(3, dtype=np.bool_) & np.tri(3, dtype=np.bool_)], "a token sees itself"),
        ([np.tri(2, dtype=np.bool_)], r"needs bool \(3, 3\)"),
        ([np.tri(3)], r"float64 \(3, 3\), needs bool"),
        ([], "0 tree masks were given, the batch has 1 sequences"),
        ([None, None], "2 tree masks"),
    ],
)
def test_a_mask_that_does_not_fit(
    layer: Callable[..., Any], masks: list[Any], words: str, still_computes: None
) -> None:
    it = layer()
    with pytest.raises(MetadataError, match=words):
        it.on().backend.plan_tree(it.spec, AttentionMetadata.build([3], [9], [[0]]), masks)


@needs_trees
@pytest.mark.parametrize("fields", [{"window": (5, 0)}, {"causal": False}, {"kind": "encoder"}], ids=str)
def test_layers_without_trees(layer: Callable[..., Any], fields: dict[str, Any]) -> None:
    it = layer(**fields)
    with pytest.raises(BackendRefusedError, match="causal decoder layers without a window"):
        it.on().backend.plan_tree(it.spec, AttentionMetadata.build([3], [3], [[0]]), [None])


@pytest.mark.skipif(HAS_TREES, reason="this release has tree masks")
def test_an_older_release_refuses_trees(layer: Callable[..., Any]) -> None:
    it = layer()
    with pytest.raises(BackendRefusedError, match=r"ignores tree masks; install 2026\.3 or newer"):
        it.on().backend.plan_tree(it.spec, AttentionMetadata.build([3], [3], [[0]]), [np.tri(3, dtype=np.bool_)])
