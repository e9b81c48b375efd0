"""Batches that every variant is tested on, and the comparison that every result has to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.conformance.tolerance import LSE_FLOOR, OUTPUT_FLOOR, within
from attn_dispatch.contract.arrays import as_library, as_numpy, library_of
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import NoBackendError

Array = np.ndarray[Any, Any]

BACKENDS = [name for name, available in ad.backends().items() if available]
BATCHES = {
    "decode": ((37, 150, 95), (1, 1, 1)),
    "prefill": ((0, 0), (33, 150)),
    "chunked": ((64, 90, 5), (40, 9, 20)),
    "mixed": ((63, 0, 130), (1, 50, 1)),
}


def made(make: Callable[[], Any]) -> Any:
    """Return a variant, or skip with what the backend said of it."""
    try:
        return make()
    except NoBackendError as error:
        return pytest.skip(f"refused: {str(error).splitlines()[-1].strip()}")


@dataclass
class Scene:
    """Sequences in permuted blocks of a cache, with unused slots poisoned.

    Attributes:
        lengths: tokens of each after the step.
        new: tokens of each that are new.
        q, keys, values: per sequence: of its new tokens; of all its tokens.
    """

    spec: ad.AttentionSpec
    lengths: list[int]
    new: list[int]
    tables: list[list[int]]
    num_blocks: int
    q: list[Array]
    keys: list[Array]
    values: list[Array]
    spare: list[int]

    def batch(self, *, context: bool = False) -> ad.AttentionMetadata:
        """The step, or the one before it that brings what is in the cache already."""
        before = [length - new for length, new in zip(self.lengths, self.new, strict=True)]
        if context:
            return ad.AttentionMetadata.build(before, before, self.tables, self.spec.block_size)
        return ad.AttentionMetadata.build(self.new, self.lengths, self.tables, self.spec.block_size)

    def rows(self, arrays: Sequence[Array], *, context: bool = False) -> Array:
        """Those tokens of per-sequence arrays that a step brings."""
        parts = [
            a[: length - new] if context else a[length - new :]
            for a, length, new in zip(arrays, self.lengths, self.new, strict=True)
        ]
        return np.concatenate(parts)

    def solve(self, one: Callable[[int, Array, Array, Array], Any]) -> Any:
        """Apply a function of (sequence, q, keys, values), all float64, and join its results."""
        found = [
            one(s, *(x.astype(np.float64) for x in (self.q[s], self.keys[s], self.values[s])))
            for s in range(len(self.lengths))
        ]
        if isinstance(found[0], tuple):
            return tuple(np.concatenate([one[i] for one in found]) for i in range(len(found[0])))
        return np.concatenate(found)


def make_scene(
    spec: ad.AttentionSpec, context: Sequence[int], new: Sequence[int], seed: int = 0, spare: int = 0
) -> Scene:
    rng = np.random.default_rng(seed)
    dtype = numpy_dtype(spec.dtype)
    lengths = [c + n for c, n in zip(context, new, strict=True)]
    counts = [-(-n // spec.block_size) for n in lengths]
    ids = rng.permutation(sum(counts) + spare + 3).tolist()
    tables = [[ids.pop() for _ in range(n)] for n in counts]

    def normal(n: int, *shape: int) -> Array:
        return rng.standard_normal((n, *shape)).astype(dtype)

    return Scene(
        spec=spec,
        lengths=lengths,
        new=list(new),
        tables=tables,
        num_blocks=sum(counts) + spare + 3,
        q=[normal(n, spec.num_heads, spec.head_size) for n in new],
        keys=[normal(n, spec.num_kv_heads, spec.head_size) for n in lengths],
        values=[normal(n, spec.num_kv_heads, spec.value_head_size) for n in lengths],
        spare=ids[:spare],
    )


def poison(cache: Any) -> None:
    """Fill a cache with what would ruin any result that it got into."""
    for one in getattr(cache, "caches", (cache,)):
        for name, array in one.arrays.items():
            if library_of(array) == "jax":  # whose arrays are replaced, not written
                one.arrays[name] = array.at[...].set(1e4)
        if library_of(next(iter(one.arrays.values()))) == "jax":
            continue
        for array in one.arrays_as("numpy").values():
            array[...] = np.asarray(1e4, np.float64).astype(array.dtype)


def own(variant: Any, x: Array) -> Any:
    """Return an array as the backend's own library has it."""
    return as_library(np.ascontiguousarray(x), variant.backend.capabilities.libraries[0])


def host(x: Any) -> Array:
    return as_numpy(x).astype(np.float64)


def agrees(found: Array, exact: Array, rounded: Array, dtype: str, *, lse: bool = False) -> bool:
    return within(found, exact, rounded, (LSE_FLOOR if lse else OUTPUT_FLOOR)[dtype])[0]


def check(found: Array, exact: Array, rounded: Array, dtype: str, *, lse: bool = False) -> None:
    ok, error, allowed = within(found, exact, rounded, (LSE_FLOOR if lse else OUTPUT_FLOOR)[dtype])
    assert ok, f"largest error {error:.3g}, allowed {allowed:.3g}"


def contents(cache: Any, scene: Scene, s: int) -> tuple[Array, Array]:
    """Return what a cache holds of a sequence, [length, K, D] and [length, K, Dv]."""
    key, value = cache.gather(scene.tables[s])
    return tuple(
        as_numpy(x).transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])[: scene.lengths[s]] for x in (key, value)
    )
