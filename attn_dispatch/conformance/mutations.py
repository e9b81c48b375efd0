"""Mistakes that a kernel makes, as changes of what it reads: each names the cases that must notice it.

A case that must notice one and does not proves nothing, and fails. Of a result that is wrong, they say what it looks
like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.problem import Arrays, Problem, Reading
from attn_dispatch.contract import AttentionSpec, LayerParameters
from attn_dispatch.contract.dtypes import is_quantised

__all__ = ["MUTATIONS", "Mutation", "must_notice"]


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: continues the words "as if ".
        change: return what is read by mistake, or None where the mistake makes no difference.
        noticed_by: whether a case must notice it.
    """

    name: str
    change: Callable[[Problem, Reading], Reading | None]
    noticed_by: Callable[[Case], bool]


def must_notice(case: Case) -> Iterator[Mutation]:
    """Yield the mistakes that a case must notice."""
    if max(case.new, default=0):
        yield from (mutation for mutation in MUTATIONS if mutation.noticed_by(case))


def _never(case: Case) -> bool:
    return False


def _length(case: Case) -> int:
    return max((c + n for c, n in zip(case.context, case.new, strict=True)), default=0)


def _spec(**fields: Callable[[AttentionSpec], Any]) -> Callable[[Problem, Reading], Reading | None]:
    """Return a change of the spec's fields; None where it is no change, or no spec."""

    def change(problem: Problem, reading: Reading) -> Reading | None:
        spec = reading.spec
        try:
            wrong = replace(spec, **{name: value(spec) for name, value in fields.items()})
        except (TypeError, ValueError):
            return None
        return None if wrong == spec else replace(reading, spec=wrong)

    return change


def _layer(**fields: Callable[[Any], Any]) -> Callable[[Problem, Reading], Reading | None]:
    """Return a change of the layer's parameters (None of a vector: the layer has none)."""

    def change(problem: Problem, reading: Reading) -> Reading | None:
        parameters = dict(problem.parameters)
        spec = reading.spec
        for name, new in fields.items():
            if parameters.get(name) is None:
                return None
            parameters[name] = new(parameters[name])
            if parameters[name] is None:
                spec = replace(spec, alibi=False) if name == "alibi_slopes" else replace(spec, sinks=False)
        return replace(reading, spec=spec, layer=LayerParameters(spec, **parameters))

    return change


def _stored(
    keys: Callable[[Problem, list[Arrays]], list[Arrays]] = lambda problem, x: x,
    values: Callable[[Problem, list[Arrays]], list[Arrays]] = lambda problem, x: x,
) -> Callable[[Problem, Reading], Reading | None]:
    def change(problem: Problem, reading: Reading) -> Reading | None:
        return replace(reading, keys=keys(problem, reading.keys), values=values(problem, reading.values))

    return change


def _swapped(problem: Problem, reading: Reading) -> Reading | None:
    if problem.spec.head_size != problem.spec.value_head_size or not sum(map(len, reading.keys)):
        return None
    return replace(reading, keys=reading.values, values=reading.keys)


def _heads_in_turn(problem: Problem, reading: Reading) -> Reading | None:
    spec = reading.spec
    order = np.arange(spec.num_heads) % spec.num_kv_heads
    wrong = replace(spec, num_kv_heads=spec.num_heads)
    keys, values = ([x[:, order] for x in side] for side in (reading.keys, reading.values))
    return replace(reading, spec=wrong, keys=keys, values=values)


def _first_head_only(problem: Problem, reading: Reading) -> Reading | None:
    keys, values = ([np.repeat(x[:, :1], x.shape[1], axis=1) for x in side] for side in (reading.keys, reading.values))
    return replace(reading, keys=keys, values=values)


def _neighbours(problem: Problem, reading: Reading) -> Reading | None:
    if len(reading.keys) < 2:
        return None
    return replace(reading, keys=reading.keys[1:] + reading.keys[:1], values=reading.values[1:] + reading.values[:1])


def _cut(start: Callable[[int, int], int], stop: Callable[[int], int]) -> Callable[[Problem, Reading], Reading | None]:
    """Return a change to the keys from start(length, new) to stop(length)."""

    def change(problem: Problem, reading: Reading) -> Reading | None:
        lens = [(len(k), int(n)) for k, n in zip(reading.keys, problem.view.query_lens, strict=True)]
        keys, values = (
            [x[start(*n) : stop(n[0])] for x, n in zip(side, lens, strict=True)]
            for side in (reading.keys, reading.values)
        )
        return replace(reading, keys=keys, values=values)

    return change


def _result(after: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]) -> Callable[[Problem, Reading], Reading | None]:
    return lambda problem, reading: replace(reading, after=after)


def _lse_without_sink(problem: Problem, reading: Reading) -> Reading | None:
    if reading.layer.sinks is None or not problem.spec.returns_lse:
        return None
    sinks = reading.layer.sinks.astype(np.float64)

    def after(out: Arrays, lse: Arrays) -> tuple[Arrays, Arrays]:
        with np.errstate(divide="ignore"):
            return out, lse + np.log(np.maximum(-np.expm1(np.minimum(sinks - lse, 0.0)), 0.0))

    return replace(reading, after=after)


