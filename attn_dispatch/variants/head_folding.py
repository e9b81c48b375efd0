"""Heads as sequences: what a page table needs to differ from head to head.

With the order [N, K, B, D] block `n` of head `k` is page `n * K + k` of a cache with one head: the same memory under
another shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attn_dispatch.backend import Backend, Refusal
from attn_dispatch.contract import Array, AttentionSpec, CacheLayout, KVCache
from attn_dispatch.contract.arrays import permute
from attn_dispatch.errors import SpecError

__all__ = ["cannot_fold", "fold_cache", "fold_rows", "folded_spec", "unfold_rows"]

_FOLDED = "attn_dispatch.variants.head_folding"


def folded_spec(spec: AttentionSpec, patterns: int) -> AttentionSpec:
    """Return what a folded sequence needs: the query heads of a kv head (K patterns), or a single one (H patterns)."""
    if patterns not in (spec.num_kv_heads, spec.num_heads):
        raise SpecError(
            f"{patterns} patterns: give one for all heads, or one for each of the {spec.num_kv_heads} key/value or "
            f"{spec.num_heads} query heads"
        )
    return replace(spec, num_heads=spec.num_heads // patterns, num_kv_heads=1)


def cannot_fold(backend: Backend, spec: AttentionSpec, head: AttentionSpec) -> Refusal | None:
    """Return why a backend's caches cannot be seen as caches of one head, if they cannot.

    Args:
        backend: which accepts both specs.
        spec: the layer, with K heads.
        head: of one head; see `folded_spec`.
    """
    layout = backend.layout(spec)
    folds = layout == backend.layout(head) and not layout.is_joint
    if folds:
        heads, shapes = spec.num_kv_heads, layout.shapes(spec.geometry, 2)
        alone = layout.shapes(head.geometry, 2 * heads)
        folds = all(shapes[name] == (2, heads, *alone[name][2:]) and alone[name][1] == 1 for name in shapes)
    if folds:
        return None
    accepts = f"layout {layout.name} does not keep a block's heads one after the other, as a pattern per head needs"
    return Refusal("pattern", "one per head", accepts, "Use one pattern for all heads, or a backend with layout HND")


def fold_cache(cache: KVCache, spec: AttentionSpec, layout: CacheLayout) -> KVCache:
    """Return a cache of one head over the same memory.

    Args:
        cache: of K heads.
        spec: of one head.
        layout: what the backend wants for it.

    Raises:
        SpecError: the cache's heads do not lie one after the other in a block.
    """
    heads = cache.geometry.num_kv_heads
    shapes: Mapping[str, tuple[int, ...]] = layout.shapes(spec.geometry, cache.num_blocks * heads)
    folded_before: Any = cache.backend_state.get(_FOLDED)
    if folded_before is not None and all(folded_before[0].get(name) is array for name, array in cache.arrays.items()):
        return folded_before[1]  # type: ignore[no-any-return]
    folded = {}
    for name, array in cache.arrays.items():
        shape = (cache.num_blocks * heads, 1, *array.shape[2:])
        if cache.layout != layout or array.shape[:2] != (cache.num_blocks, heads) or shapes.get(name) != shape:
            raise SpecError(
                f"a page table for every head needs a cache whose blocks hold one head after the other (HND); "
                f"{cache.owner.name} has {cache.layout.name} with {name} {tuple(array.shape)}. Use one pattern for all "
                "heads, or another backend"
            )
        folded[name] = array.reshape(shape)
    one_head = KVCache(cache.owner, spec.geometry, layout, cache.num_blocks * heads, folded, cache.device)
    cache.backend_state[_FOLDED] = (dict(cache.arrays), one_head)
    return one_head


def fold_rows(q: Array, patterns: int) -> Array:
    """Return rows [T, H, D] as [patterns * T, H / patterns, D], one pattern's rows after the other's."""
    tokens, heads, size = q.shape
    apart = permute(q.reshape(tokens, patterns, heads // patterns, size), (1, 0, 2, 3))
    return apart.reshape(patterns * tokens, heads // patterns, size)


def unfold_rows(folded: Array, patterns: int) -> Array:
    """Return rows [patterns * T, h, ...] as [T, patterns * h, ...]: `fold_rows` undone, of an output or an LSE."""
    tokens, heads = folded.shape[0] // patterns, folded.shape[1]
    rest = tuple(folded.shape[2:])
    apart = folded.reshape(patterns, tokens, heads, *rest)
    return permute(apart, (1, 0, *range(2, len(apart.shape)))).reshape(tokens, patterns * heads, *rest)
