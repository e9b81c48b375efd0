"""How far a result may be from float64: clause 11.

The rule is FlashAttention's: at most twice the error that the same computation has in plain PyTorch of the same dtype,
plus a floor. PyTorch's eager attention rounds to the dtype after every operation; `attend_rounded`, the yardstick, does
just that in NumPy, so that the rule holds on machines without torch (a test of the torch platform compares the two).

The yardstick's own error is bounded by the dtype's rounding times the sum of magnitudes (`rounding_bound`), so that a
wrong oracle or a wrong yardstick is an error of the kit and never a wider tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.reference import visible

__all__ = ["LSE_FLOOR", "OUTPUT_FLOOR", "Comparison", "attend_rounded", "compare", "rounding_bound", "within"]

OUTPUT_FLOOR = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""What is granted on top of the doubled error: about one unit in the last place of an output near one."""

LSE_FLOOR = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Likewise for the log-sum-exp, which is float32 but comes of scores that a runtime may round."""

_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

_SMALLEST_FLOOR = 2.0**-6
"""A floor shrinks with the outputs of a sequence (an average over many keys is small), down to this share of it."""

Floats = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def attend_rounded(
    spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
) -> tuple[F64, F64]:
    """Return what plain PyTorch of the spec's dtype would: every intermediate result rounded to it.

    Shapes as `reference.attend`: q [n, H, D], key [m, K, D], value [m, K, Dv] -> [n, H, Dv], [n, H].
    """
    dtype = numpy_dtype(spec.dtype)
    wide = np.float64 if spec.dtype == "float64" else np.float32

    def rounded(x: Floats) -> Floats:
        return x.astype(dtype).astype(wide)

    key, value = (np.repeat(rounded(x), spec.group_size, axis=1) for x in (key, value))
    # Not `np.einsum`: where a sequence has no key, it reads strides that it never set (numpy#24209), and may give NaN.
    scores = rounded(rounded(rounded(q).transpose(1, 0, 2) @ key.transpose(1, 2, 0)) * wide(spec.scale))
    if spec.logits_soft_cap is not None:
        cap = wide(spec.logits_soft_cap)
        scores = rounded(cap * rounded(np.tanh(rounded(scores / cap))))
    query_at = np.arange(len(q))[:, None] + (len(key) - len(q))
    key_at = np.arange(len(key))[None, :]
    if layer.alibi_slopes is not None:
        bias = layer.alibi_slopes.astype(wide)[:, None, None] * np.abs(query_at - key_at).astype(wide)
        scores = rounded(scores - rounded(bias))
    scores = np.where(visible(spec, query_at, key_at), scores, -np.inf)
    if layer.sinks is not None:
        sinks = np.broadcast_to(layer.sinks.astype(wide)[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, rounded(sinks)], axis=2)
    peak = scores.max(axis=2, keepdims=True, initial=-np.inf)
    peak = np.where(np.isinf(peak), wide(0), peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=2, keepdims=True)
    shares = rounded(weights / np.where(total == 0, wide(1), total))[:, :, : len(key)]
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + peak)[:, :, 0].T
    out = rounded(shares @ value.transpose(1, 0, 2)).transpose(1, 0, 2)
    return out.astype(np.float64), lse.astype(np.float64)


def rounding_bound(
    spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
) -> tuple[F64, F64]:
    """Return how far the yardstick's output and LSE can be from the exact ones, [n, H, 1] and [n, H].

    From magnitudes alone: neither the oracle nor the yardstick takes part. Each of at most eight roundings of a score
    moves it by the dtype's rounding times the sum of the magnitudes that it is made of; a weight moves by the
    exponential of that, an output by the weights' movement times the largest value, and never by more than twice that.
    """
    unit = _ROUNDING[spec.dtype]
    sink = 0.0 if layer.sinks is None else np.abs(np.where(np.isfinite(layer.sinks), layer.sinks, 0).astype(np.float64))
    if not len(key):
        return np.zeros((len(q), spec.num_heads, 1)), np.zeros((len(q), spec.num_heads)) + unit * sink + 1e-6
    running = 2.0**-53 if spec.dtype == "float64" else 2.0**-24  # in which sums are formed
    magnitudes = np.repeat(np.abs(key), spec.group_size, axis=1).transpose(1, 2, 0)  # [H, D, m]
    score = (np.abs(q).transpose(1, 0, 2) @ magnitudes).max(axis=2).T * abs(spec.scale)  # [n, H]
    distance = float(len(key))
    bias = 0.0 if layer.alibi_slopes is None else np.abs(layer.alibi_slopes.astype(np.float64)) * distance
    moved = unit * (8 * score + 3 * bias + sink) + running * (spec.head_size / 2 + 4) * (score + 1)
    reach = np.repeat(np.abs(value).max(axis=(0, 2)), spec.group_size)  # [H]
    weights = np.minimum(np.expm1(np.minimum(2 * moved, 10.0)) + 2 * unit + running * (len(key) + 8), 2.0)
    return ((weights + unit) * reach)[:, :, None], moved + running * (len(key) + 8 + score + bias + sink) + 1e-6


@dataclass(frozen=True)
class Comparison:
    """How two arrays compare.

    Attributes:
        near: everything is within what is allowed.
        error: the largest difference (infinite: NaN, or an infinity that is elsewhere).
        allowed: the largest that is allowed where it is.
        where: its index.
    """

    near: bool
    error: float
    allowed: float
    where: tuple[int, ...] = ()


def compare(result: Floats, exact: Floats, allowed: Floats) -> Comparison:
    """Compare a result with what is exact; NaN is never near, infinities must be where they are in `exact`.

    Args:
        result: [T, H, ...].
        exact: f64 of the same shape.
        allowed: the largest difference, broadcast to it.
    """
    result, exact = np.asarray(result, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if not exact.size:
        return Comparison(True, 0.0, 0.0)
    with np.errstate(invalid="ignore"):
        error = np.where(result == exact, 0.0, np.abs(result - exact))
    error = np.where(np.isnan(error), np.inf, error)
    allowed = np.broadcast_to(allowed, error.shape)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error - allowed), error.shape))
    if error[worst] <= allowed[worst]:
        worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    return Comparison(bool((error <= allowed).all()), float(error[worst]), float(allowed[worst]), worst)


def granted(exact: Floats, rounded: Floats, floor: float) -> float:
    """Return what a sequence's rows may be off by: twice the yardstick's error, and the floor."""
    finite = np.isfinite(exact) & np.isfinite(rounded)
    reach = float(np.abs(exact[finite]).max(initial=0.0))
    share = min(1.0, max(reach, _SMALLEST_FLOOR))
    return 2 * float(np.abs(rounded[finite] - exact[finite]).max(initial=0.0)) + floor * share


def within(found: Floats, exact: Floats, rounded: Floats, floor: float) -> tuple[bool, float, float]:
    """Return (whether `found` is near enough, its largest error, the largest that is allowed), of arrays as a whole."""
    found, exact, rounded = (np.asarray(x, dtype=np.float64) for x in (found, exact, rounded))
    finite = np.isfinite(exact)
    allowed = 2 * np.abs(rounded[finite] - exact[finite]).max(initial=0.0) + floor
    comparison = compare(found, exact, np.asarray(allowed))
    return comparison.near, comparison.error, float(allowed)
