"""`merge_states`: partial results over disjoint sets of keys, put together exactly.

What FlashDecoding's split-KV, shared-prefix (cascade) attention and context parallelism have in common.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_dispatch.contract.arrays import Array, library_of
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import ArrayError

__all__ = ["merge_states"]


def merge_states(states: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge partial attention results whose keys are disjoint.

    A layer with sinks must give them to one of the passes only: each LSE that includes a sink counts it.

    Args:
        states: (out [T, H, Dv], lse f32[T, H], natural log) pairs of one array library. A row of LSE -inf attended to
            nothing and weighs nothing.

    Returns:
        (out, lse) of the union, in the first output's dtype; computed in float32, or float64 if the outputs are.

    Raises:
        ArrayError: no states, or shapes, dtypes or libraries that do not belong together.
    """
    if not states:
        raise ArrayError("merge_states needs at least one (out, lse) pair")
    first = states[0][0]
    library = library_of(first)
    for i, (out, lse) in enumerate(states):
        if library_of(out) != library or library_of(lse) != library:
            raise ArrayError(f"state {i} is of {library_of(out)} and {library_of(lse)}, state 0 of {library}")
        if out.shape != first.shape or tuple(lse.shape) != tuple(first.shape[:2]) or len(first.shape) != 3:
            raise ArrayError(
                f"state {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; needs [T, H, Dv] and [T, H] as "
                f"state 0, {tuple(first.shape)}"
            )
        if dtype_name(lse.dtype) not in ("float32", "float64"):
            raise ArrayError(f"state {i}: lse is {dtype_name(lse.dtype)}, must be float32 (natural log)")
    xp: Any = np if library == "numpy" else sys.modules["torch" if library == "torch" else "jax.numpy"]
    wide = xp.float64 if dtype_name(first.dtype) == "float64" else xp.float32
    lses = [_cast(lse, wide) for _, lse in states]
    peak = lses[0]
    for lse in lses[1:]:
        peak = xp.maximum(peak, lse)
    peak = xp.where(xp.isinf(peak), xp.zeros_like(peak), peak)
    weights = [xp.exp(lse - peak) for lse in lses]
    total = sum(weights[1:], start=weights[0])
    nothing = total == 0
    safe = xp.where(nothing, xp.ones_like(total), total)
    parts = [_cast(out, wide) * (weight / safe)[..., None] for (out, _), weight in zip(states, weights, strict=True)]
    merged = _cast(sum(parts[1:], start=parts[0]), first.dtype)
    lse = xp.where(nothing, xp.full_like(total, -np.inf), xp.log(safe) + peak)
    return merged, _cast(lse, states[0][1].dtype)


def _cast(array: Array, dtype: Any) -> Array:
    return array.to(dtype) if library_of(array) == "torch" else array.astype(dtype)
