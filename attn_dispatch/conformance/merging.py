"""What is checked of a backend's own `merge_states`: partial results put together as one softmax would have them."""

from __future__ import annotations

import numpy as np

from attn_dispatch.backend import Backend
from attn_dispatch.conformance.compute import any_array, to_backend, to_host
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.tolerance import LSE_FLOOR, OUTPUT_FLOOR, within
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import numpy_dtype

__all__ = ["check_merging"]


def check_merging(backend: Backend, spec: AttentionSpec, parts: int) -> None:
    """Merge random parts; some rows attend to nothing in one of them, in all but one, in all.

    Args:
        backend: whose `merge_states`.
        spec: its number of heads, value head size and dtype.
        parts: how many partial results.

    Raises:
        ConformanceError: the result is not that of float64, natural logarithms.
    """
    rng = np.random.default_rng(parts)
    rows = 9
    lse = (3 * rng.standard_normal((parts, rows, spec.num_heads))).astype(np.float32)
    lse[0, 0] = lse[1:, 1] = lse[:, 2] = -np.inf
    lse[0, 3] += 60  # beside which the others weigh nothing
    out = rng.standard_normal((parts, rows, spec.num_heads, spec.value_head_size)).astype(numpy_dtype(spec.dtype))
    out[np.isneginf(lse)] = 0
    like = any_array(backend, None)
    states = [(to_backend(out[i], like), to_backend(lse[i], like)) for i in range(parts)]
    merged = backend.merge_states(states)
    with np.errstate(divide="ignore"):
        weights = np.exp(lse.astype(np.float64))
        total = weights.sum(axis=0)
        shares = weights / np.where(total == 0, 1.0, total)
        exact, exact_lse = (out.astype(np.float64) * shares[..., None]).sum(axis=0), np.log(total)
    rounded = exact.astype(numpy_dtype(spec.dtype))
    for what, value, wanted, plain, floor in (
        ("output", merged[0], exact, rounded, OUTPUT_FLOOR[spec.dtype]),
        ("LSE", merged[1], exact_lse, exact_lse, LSE_FLOOR["float32"]),
    ):
        near, error, allowed = within(to_host(value), wanted, plain, floor)
        if not near:
            raise ConformanceError(f"merge_states of {parts}: the {what} is off by {error:.3g}, allowed {allowed:.3g}")
    if str(to_host(merged[0]).dtype) != str(out.dtype) or to_host(merged[1]).dtype != np.float32:
        raise ConformanceError(
            f"merge_states of {parts}: the output is {merged[0].dtype} and the LSE {merged[1].dtype}, "
            f"must be {spec.dtype} and float32"
        )