def _scaled(name: str) -> Callable[[Problem, Reading], Reading | None]:
    def change(problem: Problem, reading: Reading) -> Reading | None:
        if not is_quantised(problem.spec.kv_cache_dtype):
            return None
        k, v = reading.layer.k_scale, reading.layer.v_scale
        wrong = {"k": (1 / k, 1.0), "v": (1.0, 1 / v), "swapped": (v / k, k / v)}[name]
        keys, values = ([x * f for x in side] for side, f in ((reading.keys, wrong[0]), (reading.values, wrong[1])))
        return replace(reading, keys=keys, values=values)

    return change


def _plain_scores(case: Case) -> bool:
    # One key has weight 1 whatever its score: with at least a few, the scale must matter.
    return (
        _length(case) > 8
        and case.spec.window[0] != 0
        and case.magnitude == 1.0
        and not is_quantised(case.spec.kv_cache_dtype)
    )


def _has_window(case: Case) -> bool:
    return 0 <= case.spec.window[0] < _length(case) - 1


def _has_groups(case: Case) -> bool:
    return 1 < case.spec.num_kv_heads < case.spec.num_heads


def _has_sinks(case: Case) -> bool:
    return case.spec.sinks


def _has_keys(case: Case) -> bool:
    return case.encoder is None or any(case.encoder)


def _returns_lse(case: Case) -> bool:
    return case.spec.returns_lse


def _shifted(out: Arrays, lse: Arrays) -> tuple[Arrays, Arrays]:
    return np.roll(out, 1, axis=0), np.roll(lse, 1, axis=0)


MUTATIONS: tuple[Mutation, ...] = (
    Mutation("the window were one token wider", _spec(window=lambda s: (s.window[0] + 1, s.window[1])), _has_window),
    Mutation(
        "the window were one token narrower",
        _spec(window=lambda s: (s.window[0] - 1, s.window[1])),
        lambda case: _has_window(case) and case.spec.window[0] > 0,
    ),
    Mutation("there were no window", _spec(window=lambda s: (-1, -1)), _has_window),
    Mutation(
        "the right side of the window were one token wider",
        _spec(window=lambda s: (s.window[0], s.window[1] + 1)),
        lambda case: not case.spec.causal and 0 <= case.spec.window[1] < _length(case) - 1,
    ),
    Mutation(
        "there were no soft-cap",
        _spec(logits_soft_cap=lambda s: None),
        lambda case: case.spec.logits_soft_cap is not None,
    ),
    Mutation(
        "the soft-cap were half as large again",
        _spec(logits_soft_cap=lambda s: 1.5 * s.logits_soft_cap if s.logits_soft_cap else None),
        lambda case: case.spec.logits_soft_cap is not None,
    ),
    Mutation(
        "the soft-cap were applied before the scale",
        _spec(logits_soft_cap=lambda s: s.logits_soft_cap / s.scale if s.logits_soft_cap else None),
        lambda case: case.spec.logits_soft_cap is not None,
    ),
    Mutation(
        "causality were turned round",
        _spec(causal=lambda s: not s.causal, window=lambda s: (s.window[0], -1)),
        lambda case: case.spec.kind != "cross" and max(case.new) > 1,
    ),
    Mutation("the scale were a fifth larger", _spec(scale=lambda s: 1.2 * s.scale), _plain_scores),
    Mutation("there were no scale", _spec(scale=lambda s: 1.0), _plain_scores),
    Mutation("keys and values were swapped", _swapped, lambda case: _has_keys(case) and _same_sizes(case)),
    Mutation("query heads took key heads in turn", _heads_in_turn, lambda case: _has_groups(case) and _has_keys(case)),
    Mutation("all heads read the first key head", _first_head_only, _never),
    Mutation("there were no ALiBi", _layer(alibi_slopes=lambda x: None), lambda case: case.spec.alibi),
    Mutation("the slopes were half as large again", _layer(alibi_slopes=lambda x: 1.5 * x), lambda c: c.spec.alibi),
    Mutation("the slopes were in reverse", _layer(alibi_slopes=lambda x: x[::-1]), lambda case: case.spec.alibi),
    Mutation("there were no sinks", _layer(sinks=lambda x: None), _has_sinks),
    Mutation("the sinks were others", _layer(sinks=lambda x: x + 0.7), _has_sinks),
    Mutation("the sinks were in reverse", _layer(sinks=lambda x: x[::-1]), _has_sinks),
    Mutation("k_scale were left out", _scaled("k"), lambda case: case.scales[0] != 1),
    Mutation("v_scale were left out", _scaled("v"), lambda case: case.scales[1] != 1),
    Mutation("k_scale and v_scale were swapped", _scaled("swapped"), lambda case: case.scales[0] != case.scales[1]),
    Mutation("each query missed its last key", _cut(lambda n, new: 0, lambda n: max(n - 1, 0)), _never),
    Mutation("each query missed its first key", _cut(lambda n, new: min(1, n), lambda n: n), _never),
    Mutation("only this step's tokens were seen", _cut(lambda n, new: n - new, lambda n: n), _never),
    Mutation("each sequence read its neighbour's blocks", _neighbours, _never),
    Mutation("rows were shifted by one token", _result(_shifted), _never),
    Mutation("nothing had been computed", _result(lambda out, lse: (0 * out, lse)), _has_keys),
    Mutation("the LSE were in base 2", _result(lambda out, lse: (out, lse / np.log(2))), _returns_lse),
    Mutation("the LSE left out the sink", _lse_without_sink, lambda case: _has_sinks(case) and _returns_lse(case)),
)  # fmt: skip
"""Every one. Names are unique."""


def _same_sizes(case: Case) -> bool:
    return case.spec.head_size == case.spec.value_head_size
