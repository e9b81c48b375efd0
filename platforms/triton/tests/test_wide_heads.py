"""Heads wider than the kit's: latent attention (DeepSeek's 576 / 512), and the widest that the verdict accepts."""

from __future__ import annotations

import pytest

import attn_dispatch as ad
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.checks import check_mutations, run_case
from attn_dispatch.dispatch import registry
from attn_dispatch_triton.targets import LARGEST_EXACT_HEAD, LARGEST_HEAD


@pytest.mark.parametrize(("head_size", "value_size"), [(576, 512), (LARGEST_HEAD, LARGEST_HEAD)])
def test_wide_heads(head_size: int, value_size: int) -> None:
    backend = registry().load("triton/paged")
    if not (available := backend.probe()):
        pytest.skip(f"not run: {available.reason}")
    heads = {"num_heads": 4, "num_kv_heads": 1, "dtype": "bfloat16", "block_size": 16}
    spec = ad.AttentionSpec(**heads, head_size=head_size, value_head_size=value_size)  # type: ignore[arg-type]
    case = Case("wide heads", "wide heads", spec, (150, 20, 0), (1, 3, 40))
    assert run_case(backend, case).verdict
    assert check_mutations(backend, case) > 0


@pytest.mark.parametrize(
    ("fields", "largest"),
    [
        ({"dtype": "bfloat16"}, LARGEST_HEAD),
        ({"dtype": "float16", "kv_cache_dtype": "int8"}, LARGEST_HEAD),
        ({"dtype": "float32"}, LARGEST_EXACT_HEAD),
        ({"dtype": "bfloat16", "kv_cache_dtype": "float16"}, LARGEST_EXACT_HEAD),
    ],
)
def test_the_widest_head_depends_on_the_operands(fields: dict[str, str], largest: int) -> None:
    backend = registry().load("triton/paged")
    for size in (largest, largest + 1):
        spec = ad.AttentionSpec(num_heads=4, num_kv_heads=1, head_size=size, **fields)  # type: ignore[arg-type]
        verdict = backend.verdict(spec)
        assert bool(verdict) == (size <= largest)
        if not verdict:
            assert {r.field for r in verdict.refusals} == {"head_size", "value_head_size"}
            assert all(str(largest) in r.accepts for r in verdict.refusals)
