"""Each variant as its paper has it: dense, float64, token by token. Shares no code with the implementations.

With `to=rounded_to(type)` every intermediate result is rounded, as in plain arithmetic of that type: the 2x yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Round = Callable[[Array], Array]


def exact(x: Array) -> Array:
    return x


def rounded_to(dtype: np.dtype[Any]) -> Round:
    return lambda x: x.astype(dtype).astype(np.float64)


def softmax_attention(
    q: Array, k: Array, v: Array, scale: float, seen: Array, cap: float | None = None, sinks: Array | None = None,
    to: Round = exact,
) -> tuple[Array, Array]:  # fmt: skip
    """q [n, H, D], k [m, K, D], v [m, K, Dv], seen bool[n, m] or [H, n, m] -> out [n, H, Dv], lse [n, H]."""
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((n, heads, v.shape[2]))
    lse = np.full((n, heads), -np.inf)
    for h in range(heads):
        scores = to(to(q[:, h] @ k[:, h // group].T) * scale)
        if cap is not None:
            scores = to(cap * np.tanh(to(scores / cap)))
        mask = seen if seen.ndim == 2 else seen[h]
        for i in range(n):
            own = np.flatnonzero(mask[i])
            logits = scores[i, own]
            extra = np.zeros(0) if sinks is None else sinks[h : h + 1].astype(np.float64)
            if len(own) + len(extra) == 0:
                continue
            peak = max([*logits, *extra])
            weights = np.exp(logits - peak)
            total = weights.sum() + np.exp(extra - peak).sum()
            out[i, h] = to(to(weights / total) @ v[own, h // group])
            lse[i, h] = math.log(total) + peak
    return out, lse


def causal(n: int, m: int) -> Array:
    return np.array([[j <= m - n + i for j in range(m)] for i in range(n)], bool).reshape(n, m)


def block_sparse_seen(n: int, m: int, size: int, keep: Callable[[int, int], bool], is_causal: bool = True) -> Array:
    """Token i attends to token j iff the block of i keeps the block of j (and j is not after i)."""
    return np.array(
        [
            [keep(i // size, j // size) and (not is_causal or j <= i) for j in range(m)]
            for i in range(m - n if is_causal else 0, m)
        ],
        bool,
    ).reshape(n, m)


def local_stride(local: int, stride: int, offset: int) -> Callable[[int, int], bool]:
    """Phi-3-small's rule, on blocks at or below the diagonal."""
    return lambda i, j: j <= i and (i - j < local or (j + offset) % stride == 0)


def longformer_seen(n: int, m: int, left: int, right: int | None, global_tokens: set[int]) -> Array:
    """A window of `left` before (and `right` after, None: causal), and global tokens, which see and are seen."""
    seen = np.zeros((n, m), bool)
    for row, i in enumerate(range(m - n, m)):
        for j in range(m):
            near = -left <= j - i <= (0 if right is None else right)
            seen[row, j] = (near or i in global_tokens or j in global_tokens) and (right is not None or j <= i)
    return seen


def differential(
    q: Array, k: Array, v: Array, scale: float, seen: Array, lam: Array | float, lambda_init: float,
    weight: Array | None, epsilon: float = 1e-5, to: Round = exact,
) -> Array:  # fmt: skip
    """Equations 1 to 3: per pair of heads, (softmax(Q1 K1') - lambda softmax(Q2 K2')) V, normalised. [n, H, D]."""
    n, heads, size = q.shape
    group = heads // k.shape[1]
    lam = np.broadcast_to(np.asarray(lam, np.float64), (heads // 2,))
    out = np.zeros((n, heads, size))
    for pair in range(heads // 2):
        kv = pair // group
        values = np.concatenate([v[:, 2 * kv], v[:, 2 * kv + 1]], axis=1)
        maps = []
        for side in (0, 1):
            scores = to(to(q[:, 2 * pair + side] @ k[:, 2 * kv + side].T) * scale)
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            maps.append(to(weights / weights.sum(axis=1, keepdims=True)))
        both = to(to(maps[0] @ values) - to(lam[pair] * to(maps[1] @ values)))
        norm = to(both / np.sqrt((both**2).mean(axis=1, keepdims=True) + epsilon))
        norm = norm if weight is None else to(norm * weight)
        out[:, 2 * pair : 2 * pair + 2] = to(norm * (1 - lambda_init)).reshape(n, 2, size)
    return out


def rotate(x: Array, positions: Array, base: float = 10000.0) -> Array:
    """Rotary embedding of x [n, heads, D] at positions [n]: pairs (d, d + D / 2) turn by position * base^(-2d / D)."""
    half = x.shape[2] // 2
    angle = positions[:, None, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=2)


def dual_chunk(
    q: Array, k: Array, v: Array, scale: float, chunk: int, trained: int, to: Round = exact
) -> tuple[Array, Array]:
    """Section 3 of the paper, by its relative positions: one softmax over q_i . k_j turned by M[i][j].

    q [n, H, D] and k [m, K, D] are not turned yet; the last n of m tokens ask.
    """
    n, m = len(q), len(k)
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros((n, q.shape[1], v.shape[2])), np.zeros((n, q.shape[1]))
    turned = to(rotate(k, np.arange(m) % chunk))
    for row, i in enumerate(range(m - n, m)):
        at = np.zeros(i + 1)
        for j in range(i + 1):
            behind = i // chunk - j // chunk
            if behind == 0:
                at[j] = i % chunk
            elif behind == 1:
                at[j] = min(i % chunk + chunk, trained - 1)
            else:
                at[j] = trained - 1
        for h in range(q.shape[1]):
            scores = np.empty(i + 1)
            for position in np.unique(at):
                mine = to(rotate(q[row : row + 1], np.array([position])))[0, h]
                these = at == position
                scores[these] = to(to(turned[: i + 1, h // group][these] @ mine) * scale)
            weights = np.exp(scores - scores.max())
            out[row, h] = to(to(weights / weights.sum()) @ v[: i + 1, h // group])
            lse[row, h] = math.log(weights.sum()) + scores.max()
    return out, lse


def latent_attention(
    q: Array, q_rotary: Array, latent: Array, rotary: Array, key_up: Array, value_up: Array, scale: float,
    to: Round = exact,
) -> Array:  # fmt: skip
    """DeepSeek-V2, equations 9 to 19, before absorption: keys and values of every head are made from the latent.

    q [n, H, d], q_rotary [n, H, r], latent [m, c], rotary [m, r], key_up [H, d, c], value_up [H, e, c] -> [n, H, e].
    """
    n, m = len(q), len(latent)
    out = np.zeros((n, q.shape[1], value_up.shape[1]))
    seen = causal(n, m)
    for h in range(q.shape[1]):
        keys, values = to(latent @ key_up[h].T), to(latent @ value_up[h].T)
        scores = to(to(q[:, h] @ keys.T + q_rotary[:, h] @ rotary.T) * scale)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = to(to(weights / weights.sum(axis=1, keepdims=True)) @ values)
    return out
