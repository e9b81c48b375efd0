"""How far a result may be from float64: clause 11.

The rule is FlashAttention's: at most twice the error that the same computation has in plain PyTorch of the same dtype,
plus a floor. PyTorch's eager attention rounds to the dtype after every operation; `attend_rounded` does just that in
NumPy, so that the rule holds on machines without torch (a test of the torch platform holds the two side by side).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import AttentionSpec, LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.reference import visible

__all__ = ["LSE_FLOOR", "OUTPUT_FLOOR", "attend_rounded", "within"]

OUTPUT_FLOOR = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""What is granted on top of the doubled error: about one unit in the last place of an output near one."""

LSE_FLOOR = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Likewise for the log-sum-exp, which is float32 but comes of scores that a runtime may round."""

Floats = npt.NDArray[Any]


def attend_rounded(
    spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
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


def within(found: Floats, exact: Floats, rounded: Floats, floor: float) -> tuple[bool, float, float]:
    """Return (whether `found` is near enough, its largest error, the largest that is allowed).

    Infinities must be where they are in `exact`, with the same sign; NaN is never near.
    """
    found, exact, rounded = (np.asarray(x, dtype=np.float64) for x in (found, exact, rounded))
    infinite = np.isinf(exact)
    if np.isnan(found).any() or not np.array_equal(found[infinite], exact[infinite]):
        return False, float("inf"), 0.0
    error = np.abs(found[~infinite] - exact[~infinite]).max(initial=0.0)
    allowed = 2 * np.abs(rounded[~infinite] - exact[~infinite]).max(initial=0.0) + floor
    return bool(error <= allowed), float(error), float(allowed)
