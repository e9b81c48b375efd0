"""What the kit itself stands on: its oracle, its yardstick, its tolerance, the mistakes that cases must notice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attn_dispatch import AttentionSpec, reference
from attn_dispatch.attention import Attention
from attn_dispatch.backend import Plan, Refusal, Verdict
from attn_dispatch.conformance import CASES, Case, adapt_case, check_mutations, perform, run_case
from attn_dispatch.conformance import tolerance as tolerances
from attn_dispatch.conformance.checklist import CHECKS, NO_LIMITS, SIMULATED, Limits
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.impostors import Honest
from attn_dispatch.conformance.literals import check_literals, check_stored
from attn_dispatch.conformance.loading import loaded_vendors
from attn_dispatch.conformance.mutations import MUTATIONS, must_notice
from attn_dispatch.conformance.random_cases import check_random_cases, draw_case
from attn_dispatch.conformance.rejections import check_rejection
from attn_dispatch.contract import LayerParameters, Side
from attn_dispatch.reference import ReferenceBackend, attend

CASE = {case.name: case for case in CASES}


def zeros(spec: AttentionSpec, q: Any, key: Any, value: Any, layer: LayerParameters) -> Any:
    out, lse = attend(spec, q, key, value, layer)
    return 0 * out, lse


class Zeros(Honest):
    def returned(self, call: Any, out: Any, lse: Any) -> Any:
        out[...] = 0
        return super().returned(call, out, lse)


@pytest.mark.parametrize("which", ["oracle", "yardstick"])
def test_a_wrong_oracle_or_yardstick_allows_nothing(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of zeros once passed with 1.007 of 2.014 allowed, because the oracle gave zeros too."""
    if which == "oracle":
        monkeypatch.setattr(reference, "attend", zeros)
    else:
        monkeypatch.setattr(tolerances, "attend_rounded", zeros)
    with pytest.raises(ConformanceError, match=r"oracle and yardstick differ|clause 11"):
        run_case(Zeros(), CASE["decode float32"])


