"""Random specs and batches against the float64 reference: wider than the kit's, and as many as one asks for.

`CPU_FUZZ_EXAMPLES=2000 pytest platforms/cpu/tests/test_fuzz.py` is the run that the support table stands on.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_dispatch.conformance import Case, check_mutations, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry
from attn_dispatch_cpu.code_path import AMX_STORED

EXAMPLES = int(os.environ.get("CPU_FUZZ_EXAMPLES", "200"))
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    """Any spec that the backend says yes to."""
    kind = draw(st.sampled_from(["decoder"] * 6 + ["encoder", "cross"]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 8]))
    dtype = draw(st.sampled_from(["bfloat16", "bfloat16", "float32", "float16"]))
    head_size = draw(st.integers(8, 160) | st.sampled_from([64, 96, 128, 192, 256, 512, 576]))
    causal = kind == "decoder" and draw(st.sampled_from([True, True, True, False]))
    left = draw(st.sampled_from([-1, -1, -1, 0, 1, 3, 7, 31, 32, 33, 100]))
    right = -1 if causal else draw(st.sampled_from([-1, -1, 0, 5]))
    return AttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 71])),
        num_kv_heads=kv_heads,
        head_size=head_size,
        value_head_size=draw(st.sampled_from([head_size, head_size, 8, 33, 64, 128])),
        dtype=dtype,
        kv_cache_dtype=draw(
            st.sampled_from([dtype] * 4 + ["int8", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32"])
        ),
        block_size=draw(st.sampled_from([8, 16, 24, 32, 32, 64, 128, 136])),
        scale=draw(st.sampled_from([head_size**-0.5, 0.2, -0.1])),
        causal=causal,
        window=(-1, -1) if kind == "cross" else (left, right),
        logits_soft_cap=draw(st.sampled_from([None, None, 1.5, 30.0])),
        alibi=kind != "cross" and draw(st.sampled_from([False, False, True])),
        sinks=draw(st.sampled_from([False, False, True])),
        kind=kind,
        writes_kv=draw(st.sampled_from([True] * 5 + [False])) or kind != "decoder",
        returns_lse=draw(st.sampled_from([False, True])),
    )


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """A spec with a batch: decodes, verifies of a few tokens, prefills, idle sequences."""
    spec = draw(specs())
    count = draw(st.integers(1, 4))
    longest = 700 if spec.num_heads * spec.head_size <= 1024 else 150
    context = (
        [0] * count
        if spec.kind == "encoder"
        else draw(st.lists(st.integers(0, longest), min_size=count, max_size=count))
    )
    new = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 9, 33, 70]), min_size=count, max_size=count))
    encoder = None
    if spec.kind == "cross":
        rest = st.lists(st.integers(0, 200), min_size=count - 1, max_size=count - 1)
        encoder = (draw(st.integers(1, 200)), *draw(rest))  # a batch without any encoder token has no blocks
    scales = (0.03, 0.04) if spec.kv_cache_dtype == "int8" else (1.0, 1.0)
    return Case("random", "random", spec, tuple(context), tuple(new), encoder=encoder, scales=scales)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_random_problems(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is within tolerance, the cache holds exactly what it should, on any number of threads."""
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", str(threads))
    backend = registry().load("cpu/numba")
    seeds = {1: 11, 2: 22, 5: 55}

    @SETTINGS
    @given(case=problems(), seed=st.integers(0, 2**16))
    def check(case: Case, seed: int) -> None:
        result = run_case(backend, case, seed + seeds[threads], mutations=False)
        assert result.verdict, str(result.verdict)

    check()


@pytest.mark.parametrize("path", ["fma", "amx-emulated"])
def test_random_problems_on_another_code_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this CPU would not choose computes the same: bf16 queries, any cache that bf16 holds exactly."""
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "2")
    monkeypatch.setenv("ATTN_DISPATCH_CPU_CODE_PATH", path)
    backend = registry().load("cpu/numba")

    @settings(SETTINGS, max_examples=EXAMPLES if "CPU_FUZZ_EXAMPLES" in os.environ else 40)
    @given(case=problems(), seed=st.integers(0, 2**16), stored=st.sampled_from(AMX_STORED))
    def check(case: Case, seed: int, stored: str) -> None:
        spec = replace(case.spec, dtype="bfloat16", kv_cache_dtype=stored)
        scales = (0.03, 0.04) if stored == "int8" else (1.0, 1.0)
        result = run_case(backend, replace(case, spec=spec, scales=scales), seed, mutations=False)
        assert result.verdict, str(result.verdict)

    check()


EXACT = {"num_heads": 8, "num_kv_heads": 2, "dtype": "float32"}
WIDE = {"num_heads": 8, "num_kv_heads": 2, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "case",
    [
        Case("windowed decode", "window", AttentionSpec(**WIDE, window=(40, 0)), (300, 90), (1, 1)),
        Case("windowed verify", "window", AttentionSpec(**WIDE, window=(40, 0)), (300, 90), (2, 2)),
        Case("windowed prefill", "window", AttentionSpec(**WIDE, window=(40, 0)), (30, 90), (80, 33)),
        Case("cap and alibi, prefill", "cap", AttentionSpec(**WIDE, logits_soft_cap=2.0, alibi=True), (30,), (80,)),
        Case("cap and alibi, decode", "cap", AttentionSpec(**WIDE, logits_soft_cap=2.0, alibi=True), (130,), (1,)),
        Case("sinks, split over threads", "sinks", AttentionSpec(**EXACT, sinks=True), (600,), (1,)),
        Case("two-sided window", "window", AttentionSpec(**WIDE, kind="encoder", window=(9, 5)), (0,), (80,)),
    ],
    ids=lambda case: case.name,
)
def test_mistakes_are_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels and the merge: a wrong window, cap, order or sink does not pass."""
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "5")
    backend = registry().load("cpu/numba")
    assert run_case(backend, case).verdict
    check_mutations(backend, case)
