"""Rows of attention computed by hand: what the kit's oracle and its yardstick are themselves checked against.

Every score is the logarithm of a small whole number, so that weights are fractions that anyone can add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import atanh, inf, log
from typing import Any

import numpy as np

from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.tolerance import attend_rounded
from attn_dispatch.contract import AttentionSpec, LayerParameters
from attn_dispatch.contract.dtypes import quantise
from attn_dispatch.reference import attend

__all__ = ["LITERALS", "Literal", "check_literals", "check_stored"]

_LN2, _LN3 = log(2), log(3)
_CAP = 1.5


@dataclass(frozen=True)
class Literal:
    """One sequence with head size 1: a query's score with a key is their product.

    Attributes:
        name: what it shows.
        queries: of each token, one number per query head.
        keys: of each token, one number per key head.
        values: of each token and key head, the value's elements.
        out: what must come out, of each token and query head.
        lse: likewise.
        spec: fields beside heads and sizes.
        layer: slopes and sinks.
    """

    name: str
    queries: list[list[float]]
    keys: list[list[float]]
    values: list[list[list[float]]]
    out: list[list[list[float]]]
    lse: list[list[float]]
    spec: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)


# Three keys that a query of 1 weighs 1 : 2 : 3, and their values.
_KEYS = [[0.0], [_LN2], [_LN3]]
_VALUES = [[[6.0]], [[12.0]], [[18.0]]]

LITERALS: tuple[Literal, ...] = (
    Literal("weights 1:2:3", [[1.0]], _KEYS, _VALUES, [[[14.0]]], [[log(6)]]),
    Literal("the scale halves the score", [[2.0]], _KEYS, _VALUES, [[[14.0]]], [[log(6)]], {"scale": 0.5}),
    Literal(
        "the last query sits at the last key", [[1.0], [1.0]], _KEYS, _VALUES,
        [[[10.0]], [[14.0]]], [[_LN3], [log(6)]],
    ),
    Literal(
        "not causal: all see all", [[1.0], [0.0]], _KEYS, _VALUES,
        [[[14.0]], [[12.0]]], [[log(6)], [_LN3]], {"causal": False},
    ),
    Literal("a window of two, itself included", [[1.0]], _KEYS, _VALUES, [[[15.6]]], [[log(5)]], {"window": (1, 0)}),
    Literal("a window of one", [[1.0]], _KEYS, _VALUES, [[[18.0]]], [[_LN3]], {"window": (0, 0)}),
    Literal(
        "one to the left, one to the right", [[1.0], [1.0], [1.0]], _KEYS, _VALUES,
        [[[10.0]], [[14.0]], [[15.6]]], [[_LN3], [log(6)], [log(5)]],
        {"kind": "encoder", "window": (1, 1)},
    ),
    Literal(
        "the cap is applied to the scaled score", [[2.0]], [[0.0], [_CAP * atanh(_LN2 / _CAP)]], _VALUES[:2],
        [[[10.0]]], [[_LN3]], {"logits_soft_cap": _CAP, "scale": 0.5},
    ),
    Literal(
        "ALiBi halves with each token of distance", [[0.0]], _KEYS, _VALUES,
        [[[(6 + 24 + 72) / 7]]], [[log(7 / 4)]], {"alibi": True}, {"alibi_slopes": [_LN2]},
    ),
    Literal(
        "ALiBi comes after the cap", [[2.0]], [[0.0], [_CAP * atanh(_LN2 / _CAP)]], _VALUES[:2],
        [[[(3 + 24) / 2.5]]], [[log(2.5)]],
        {"logits_soft_cap": _CAP, "scale": 0.5, "alibi": True}, {"alibi_slopes": [_LN2]},
    ),
    Literal(
        "a sink of weight 6", [[1.0]], _KEYS, _VALUES, [[[7.0]]], [[log(12)]], {"sinks": True}, {"sinks": [log(6)]}
    ),
    Literal(
        "a sink is not capped and has no distance", [[0.0]], [[0.0]], [[[6.0]]],
        [[[1.0]]], [[log(6)]],
        {"sinks": True, "alibi": True, "logits_soft_cap": 1.0}, {"sinks": [log(5)], "alibi_slopes": [3.0]},
    ),
    Literal(
        "query heads 0 and 1 share key head 0", [[1.0, 0.0, 1.0, 0.0]], [[0.0, _LN3], [_LN2, 0.0]],
        [[[6.0], [4.0]], [[12.0], [8.0]]],
        [[[10.0], [9.0], [5.0], [6.0]]], [[_LN3, _LN2, log(4), _LN2]],
    ),
    Literal(
        "values of two elements", [[1.0]], _KEYS, [[[6.0, 0.0]], [[0.0, 6.0]], [[6.0, 6.0]]],
        [[[4.0, 5.0]]], [[log(6)]],
    ),
    Literal("a row without keys", [[1.0]], [], [], [[[0.0]]], [[-inf]]),
    Literal("a row that has a sink alone", [[1.0]], [], [], [[[0.0]]], [[_LN2]], {"sinks": True}, {"sinks": [_LN2]}),
    Literal(
        "a query before the first key", [[1.0], [1.0]], [[_LN2]], [[[6.0]]],
        [[[0.0]], [[6.0]]], [[-inf], [_LN2]],
    ),
    Literal(
        "scores that overflow without their maximum", [[1.0]], [[900.0], [900.0 + _LN2]], _VALUES[:2],
        [[[10.0]]], [[900.0 + _LN3]],
    ),
)  # fmt: skip


def check_literals() -> None:
    """Check that the oracle and the yardstick give the rows that were computed by hand.

    Raises:
        ConformanceError: one does not, so that nothing could be judged by it.
    """
    for literal in LITERALS:
        for function, dtype, near in ((attend, "float64", 1e-7), (attend_rounded, "float32", 2e-4)):
            _check(literal, function, dtype, near)


def _check(literal: Literal, function: Any, dtype: str, near: float) -> None:
    heads, kv_heads = len(literal.queries[0]), len(literal.keys[0]) if literal.keys else 1
    fields: dict[str, Any] = {"dtype": dtype, "scale": 1.0} | literal.spec
    width = len(literal.out[0][0])
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=1, value_head_size=width, **fields)
    vectors: dict[str, Any] = {name: np.array(numbers, np.float32) for name, numbers in literal.layer.items()}
    layer = LayerParameters(spec, **vectors)
    q = np.array(literal.queries)[..., None]
    k = np.array(literal.keys, np.float64).reshape(-1, kv_heads, 1)
    v = np.array(literal.values, np.float64).reshape(-1, kv_heads, spec.value_head_size)
    out, lse = function(spec, q, k, v, layer)
    for what, array, expected in (("output", out, literal.out), ("LSE", lse, literal.lse)):
        if array.shape != np.shape(expected) or not np.allclose(array, expected, rtol=near, atol=near):
            raise ConformanceError(
                f"the kit's own {function.__name__} is wrong ({literal.name}): the {what} is {array.tolist()}, "
                f"by hand it is {expected}"
            )


_STORED: tuple[tuple[str, float, list[float], list[float]], ...] = (
    # ties go to the even neighbour, and what is too large saturates
    ("int8", 0.5, [0.25, 0.75, -0.25, 1.0, 200.0, -200.0], [0, 2, 0, 2, 127, -127]),
    ("int8", 1.0, [1.5, 2.5, -1.5, 126.6], [2, 2, -2, 127]),
    ("float8_e4m3fn", 1.0, [1.0625, 1.1875, 460.0, -460.0, 0.4375], [1.0, 1.25, 448.0, -448.0, 0.4375]),
    ("float8_e5m2", 1.0, [1.125, 1.375, 60000.0, -60000.0], [1.0, 1.5, 57344.0, -57344.0]),
    ("float8_e4m3fn", 0.5, [0.53125, 0.59375], [1.0, 1.25]),
    ("bfloat16", 1.0, [1.00390625, 1.01171875], [1.0, 1.015625]),
)  # fmt: skip


def check_stored() -> None:
    """Check that what clause 12 stores for a number is what was computed by hand.

    Raises:
        ConformanceError: it is not.
    """
    for dtype, scale, numbers, expected in _STORED:
        stored = quantise(np.array(numbers, np.float32), dtype, scale).astype(np.float64)
        if stored.tolist() != expected:
            raise ConformanceError(
                f"clause 12: {numbers} / {scale} as {dtype} is {stored.tolist()}, must be {expected}"
            )
