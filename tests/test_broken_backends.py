"""The kit against backends that are wrong on purpose: each mistake must make it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attn_dispatch.backend import Call, Plan, Verdict
from attn_dispatch.conformance.cases import CASES
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.merging import check_merging
from attn_dispatch.conformance.rejections import check_rejection
from attn_dispatch.contract import AttentionSpec, LayerParameters
from attn_dispatch.merge import merge_states
from attn_dispatch.reference import ReferenceBackend


class Broken(ReferenceBackend):
    """The reference, computing `wrong_spec` of what it was asked, or with inputs or outputs changed."""

    def __init__(
        self,
        spec: Callable[[AttentionSpec], AttentionSpec] = lambda spec: spec,
        before: Callable[..., tuple[Any, ...]] = lambda *arrays: arrays,
        after: Callable[[Any, Any], tuple[Any, Any]] = lambda out, lse: (out, lse),
    ) -> None:
        super().__init__("broken")
        self.spec, self.before, self.after = spec, before, after

    def run(self, call: Call) -> Any:
        wrong = Plan(spec=self.spec(call.plan.spec), view=call.plan.view)
        q, k, v, cache, layer = self.before(call.q, call.k, call.v, call.cache, call.layer)
        changed, lse = self.after(*super().run(Call(wrong, q, k, v, cache, layer, return_lse=True)))
        if call.out is not None:
            call.out[...] = changed
            changed = call.out
        return (changed, lse) if call.return_lse else changed


def without(**fields: Any) -> Callable[..., tuple[Any, ...]]:
    def change(q: Any, k: Any, v: Any, cache: Any, layer: LayerParameters) -> tuple[Any, ...]:
        copy = object.__new__(LayerParameters)
        for name in ("alibi_slopes", "sinks", "k_scale", "v_scale", "_memoized"):
            object.__setattr__(copy, name, fields.get(name, getattr(layer, name)))
        return q, k, v, cache, copy

    return change


def writes_beside(q: Any, k: Any, v: Any, cache: Any, layer: Any) -> tuple[Any, ...]:
    if cache is not None:
        cache.arrays["value"][0, 0, 0, 0] += 1
    return q, k, v, cache, layer


def same(k: Any, v: Any) -> bool:
    return k is not None and k.shape == v.shape


def nan_in_empty_rows(out: Any, lse: Any) -> tuple[Any, Any]:
    return np.where(np.isneginf(lse)[..., None], np.nan, out).astype(out.dtype), lse


def window_off_by(n: int) -> Callable[[AttentionSpec], AttentionSpec]:
    def change(spec: AttentionSpec) -> AttentionSpec:
        left, right = spec.window
        return replace(spec, window=(max(left + n, 0), right)) if left >= 0 else spec

    return change


def scaled_before_the_cap(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, logits_soft_cap=spec.logits_soft_cap / spec.scale) if spec.logits_soft_cap else spec


MISTAKES = {
    "a window one token wider": Broken(spec=window_off_by(1)),
    "a window one token narrower": Broken(spec=window_off_by(-1)),
    "the soft-cap dropped": Broken(spec=lambda spec: replace(spec, logits_soft_cap=None)),
    "the cap before the scale": Broken(spec=scaled_before_the_cap),
    "keys and values swapped": Broken(before=lambda q, k, v, c, p: (q, v, k, c, p) if same(k, v) else (q, k, v, c, p)),
    "an LSE in base 2": Broken(after=lambda out, lse: (out, lse / np.float32(np.log(2)))),
    "an LSE without the sink": Broken(after=lambda out, lse: (out, lse - np.float32(0.05))),
    "sinks ignored": Broken(before=without(sinks=None)),
    "ALiBi ignored": Broken(before=without(alibi_slopes=None)),
    "k_scale ignored": Broken(before=without(k_scale=1.0)),
    "causality ignored": Broken(spec=lambda spec: replace(spec, causal=False, window=(spec.window[0], -1))),
    "the scale forgotten": Broken(spec=lambda spec: replace(spec, scale=1.0)),
    "a neighbour's slot written": Broken(before=writes_beside),
    "nothing written": Broken(before=lambda q, k, v, c, p: (q, k if c is None else None, v, c, p)),
    "heads in another order": Broken(before=lambda q, k, v, c, p: (q[:, ::-1], k, v, c, p)),
    "NaN in empty rows": Broken(after=nan_in_empty_rows),
    "half the precision": Broken(after=lambda out, lse: ((out * 1.01).astype(out.dtype), lse)),
    "another type of output": Broken(after=lambda out, lse: (out.astype(np.float64), lse)),
}  # fmt: skip


def failures(backend: ReferenceBackend) -> Iterator[str]:
    for case in CASES:
        try:
            run_case(backend, case)
        except ConformanceError as error:
            yield str(error)


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_makes_the_kit_fail(mistake: str) -> None:
    assert next(failures(MISTAKES[mistake]), None), f"the kit did not notice: {mistake}"


def test_the_same_backend_without_a_mistake_passes() -> None:
    assert list(failures(Broken())) == []


def test_a_backend_that_runs_another_ones_kernel_is_noticed() -> None:
    class Impostor(ReferenceBackend):
        def verdict(self, spec: AttentionSpec) -> Verdict:
            return self.accept()

    # It says yes to what the reference has no layout for, and cannot do it.
    cases = tuple(case for case in CASES if case.spec.kv_cache_dtype == "uint4")
    with pytest.raises((ConformanceError, KeyError)):
        run_case(Impostor("impostor"), cases[0])


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda states: merge_states([(out, lse * np.float32(np.log(2))) for out, lse in states]),  # base 2
        lambda states: merge_states(states[1:]),
        lambda states: merge_states([(np.where(np.isinf(lse)[..., None], np.nan, out), lse) for out, lse in states]),
        lambda states: (sum(out for out, _ in states) / len(states), merge_states(states)[1]),
    ],
    ids=["base 2", "a part lost", "NaN in empty rows", "a plain mean"],
)
def test_a_wrong_merge_is_noticed(wrong: Callable[[Any], Any], parts: int) -> None:
    class Merging(ReferenceBackend):
        def merge_states(self, states: Any) -> Any:
            return wrong(states)

    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_size=8, dtype="float32")
    check_merging(ReferenceBackend(), spec, parts)
    with pytest.raises(ConformanceError, match="merge_states"):
        check_merging(Merging(), spec, parts)


def test_a_backend_that_writes_before_it_refuses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_dispatch.attention import Attention

    def careless(
        self: Attention, plan: Plan, q: Any, k: Any = None, v: Any = None, cache: Any = None, **more: Any
    ) -> Any:
        cache.arrays["key"][...] = 1
        return original(self, plan, q, k, v, cache, **more)

    original = Attention.run
    monkeypatch.setattr(Attention, "run", careless)
    with pytest.raises(ConformanceError, match="written to before"):
        check_rejection(ReferenceBackend(), "q of too few tokens")


def test_a_check_that_was_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_dispatch.contract import Side

    monkeypatch.setattr(Side, "check_fits", lambda self, num_blocks: None)
    with pytest.raises(ConformanceError, match=r"IndexError|refused"):
        check_rejection(ReferenceBackend(), "a block one past the end")
