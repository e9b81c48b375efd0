"""merge_states against attention over the union of the keys."""

from __future__ import annotations

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.contract import LayerParameters
from attn_dispatch.errors import ArrayError
from attn_dispatch.reference import attend

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, dtype="float32", causal=False)


def partials(cuts: list[int], sinks: bool = False) -> tuple[list, tuple]:
    rng = np.random.default_rng(3)
    q, key, value = rng.standard_normal((5, 4, 16)), rng.standard_normal((40, 2, 16)), rng.standard_normal((40, 2, 16))
    plain = LayerParameters(SPEC)
    parts = [attend(SPEC, q, key[a:b], value[a:b], plain) for a, b in zip([0, *cuts], [*cuts, 40], strict=True)]
    return [(out.astype(np.float32), lse.astype(np.float32)) for out, lse in parts], attend(SPEC, q, key, value, plain)


@pytest.mark.parametrize("cuts", [[], [1], [13, 14], [0], [7, 7, 39, 40]])
def test_parts_make_the_whole(cuts: list[int]) -> None:
    states, (out, lse) = partials(cuts)
    merged, merged_lse = ad.merge_states(states)
    assert merged.dtype == merged_lse.dtype == np.float32
    np.testing.assert_allclose(merged, out, atol=2e-6)
    np.testing.assert_allclose(merged_lse, lse, atol=2e-6)


def test_base_two_is_wrong() -> None:
    states, (out, _) = partials([13])
    merged, _ = ad.merge_states([(o, lse / np.float32(np.log(2))) for o, lse in states])
    assert np.abs(merged - out).max() > 1e-2


def test_rows_that_attend_to_nothing_weigh_nothing() -> None:
    nothing = np.zeros((2, 4, 16), np.float32), np.full((2, 4), -np.inf, np.float32)
    something = np.ones((2, 4, 16), np.float32), np.zeros((2, 4), np.float32)
    out, lse = ad.merge_states([nothing, something, nothing])
    assert np.array_equal(out, something[0])
    assert np.array_equal(lse, something[1])
    out, lse = ad.merge_states([nothing, nothing])
    assert not out.any()
    assert np.isneginf(lse).all()


def test_states_that_do_not_belong_together_are_refused() -> None:
    out, lse = np.zeros((2, 4, 16), np.float32), np.zeros((2, 4), np.float32)
    for states in ([], [(out, lse), (out[:1], lse)], [(out, lse.T)], [(out, lse.astype(np.float16))], [(out[0], lse)]):
        with pytest.raises(ArrayError):
            ad.merge_states(states)
