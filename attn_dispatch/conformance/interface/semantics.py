"""Attention in float64, by arguments in vendors' terms: what stands behind a stub. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import Array
from attn_dispatch.contract.arrays import as_numpy, library_of

__all__ = ["as_float64", "attend_pages", "attend_rows"]

Floats = npt.NDArray[np.float64]


def as_float64(array: Array) -> Floats:
    """Return a host copy of an array of any library, in float64."""
    return _host(array).astype(np.float64)


def _host(array: Array) -> npt.NDArray[Any]:
    return as_numpy(array.detach().cpu() if library_of(array) == "torch" else array)


def attend_rows(
    q: Floats,
    key: Floats,
    value: Floats,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] = (-1, -1),
    soft_cap: float = 0.0,
    slopes: Floats | None = None,
    sinks: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Attend for one sequence: FlashAttention's conventions, which are everybody's.

    The last query sits at the last key. Scores are capped first and biased next. A row that sees no key gives 0, and
    minus infinity as its LSE (its sink's, where it has one).

    Args:
        q: [n, H, D].
        key: [m, K, D], K a divisor of H.
        value: [m, K, Dv].
        scale: of the scores.
        causal: a query sees no later key.
        window: keys before and behind its own that a query sees; negative or None: all.
        soft_cap: cap * tanh(score / cap); 0: none.
        slopes: [H]; a score loses slope * |query's position - key's|.
        sinks: [H]; one more logit in the denominator.

    Returns:
        [n, H, Dv] and the natural LSE [n, H].
    """
    n, m, heads = len(q), len(key), q.shape[1]
    key, value = (np.repeat(side, heads // max(side.shape[1], 1), axis=1) for side in (key, value))
    scores = q.transpose(1, 0, 2) @ key.transpose(1, 2, 0) * scale
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    ahead = np.arange(m) - (np.arange(n)[:, None] + m - n)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * np.abs(ahead)
    left, right = (reach if reach is not None and reach >= 0 else m + n for reach in window)
    seen = (ahead >= -left) & (ahead <= (min(right, 0) if causal else right))
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (heads, n, 1))], axis=2)
    peak = scores.max(axis=2, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = weights.sum(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(peak), peak, 0))[:, :, 0].T
    out = (weights[:, :, :m] / np.where(total == 0, 1, total)) @ value.transpose(1, 0, 2)
    return out.transpose(1, 0, 2), lse


def attend_pages(
    q: Floats,
    query_start: Sequence[int],
    tokens: tuple[Array, Array],
    pages: Sequence[Sequence[int]],
    lens: Sequence[int],
    **options: object,
) -> tuple[Floats, Floats]:
    """Attend for ragged sequences over a paged cache, each by `attend_rows`.

    Args:
        q: [T, H, D].
        query_start: where each sequence's rows begin in q, and where the last one's end.
        tokens: keys [N, B, K, D] and values [N, B, K, Dv], of any library and type.
        pages: of each sequence.
        lens: keys of each.
        options: of `attend_rows`.
    """
    sides = [_host(side) for side in tokens]
    outs = [np.zeros((0, q.shape[1], sides[1].shape[-1]))]
    lses = [np.zeros((0, q.shape[1]))]
    for s, (table, length) in enumerate(zip(pages, lens, strict=True)):
        size = sides[0].shape[1]
        used = list(table)[: -(-length // size)]
        if len(used) * size < length:
            raise ValueError(f"sequence {s}: {length} keys in {len(used)} pages of {size}")
        key, value = (side[used].reshape(-1, *side.shape[2:])[:length].astype(np.float64) for side in sides)
        out, lse = attend_rows(q[query_start[s] : query_start[s + 1]], key, value, **options)  # type: ignore[arg-type]
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs), np.concatenate(lses)
