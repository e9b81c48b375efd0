"""Random specs and batches that the backend says yes to: head sizes, types, features, blocks shared in part.

`OPENVINO_FUZZ_EXAMPLES=2000 pytest platforms/openvino/tests/test_fuzz.py` is the run that the verdicts stand on.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_dispatch.conformance import Case, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry, verdict_of

EXAMPLES = int(os.environ.get("OPENVINO_FUZZ_EXAMPLES", "60"))
CACHES = {
    "float32": ["float32"] * 4 + ["float16", "uint8", "uint4"],
    "float16": ["float16"] * 2 + ["float32"],
    "bfloat16": ["bfloat16"] * 3 + ["uint8", "uint4"],
}


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """A spec of blocks of 32 without what is always refused, and a batch."""
    kind = draw(st.sampled_from(["decoder"] * 5 + ["encoder", "cross"]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 8]))
    dtype = draw(st.sampled_from(list(CACHES)))
    # Every size compiles a model: a few of each kind, drawn anew in a longer run.
    head_size = draw(st.sampled_from([8, 9, 12, 18, 33, 40, 50, 64, 72, 90, 100, 128, 130, 192, 255, 256, 512]))
    causal = kind == "decoder" and draw(st.sampled_from([True, True, True, False]))
    spec = AttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 5, 8])),
        num_kv_heads=kv_heads,
        head_size=head_size,
        value_head_size=draw(st.sampled_from([head_size, head_size, 8, 34, 64, 128])),
        dtype=dtype,
        kv_cache_dtype=draw(st.sampled_from(CACHES[dtype])),
        scale=draw(st.sampled_from([head_size**-0.5, 0.2, -0.1])),
        causal=causal,
        window=(draw(st.sampled_from([-1, -1, 0, 1, 7, 31, 32, 33, 100])), 0) if causal else (-1, -1),
        alibi=causal and draw(st.sampled_from([False, False, True])),
        sinks=draw(st.sampled_from([False, False, True])),
        kind=kind,
        writes_kv=draw(st.sampled_from([True] * 4 + [False])) or kind != "decoder",
    )
    count = draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, 200), min_size=count, max_size=count)
    new = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 9, 33, 70]), min_size=count, max_size=count))
    writing = kind == "decoder" and spec.writes_kv
    return Case(
        "random",
        "random",
        spec,
        context=(0,) * count if kind == "encoder" else tuple(draw(lengths)),
        new=tuple(new),
        encoder=tuple(draw(lengths)) if kind == "cross" else None,
        padding=draw(st.sampled_from([0, 0, 1, 2])) if writing else 0,
        skipped_slots=writing and sum(new) > 0 and draw(st.sampled_from([False] * 3 + [True])),
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_random_problems(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", str(threads))
    backend = registry().load("openvino/paged")
    ran = 0

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=problems(), seed=st.integers(0, 2**16))
    def check(case: Case, seed: int) -> None:
        nonlocal ran
        run_case(backend, case, seed, mutations=False)  # what is drawn need not show every mistake
        ran += bool(verdict_of(backend, case.spec))

    check()
    assert ran > EXAMPLES / 4
