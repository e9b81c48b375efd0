"""A block size that is left to the backend: each is asked for the size that it prefers."""

from __future__ import annotations

from dataclasses import replace

import pytest

import attn_dispatch as ad
from attn_dispatch.backend import Refusal, Verdict
from attn_dispatch.errors import BackendRefusedError, SpecError
from attn_dispatch.reference import ReferenceBackend
from attn_dispatch.variants import BlockSparse, LocalStride

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, dtype="float32", block_size=None)  # type: ignore[arg-type]


class Multiples(ReferenceBackend):
    """The reference with blocks of certain sizes alone."""

    def __init__(self, least: int) -> None:
        super().__init__(f"multiples/{least}")
        self.least = least

    def verdict(self, spec: ad.AttentionSpec) -> Verdict:
        if spec.block_size % self.least:
            return self.refuse(Refusal("block_size", spec.block_size, f"a multiple of {self.least}"))
        return super().verdict(spec)


@pytest.mark.parametrize(("least", "size"), [(1, 32), (16, 32), (64, 64), (256, 256)])
def test_the_backend_chooses(least: int, size: int) -> None:
    attn = ad.attention(SPEC, Multiples(least))
    assert attn.spec.block_size == size
    assert attn.block_sizes[0] == size
    assert all(n % least == 0 for n in attn.block_sizes)
    assert attn.allocate(2).geometry.block_size == size
    assert ad.explain(SPEC, Multiples(least)).chosen == f"multiples/{least}"


def test_a_size_that_was_given_stays() -> None:
    with pytest.raises(BackendRefusedError, match="block_size=32: a multiple of 64"):
        ad.attention(replace(SPEC, block_size=32), Multiples(64))
    assert ad.attention(replace(SPEC, block_size=16), "reference").spec.block_size == 16


def test_nobody_accepts_any() -> None:
    with pytest.raises(BackendRefusedError, match="a multiple of 1000"):
        ad.attention(SPEC, Multiples(1000))


def test_layers_that_share_a_pool_of_blocks() -> None:
    layers = [(Multiples(64), SPEC), (Multiples(16), replace(SPEC, window=(63, 0)))]
    assert ad.common_block_size(layers) == 64
    assert ad.common_block_size([*layers, (Multiples(1000), SPEC)]) is None


def test_a_size_is_needed_where_blocks_are() -> None:
    with pytest.raises(SpecError, match="block_size=None"):
        _ = SPEC.geometry
    with pytest.raises(SpecError, match="block_size=None"):
        BlockSparse(SPEC, LocalStride(1, 2))
    assert "block_size=None" in str(SPEC)
