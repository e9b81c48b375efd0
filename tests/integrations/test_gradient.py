"""A gradient that attention over a cache does not have: inference works in grad mode, asking for a gradient raises."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.errors import ArrayError, GradientError  # noqa: E402

BACKENDS = [name for name, available in ad.backends().items() if available]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_no_gradient_vanishes(backend: str, which: str, return_lse: bool) -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=32, dtype="float32", block_size=32, returns_lse=return_lse)
    if not ad.explain(spec, backend).chosen:
        pytest.skip(str(ad.explain(spec, backend).verdicts[0]))
    attn = ad.attention(spec, backend)
    plan = attn.plan(ad.AttentionMetadata.build([3], [3], [[1]], 32))
    arrays = {name: torch.randn(3, 2, 32) for name in "qkv"}
    arrays[which] = torch.nn.Linear(32, 32)(arrays[which])  # grad mode, as in most snippets
    cache = attn.allocate(2)
    result = attn.run(plan, *arrays.values(), cache, return_lse=return_lse)
    results = result if return_lse else (result,)
    with torch.no_grad():
        plain = attn.run(plan, *arrays.values(), cache, return_lse=return_lse)
    for one, other in zip(results, plain if return_lse else (plain,), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
        with pytest.raises(GradientError, match="no gradient"):
            one.sum().backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith("tpu")])
def test_views_and_devices(backend: str) -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=32, dtype="float32", block_size=32)
    attn = ad.attention(spec, backend)
    plan = attn.plan(ad.AttentionMetadata.build([3], [3], [[1]], 32))
    q, k, v = (torch.randn(3, 2, 32) for _ in range(3))
    cache = attn.allocate(2)
    with pytest.raises(ArrayError, match="v is a lazily negated"):
        attn.run(plan, q, k, torch._neg_view(v), cache)
    with pytest.raises(ArrayError, match="out on meta"):
        attn.run(plan, q, k, v, cache, torch.empty(3, 2, 32, device="meta"))
    with pytest.raises(ArrayError, match="out and q overlap"):
        attn.run(plan, q, k, v, cache, q)
    with pytest.raises(ArrayError, match="overlaps itself"):
        attn.run(plan, q, k, v, cache, torch.empty(1, 2, 32).expand(3, 2, 32))