@pytest.mark.parametrize("name", ["attend", "attend_rounded"])
@pytest.mark.parametrize(
    "wrong",
    [
        zeros,
        lambda spec, *arrays: attend(AttentionSpec(**{**_fields(spec), "window": (-1, -1)}), *arrays),
        lambda spec, *arrays: attend(AttentionSpec(**{**_fields(spec), "logits_soft_cap": None}), *arrays),
        lambda spec, *arrays: attend(AttentionSpec(**{**_fields(spec), "scale": 1.0}), *arrays),
        lambda spec, *arrays: (lambda out, lse: (out, lse / np.log(2)))(*attend(spec, *arrays)),
    ],
    ids=["zeros", "no window", "no cap", "no scale", "base 2"],
)
def test_literals_catch_what_is_wrong_in_the_kit(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_dispatch.conformance import literals

    check_literals()
    check_stored()
    monkeypatch.setattr(literals, name, wrong)
    with pytest.raises((ConformanceError, AttributeError)):
        check_literals()


def _fields(spec: AttentionSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in AttentionSpec.__dataclass_fields__}


def test_the_yardstick_stays_within_what_rounding_explains_and_no_wider_than_it_needs() -> None:
    """The bound holds, and is no more than a thousand times what the yardstick is off by."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_size=64, dtype=dtype)
        layer = LayerParameters(spec)
        q, key, value = (rng.standard_normal(shape) for shape in ((3, 2, 64), (50, 1, 64), (50, 1, 64)))
        q, key, value = (x.astype(tolerances.numpy_dtype(dtype)).astype(np.float64) for x in (q, key, value))
        exact = attend(spec, q, key, value, layer)[0]
        off = np.abs(tolerances.attend_rounded(spec, q, key, value, layer)[0] - exact).max()
        bound = tolerances.rounding_bound(spec, q, key, value, layer)[0].max()
        assert off < bound < 1000 * off + 1e-12, (dtype, off, bound)


def test_averages_of_many_keys_get_a_smaller_floor() -> None:
    """An output of 0.01 is not right because 0 is within a floor that was meant for outputs near one."""
    small, large = np.full((1, 1, 4), 0.01), np.full((1, 1, 4), 1.0)
    assert tolerances.granted(small, small, 8e-3) < 0.001
    assert tolerances.granted(large, large, 8e-3) == 8e-3


NOTICED = {
    "the window were one token wider": 30,
    "the window were one token narrower": 25,
    "there were no window": 30,
    "the right side of the window were one token wider": 2,
    "there were no soft-cap": 10,
    "the soft-cap were half as large again": 10,
    "the soft-cap were applied before the scale": 10,
    "causality were turned round": 120,
    "the scale were a fifth larger": 120,
    "there were no scale": 120,
    "keys and values were swapped": 150,
    "query heads took key heads in turn": 80,
    "there were no ALiBi": 10,
    "the slopes were half as large again": 10,
    "the slopes were in reverse": 10,
    "there were no sinks": 10,
    "the sinks were others": 10,
    "the sinks were in reverse": 10,
    "k_scale were left out": 5,
    "v_scale were left out": 5,
    "k_scale and v_scale were swapped": 5,
    "nothing had been computed": 180,
    "the LSE were in base 2": 10,
    "the LSE left out the sink": 3,
}
"""How many cases must notice each mistake, at least."""


def test_each_mistake_is_noticed_by_enough_cases() -> None:
    counts = Counter(mutation.name for case in CASES for mutation in must_notice(case))
    assert set(counts) == set(NOTICED)
    assert {name: counts[name] for name, least in NOTICED.items() if counts[name] < least} == {}
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_case_that_no_longer_notices_a_mistake_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs so small that every average is 0: the classical test that passes whatever is computed."""
    from attn_dispatch.conformance import checks

    original = checks.make_problem

    def tiny(case: Case, seed: int = 0) -> Any:
        problem = original(case, seed)
        for array in (problem.q, problem.k, problem.v, *problem.keys, *problem.values):
            array[...] = array * array.dtype.type(1e-6)
        for step in problem.before:
            step.k[...], step.v[...] = step.k * step.k.dtype.type(1e-6), step.v * step.v.dtype.type(1e-6)
        return problem

    monkeypatch.setattr(checks, "make_problem", tiny)
    with pytest.raises(ConformanceError, match="also passes as right if computed as if"):
        check_mutations(ReferenceBackend(), CASE["window of 33"])


def test_cases_are_lifted_to_what_is_accepted_but_for_what_they_are_about() -> None:
    def accepts(spec: AttentionSpec) -> Verdict:
        good = spec.dtype == "bfloat16" and spec.block_size == 64
        return Verdict("x", () if good else (Refusal("dtype", spec.dtype, "bfloat16 and pages of 64"),))

    lifted, verdict = adapt_case(CASE["window of 33"], accepts)
    assert verdict
    assert (lifted.spec.dtype, lifted.spec.kv_cache_dtype, lifted.spec.block_size) == ("bfloat16", "bfloat16", 64)
    assert lifted.spec.window == (32, 0)
    for name in ("type float32", "block size 17", "mixed float64"):
        same, verdict = adapt_case(CASE[name], accepts)
        assert same is CASE[name]
        assert not verdict
    run = [case for case in CASES if adapt_case(case, accepts)[1]]
    assert len(run) > 120


def test_simulators_get_a_subset_that_says_so() -> None:
    case = CASE["prefill of 600"]
    assert NO_LIMITS.reason(case) == ""
    assert "limited to" in SIMULATED.reason(case)
    assert "33001 tokens" in Limits(tokens=700).reason(CASE["context of 33,000"])
    left = {case.feature for case in CASES if not SIMULATED.reason(case)}
    assert {case.feature for case in CASES} - left == {"very long context"}
    check = next(check for check in CHECKS if check.case is case)
    assert perform(check, Honest(), SIMULATED).state == "not run"


def test_random_problems_repeat_by_their_seed_and_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [draw_case(np.random.default_rng([1, i]), Honest(), 400) for i in range(120)]
    assert draws == [draw_case(np.random.default_rng([1, i]), Honest(), 400) for i in range(120)]
    assert {case.spec.dtype for case in draws} == {"float32", "bfloat16", "float16", "float64"}
    assert {64, 128, 256} <= {case.spec.block_size for case in draws}
    assert max(case.spec.window[0] for case in draws) > 64
    assert {case.spec.kind for case in draws} == {"decoder", "encoder", "cross"}

    class NoSinks(Honest):
        def sinks(self, layer: LayerParameters) -> None:
            return None

    monkeypatch.setenv("CONFORMANCE_SEED", "5")
    with pytest.raises(ConformanceError, match=r"of CONFORMANCE_SEED=5: ") as caught:
        check_random_cases(NoSinks(), 200)
    text = str(caught.value)
    assert "sinks=True" in text
    assert "alibi" not in text
    assert "soft_cap" not in text


def test_loading_notices_a_package_that_nobody_knows(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fakevendor.py").write_text("")
    (tmp_path / "theirs.py").write_text(
        "import fakevendor\nfrom attn_dispatch.reference import ReferenceBackend\n\n"
        "class Backend(ReferenceBackend):\n    pass\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attn_dispatch.backends.any]\n1 theirs/bad = theirs:Backend\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert loaded_vendors("theirs/bad") == ["fakevendor"]
    assert loaded_vendors("reference") == []


def test_a_backend_that_writes_before_it_refuses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attention.run

    def careless(
        self: Attention, plan: Plan, q: Any, k: Any = None, v: Any = None, cache: Any = None, **more: Any
    ) -> Any:
        cache.arrays["key"][...] = 1
        return original(self, plan, q, k, v, cache, **more)

    monkeypatch.setattr(Attention, "run", careless)
    with pytest.raises(ConformanceError, match="written to before"):
        check_rejection(ReferenceBackend(), "q of too few tokens")


def test_a_check_that_was_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Side, "check_fits", lambda self, num_blocks: None)
    with pytest.raises(ConformanceError, match=r"IndexError|refused"):
        check_rejection(ReferenceBackend(), "a block one past the end")


class Sixteen(ReferenceBackend):
    """A backend that computes in bfloat16 alone, as FlashInfer and FlashAttention 4 do beside float16."""

    def verdict(self, spec: AttentionSpec) -> Verdict:
        if spec.dtype != "bfloat16":
            return self.refuse(Refusal("dtype", spec.dtype, "bfloat16"))
        return super().verdict(spec)


@pytest.mark.parametrize(
    "name", ["scale 1 MQA 256", "window of 2,101", "scores around -150", "scores around 150, no LSE", "soft-cap of 50"]
)
def test_a_case_that_is_lifted_to_a_coarser_type_asks_for_no_more_than_that_shows(name: str) -> None:
    """What is right is not refused because bfloat16 hides some mistakes in a case that was made for float32."""
    (check,) = (check for check in CHECKS if check.name == name)
    finding = perform(check, Sixteen("test/sixteen"), NO_LIMITS)
    assert finding.state == "passed", finding.detail
    lifted = adapt_case(CASE[name], Sixteen("test/sixteen").verdict)[0]
    assert lifted.spec.dtype == "bfloat16"
    assert len(finding.mutations) < len(list(must_notice(lifted)))
    # In its own type the case asks for them all; and the others are still noticed in the coarser one.
    assert len(perform(check, ReferenceBackend("test/own"), NO_LIMITS).mutations) == len(list(must_notice(CASE[name])))


def test_a_wrong_backend_is_noticed_in_cases_that_are_lifted() -> None:
    class WrongSixteen(Sixteen):
        def run(self, call: Any) -> Any:
            return super().run(replace(call, q=call.q * 2))

    (check,) = (check for check in CHECKS if check.name == "window of 33")
    assert perform(check, WrongSixteen("test/wrong"), NO_LIMITS).state == "FAILED"
