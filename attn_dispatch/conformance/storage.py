"""What is checked of a cache apart from attention: copies, swaps, conversions, and arrays of other libraries."""

from __future__ import annotations

import sys

import numpy as np

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend
from attn_dispatch.conformance.compute import any_array, contents, to_backend, to_host
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.arrays import as_library, library_of
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import CacheError

__all__ = ["STORAGE_CHECKS", "filled_cache"]

_BLOCKS = 5


def filled_cache(backend: Backend, spec: AttentionSpec) -> tuple[Attention, KVCache]:
    """Return a layer and its cache of five blocks, all slots written with different numbers."""
    attn = attention(spec, backend)
    cache = attn.allocate(_BLOCKS)
    tokens = _BLOCKS * spec.block_size
    batch = AttentionMetadata.build([tokens], [tokens], [[3, 1, 4, 0, 2]], spec.block_size)
    rng = np.random.default_rng(1)
    shapes = (
        (tokens, spec.num_heads, spec.head_size),
        (tokens, spec.num_kv_heads, spec.head_size),
        (tokens, spec.num_kv_heads, spec.value_head_size),
    )
    like = any_array(backend, cache)
    q, k, v = (to_backend(rng.standard_normal(s).astype(numpy_dtype(spec.dtype)), like) for s in shapes)
    attn.run(attn.plan(batch), q, k, v, cache)
    return attn, cache


