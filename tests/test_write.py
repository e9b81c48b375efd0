"""Writing apart from attending: the same cache and the same output as one run, on every available backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.errors import ArrayError, PlanError

BACKENDS = [name for name, available in ad.backends().items() if available and not name.startswith("tpu")]
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (9, 0)},
    "cross": {"kind": "cross"},
    "int8": {"kv_cache_dtype": "int8"},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(SPECS))
def test_write_then_run(backend: str, name: str) -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, dtype="float32", block_size=32, **SPECS[name])
    if not ad.explain(spec, backend).chosen:
        pytest.skip(str(ad.explain(spec, backend).verdicts[0]))
    layer: dict[str, Any] = {"k_scale": 0.02, "v_scale": 0.03} if name == "int8" else {}
    if spec.sinks:
        layer["sinks"] = np.ones(4, np.float32)
    attn = ad.attention(spec, backend, **layer)
    rng = np.random.default_rng(0)
    caches = [attn.allocate(8) for _ in range(2)]
    for new, lens in (([40, 3], [40, 3]), ([1, 1], [41, 4])):
        if name == "cross":
            batch = ad.AttentionMetadata.build(
                [2, 1], [2, 1], None, 32, encoder_query_lens=new, encoder_seq_lens=lens,
                encoder_block_tables=[[5, 2], [7]],
            )  # fmt: skip
        else:
            batch = ad.AttentionMetadata.build(new, lens, [[5, 2], [7]], 32)
        q = rng.standard_normal((batch.num_tokens, 4, 32)).astype(np.float32)
        k, v = (rng.standard_normal((sum(new), 2, 32)).astype(np.float32) for _ in range(2))
        plans = [attn.plan(batch) for _ in range(2)]
        expected = attn.run(plans[0], q, k, v, caches[0])
        attn.write(plans[1], k, v, caches[1])
        before = [np.asarray(x).copy() for x in caches[1].gather(range(8))]
        np.testing.assert_array_equal(before, [np.asarray(x) for x in caches[0].gather(range(8))])
        result = attn.run(plans[1], q, cache=caches[1])
        np.testing.assert_allclose(np.asarray(result), np.asarray(expected), rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(before, [np.asarray(x) for x in caches[1].gather(range(8))])


def test_a_step_that_was_not_written_is_not_attended_to() -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=32, dtype="float32", block_size=32)
    attn = ad.attention(spec, "reference")
    batch = ad.AttentionMetadata.build([3], [3], [[1]], 32)
    q, k, v = np.ones((3, 3, 2, 32), np.float32)
    written, other = attn.allocate(2), attn.allocate(2)
    plan = attn.plan(batch)
    attn.write(plan, k, v, written)
    for call in (lambda: attn.run(plan, q, cache=other), lambda: attn.run(attn.plan(batch), q, cache=written)):
        with pytest.raises(ArrayError, match="writes 3 tokens"):
            call()
    shared = ad.attention(ad.AttentionSpec(num_heads=2, head_size=32, dtype="float32", writes_kv=False), "reference")
    with pytest.raises(PlanError, match="writes_kv=False"):
        shared.write(shared.plan(batch), k, v, written)
