"""`LayerParameters`: what a layer owns beside its spec. One object per layer, given to every `run`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.arrays import as_numpy, library_of
from attn_dispatch.contract.dtypes import is_quantised
from attn_dispatch.contract.spec import AttentionSpec
from attn_dispatch.errors import ArrayError, SpecError

__all__ = ["LayerParameters"]


class LayerParameters:
    """A layer's ALiBi slopes, sinks and cache scales, checked against its spec.

    Attributes:
        alibi_slopes: f32[H] if `spec.alibi`, else None.
        sinks: f32[H] if `spec.sinks`, else None.
        k_scale, v_scale: per-tensor scales of a quantised cache: stored = round(x / scale).

    Raises:
        SpecError: something is missing that the spec says the layer has, or given that it says it has not.
    """

    __slots__ = ("_memoized", "alibi_slopes", "k_scale", "sinks", "v_scale")

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        alibi_slopes: Any = None,
        sinks: Any = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        self.alibi_slopes = _per_head(spec, "alibi_slopes", spec.alibi, alibi_slopes)
        self.sinks = _per_head(spec, "sinks", spec.sinks, sinks)
        self.k_scale, self.v_scale = float(k_scale), float(v_scale)
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if not (math.isfinite(scale) and scale > 0):
                raise SpecError(f"{name}={scale} must be a positive finite number")
        if self.scaled and not is_quantised(spec.kv_cache_dtype):
            raise SpecError(
                f"k_scale={self.k_scale}, v_scale={self.v_scale} belong to a quantised cache; kv_cache_dtype is "
                f"{spec.kv_cache_dtype}, which stores keys and values as they are"
            )
        self._memoized: dict[object, Any] = {}

    @property
    def scaled(self) -> bool:
        """Whether a scale is not 1: a backend that ignores scales cannot run such a layer."""
        return self.k_scale != 1.0 or self.v_scale != 1.0

    def memoize(self, key: object, compute: Callable[[], Any]) -> Any:
        """Return what a backend derives from these parameters (slopes on its device, say), computed once per key."""
        if key not in self._memoized:
            self._memoized[key] = compute()
        return self._memoized[key]


def _per_head(spec: AttentionSpec, name: str, wanted: bool, given: Any) -> npt.NDArray[np.float32] | None:
    field = "alibi" if name == "alibi_slopes" else name
    if wanted != (given is not None):
        what = "none was given" if given is None else "one was given"
        raise SpecError(f"{name}: {what}, but the spec says {field}={wanted}; {name} is f32[H={spec.num_heads}]")
    if given is None:
        return None
    try:
        library_of(given)
    except ArrayError:
        host = np.asarray(given)
    else:
        host = as_numpy(given.cpu() if library_of(given) == "torch" else given)
    if host.shape != (spec.num_heads,):
        raise SpecError(f"{name} has shape {host.shape}, needs one number per query head, ({spec.num_heads},)")
    array = host.astype(np.float32)
    # A head whose sink is -inf has none; +inf would leave nothing for the keys.
    finite = array > -np.inf if name == "alibi_slopes" else ~np.isnan(array)
    if not (finite & (array < np.inf)).all():
        raise SpecError(
            f"{name} holds NaN or infinity" + (" (-inf is a head without a sink)" if name == "sinks" else "")
        )
    array.flags.writeable = False
    return array
