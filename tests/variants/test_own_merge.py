"""Passes are merged by the backend that ran them: the core's `merge_states`, unless it brings its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.contract import Array
from attn_dispatch.reference import ReferenceBackend
from attn_dispatch.variants import Cascade, DualChunk, SplitKV

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, dtype="float32", block_size=16)


class Merging(ReferenceBackend):
    """Merges as the core does, counts, and leaves a mark."""

    def __init__(self) -> None:
        super().__init__("mine/merging")
        self.merged: list[int] = []

    def merge_states(self, states: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        self.merged.append(len(states))
        out, lse = super().merge_states(states)
        return out + 1, lse


def run(variant: Any, queries: int = 1) -> Any:
    rng = np.random.default_rng(2)
    batch = ad.AttentionMetadata.build([1, 1], [70, 66], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]], 16)
    cache = variant.allocate(6)
    cache.key[...] = rng.standard_normal(cache.key.shape)
    cache.value[...] = rng.standard_normal(cache.value.shape)
    q = [rng.standard_normal((2, 4, 32)).astype(np.float32) for _ in range(queries)]
    k, v = (rng.standard_normal((2, 2, 32)).astype(np.float32) for _ in range(2))
    return variant.run(variant.plan(batch), q[0] if queries == 1 else tuple(q), k, v, cache)


@pytest.mark.parametrize(
    ("make", "queries", "states"),
    [
        (lambda backend: Cascade(SPEC, backend), 1, [2]),
        (lambda backend: SplitKV(SPEC, 1, backend), 1, [5]),
        (lambda backend: DualChunk(SPEC, 16, 32, backend), 3, [3]),
    ],
    ids=["cascade", "split-kv", "dual-chunk"],
)
def test_a_backend_merges_its_own_passes(make: Any, queries: int, states: list[int]) -> None:
    backend = Merging()
    np.testing.assert_array_equal(run(make(backend), queries), run(make("reference"), queries) + 1)
    assert backend.merged == states


def test_what_a_backend_does_not_bring_is_the_cores() -> None:
    rng = np.random.default_rng(5)
    states = [(rng.standard_normal((3, 4, 8)).astype(np.float32), np.zeros((3, 4), np.float32)) for _ in range(3)]
    for found, expected in zip(ReferenceBackend("x/y").merge_states(states), ad.merge_states(states), strict=True):
        np.testing.assert_array_equal(found, expected)