def _expect(what: str, found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for side, a, b in zip(("keys", "values"), found, expected, strict=True):
        if a.shape != b.shape or not np.array_equal(a.view(np.uint8), np.ascontiguousarray(b).view(np.uint8)):
            raise ConformanceError(f"{what}: the {side} are not what they should be")


def check_gather(backend: Backend, spec: AttentionSpec) -> None:
    """Blocks come in the order that was asked for, some twice."""
    _, cache = filled_cache(backend, spec)
    whole = contents(cache)
    ids = [3, 0, 4, 3]
    _expect("gather", contents(cache, ids), tuple(side[ids] for side in whole))


def check_copy_blocks(backend: Backend, spec: AttentionSpec) -> None:
    """All sources are read before any target is written; everything else stays."""
    _, cache = filled_cache(backend, spec)
    before = contents(cache)
    cache.copy_blocks([0, 1, 2], [1, 2, 0])
    expected = tuple(side[[2, 0, 1, 3, 4]] for side in before)
    _expect("copy_blocks", contents(cache), expected)


def check_copy_slots(backend: Backend, spec: AttentionSpec) -> None:
    """Tokens are copied one by one, across blocks."""
    _, cache = filled_cache(backend, spec)
    if spec.kv_cache_dtype in ("uint8", "uint4"):
        return  # tokens of a block may share a scale there: what is copied is checked by the vendor's own tests
    before = contents(cache)
    size = spec.block_size
    src = [0, size + 1 if size > 1 else size, 3 * size]
    dst = [4 * size, 0, 2 * size + size - 1]
    cache.copy_slots(src, dst)
    expected = tuple(side.copy() for side in before)
    for side, old in zip(expected, before, strict=True):
        for s, d in zip(src, dst, strict=True):
            side[d // size, :, d % size] = old[s // size, :, s % size]
    _expect("copy_slots", contents(cache), expected)


def check_swap_blocks(backend: Backend, spec: AttentionSpec) -> None:
    """Blocks move to another cache and back."""
    attn, cache = filled_cache(backend, spec)
    other = attn.allocate(3)
    before = contents(cache)
    cache.swap_blocks(other, [(4, 0), (1, 2)])
    moved = contents(other)
    _expect("swap_blocks", tuple(side[[0, 2]] for side in moved), tuple(side[[4, 1]] for side in before))
    other.swap_blocks(cache, {0: 1, 2: 4})
    _expect("swap_blocks back", contents(cache), tuple(side[[0, 4, 2, 3, 1]] for side in before))


def check_layouts(backend: Backend, spec: AttentionSpec) -> None:
    """A conversion keeps the logical contents, there and back."""
    _, cache = filled_cache(backend, spec)
    if cache.layout.per_token_scales or spec.kv_cache_dtype in ("uint8", "uint4"):
        return  # such contents exist in their own layout alone
    before = contents(cache)
    for name in ("HND", "NHD"):
        converted = cache.to_layout(name)
        if converted.layout.name != name:
            raise ConformanceError(f"to_layout({name!r}) gave {converted.layout.name}")
        _expect(f"to_layout({name!r})", contents(converted), before)
        _expect(f"to_layout({name!r}) and back", contents(converted.to_layout(cache.layout)), before)


def check_ids(backend: Backend, spec: AttentionSpec) -> None:
    """Ids outside the cache and double targets are refused, and nothing is copied."""
    attn, cache = filled_cache(backend, spec)
    before = contents(cache)
    for call in (
        lambda: cache.copy_blocks([0], [_BLOCKS]),
        lambda: cache.copy_blocks([-1], [0]),
        lambda: cache.copy_blocks([0, 1], [2, 2]),
        lambda: cache.copy_blocks([0, 1], [2]),
        lambda: cache.copy_slots([0], [_BLOCKS * spec.block_size]),
        lambda: cache.gather([_BLOCKS]),
        lambda: cache.swap_blocks(attn.allocate(1), [(0, 1)]),
        lambda: cache.to_layout("HDN"),
    ):
        try:
            call()
        except CacheError:
            continue
        raise ConformanceError("an id outside the cache (or a target given twice) was accepted")
    _expect("a refused copy", contents(cache), before)


def check_exchange(backend: Backend, spec: AttentionSpec) -> None:
    """Host arrays give host arrays, with the very numbers that the backend's own library gives, `out` included."""
    attn, cache = filled_cache(backend, spec)
    like = any_array(backend, cache)
    if str(getattr(like, "device", "cpu")) not in ("cpu", "TFRT_CPU_0"):
        return  # what lies on a device is exchanged by its owner, not by us
    size = spec.block_size
    batch = AttentionMetadata.build([1, 3], [2 * size + 1, 3], [[3, 1, 4], [0, 2]], size)
    rng = np.random.default_rng(2)
    shapes = ((4, spec.num_heads, spec.head_size), (4, spec.num_kv_heads, spec.head_size))
    q, k = (rng.standard_normal(s).astype(numpy_dtype(spec.dtype)) for s in shapes)
    v = rng.standard_normal((4, spec.num_kv_heads, spec.value_head_size)).astype(numpy_dtype(spec.dtype))
    plan = attn.plan(batch)
    host = attn.run(plan, q, k, v, cache)
    library_result = attn.run(plan, to_backend(q, like), to_backend(k, like), to_backend(v, like), cache)
    out = np.zeros_like(host)
    written = attn.run(plan, q, k, v, cache, out=out)
    if library_of(host) != "numpy" or written is not out:
        raise ConformanceError(f"NumPy arrays gave {library_of(host)}; out= must be written and returned itself")
    results = [out, to_host(library_result)]
    if "torch" in sys.modules:
        tensors = [as_library(x, "torch") for x in (q, k, v)]
        results.append(to_host(attn.run(plan, tensors[0], tensors[1], tensors[2], cache)))
    if not all(np.array_equal(host, other) for other in results):
        raise ConformanceError("the result depends on whose arrays hold the inputs")


STORAGE_CHECKS = {
    "gather": check_gather,
    "copy_blocks": check_copy_blocks,
    "copy_slots": check_copy_slots,
    "swap_blocks": check_swap_blocks,
    "layouts": check_layouts,
    "ids": check_ids,
    "arrays of other libraries": check_exchange,
}
"""Each is called with a backend and a spec that it accepts."""
