"""A fixed maximum for split decode: FlashDecoding++ (arXiv 2311.01282), off unless the environment gives one.

Weights are taken relative to one level, instead of to the largest score that a row has met so far. Nothing has to be
shrunk when a larger one turns up, and no step of the loop reduces over its keys. A tile of which a row's largest score
turns out to be too far from the level is computed again, with the running maximum, by the same program: a branch in the
kernel, for which no host waits. No vendor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import EnvironmentVariableError

from .constants import compute_type

__all__ = ["VARIABLE", "WEIGHTS", "fixed_maximum", "level_constants"]

VARIABLE = "ATTN_DISPATCH_TRITON_FIXED_MAXIMUM"
"""What a score is about, as a natural exponent (0, 7.5): the level of split decode. Unset: the running maximum."""

WEIGHTS: dict[str, tuple[float, float]] = {"float16": (-4.0, 15.0), "bfloat16": (-40.0, 40.0), "float32": (-40.0, 40.0)}
"""Between which powers of two a row's largest weight must lie, by the type that weights are rounded to.

float16 ends at 2^16, and below 2^-14 has steps of 2^-24. With the running maximum the largest weight is 1; with a
largest of 2^-4 these steps are 16 times as coarse beside it: n keys add at most n 2^-21 of it, and errors that do not
all point the same way about sqrt(n) 2^-22, less than the 2^-11 of the type itself for any n that a split has.
bfloat16 and float32 have the same exponents and are as fine everywhere: a weight that vanishes (2^-126) beside one of
2^-40 is none. Upwards the sums decide, in float32: weights of 2^40, 2^24 of them, leave 2^63 for the values."""

_FURTHEST = 1e6


def fixed_maximum(environ: Mapping[str, str] | None = None) -> float | None:
    """Return the level that the environment asks for, or None.

    Args:
        environ: instead of the process's own.

    Raises:
        EnvironmentVariableError: it is not a number, or a senseless one.
    """
    text = (os.environ if environ is None else environ).get(VARIABLE)
    if not text:
        return None
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if not abs(level) <= _FURTHEST:
        raise EnvironmentVariableError(
            f"{VARIABLE}={text!r} is not a number from -{_FURTHEST:g} to {_FURTHEST:g}: give the natural exponent that "
            "scores are about (0, or 7.5), or unset it for the running maximum"
        )
    return level


def level_constants(spec: AttentionSpec, paged: bool, level: float | None) -> dict[str, Any]:
    """Return the compile-time arguments of `decode` that are about its maximum, in base 2; None: a running one.

    Args:
        spec: the layer.
        paged: keys are in a cache.
        level: see `fixed_maximum`.
    """
    if level is None:
        return {"LEVEL": None, "LOWEST": None, "HIGHEST": None}
    lowest, highest = WEIGHTS[compute_type(spec, paged)]
    # Rounded, or Triton would take a tiny one for a float64.
    return {"LEVEL": round(level / math.log(2), 4), "LOWEST": lowest, "HIGHEST": highest}
