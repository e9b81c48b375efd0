"""FlashAttention's two call shapes, as nano-vllm and most small engines make them, against attention written out."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.errors import ArrayError, MetadataError, NoBackendError  # noqa: E402
from attn_dispatch.integrations.flash_attn import (  # noqa: E402
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    layer_of,
)

H, K, D, B = 4, 2, 32, 16
STRIDED = [
    name
    for name, state in ad.backends().items()
    if state and name not in ("reference",) and ad.dispatch.registry().load(name).capabilities.cache_views == "strided"
]


def written_out(q, k, v, *, causal=True, window=(-1, -1), cap=0.0, slopes=None):  # type: ignore[no-untyped-def]
    """One sequence: q [n, H, D] over k [m, K, D]; (out, lse), float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    ahead = torch.arange(len(k)) - at
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * ahead.abs()
    right = 0 if causal else window[1]
    hidden = (ahead > right) & (right >= 0) | (ahead < -window[0]) & (window[0] >= 0)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, 2)
    return torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), v), lse.T


@pytest.fixture
def cache():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return [torch.randn(12, B, K, D) for _ in range(2)]


TABLE, LENS = [[3, 7, 1], [5, 0, 0], [9, 2, 4]], [40, 9, 33]


def keys_of(cache, s, length=None):  # type: ignore[no-untyped-def]
    return (x[TABLE[s]].flatten(0, 1)[: length or LENS[s]] for x in cache)


FEATURES = [{}, {"window_size": (7, 0)}, {"softcap": 2.0}, {"alibi_slopes": True}]


@pytest.mark.parametrize("backend", [None, *STRIDED])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_prefill_with_a_cached_prefix(backend, features, cache) -> None:  # type: ignore[no-untyped-def]
    layer_of.__globals__["_layer"].cache_clear()
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if features.get("alibi_slopes") else None
    new = [5, 9, 1]
    starts = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (new, LENS)]
    q = torch.randn(15, H, D)

    def call():  # type: ignore[no-untyped-def]
        return flash_attn_varlen_func(
            q, *cache, max_seqlen_q=9, cu_seqlens_q=starts[0], max_seqlen_k=40, cu_seqlens_k=starts[1], causal=True,
            block_table=torch.tensor(TABLE, dtype=torch.int32), **(features | {"alibi_slopes": slopes}),
        )  # fmt: skip

    if backend is None:
        out = call()
    else:
        with ad.use_backend(backend):
            out = call()
    for s, (a, b) in enumerate(zip(starts[0][:-1], starts[0][1:], strict=True)):
        expected, _ = written_out(
            q[a:b], *keys_of(cache, s), window=features.get("window_size", (-1, -1)), cap=features.get("softcap", 0),
            slopes=slopes,
        )  # fmt: skip
        torch.testing.assert_close(out[a:b].double(), expected, rtol=1e-5, atol=1e-5)


def test_prefill_without_a_cache() -> None:
    q, k, v = torch.randn(12, H, D), torch.randn(12, K, D), torch.randn(12, K, D)
    start = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, start, start, 7, 7, softmax_scale=D**-0.5, causal=True)
    for a, b in ((0, 5), (5, 12)):
        torch.testing.assert_close(out[a:b].double(), written_out(q[a:b], k[a:b], v[a:b])[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ArrayError, match="need a block_table"):
        flash_attn_varlen_func(q, k, v, start, torch.tensor([0, 6, 12], dtype=torch.int32), 7, 7)


def test_decode_of_what_was_written_before(cache) -> None:  # type: ignore[no-untyped-def]
    q = torch.randn(3, H, D)
    lens, table = torch.tensor(LENS, dtype=torch.int32), torch.tensor(TABLE, dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q.unsqueeze(1), *cache, cache_seqlens=lens, block_table=table, softmax_scale=D**-0.5, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    assert (out.shape, lse.shape) == ((3, 1, H, D), (3, H, 1))
    for s in range(3):
        expected, sums = written_out(q[s : s + 1], *keys_of(cache, s))
        torch.testing.assert_close(out[s].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[s].T.double(), sums, rtol=1e-5, atol=1e-5)
    # The next step fills the same tensors: the plan is not the old one.
    lens += 1
    again = flash_attn_with_kvcache(q.unsqueeze(1), *cache, cache_seqlens=lens, block_table=table, causal=True)
    expected, _ = written_out(q[:1], *keys_of(cache, 0, 41))
    torch.testing.assert_close(again[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_new_tokens_are_written_into_the_engines_memory(cache) -> None:  # type: ignore[no-untyped-def]
    q, k, v = torch.randn(3, 2, H, D), torch.randn(3, 2, K, D), torch.randn(3, 2, K, D)
    lens, table = torch.tensor(LENS, dtype=torch.int32), torch.tensor(TABLE, dtype=torch.int32)
    before = [x.clone() for x in cache]
    out = flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=lens, block_table=table, causal=True)
    for s in range(3):
        for x, new in zip(cache, (k, v), strict=True):
            assert torch.equal(x[TABLE[s]].flatten(0, 1)[LENS[s] : LENS[s] + 2], new[s])
        expected, _ = written_out(q[s], *keys_of(cache, s, LENS[s] + 2))
        torch.testing.assert_close(out[s].double(), expected, rtol=1e-5, atol=1e-5)
    assert sum(int((a != b).any(-1).sum()) for a, b in zip(before, cache, strict=True)) == 2 * 3 * 2 * K


def test_what_is_not_computed_is_refused(cache) -> None:  # type: ignore[no-untyped-def]
    q = torch.randn(1, 1, H, D)
    lens, table = torch.tensor([9], dtype=torch.int32), torch.tensor([[5]], dtype=torch.int32)
    for unsupported in ({"rotary_cos": torch.ones(1)}, {"cache_leftpad": lens}, {"cache_batch_idx": lens}):
        with pytest.raises(ArrayError, match="not computed here"):
            flash_attn_with_kvcache(q, *cache, cache_seqlens=lens, block_table=table, **unsupported)
    with pytest.raises(ArrayError, match="dropout_p"):
        flash_attn_varlen_func(q[0], q[0], q[0], lens, lens, 1, 1, dropout_p=0.1)
    with pytest.raises(ArrayError, match="must be given"):
        flash_attn_with_kvcache(q, *cache, cache_seqlens=lens)
    with pytest.raises(MetadataError, match="sequence 0"):
        flash_attn_with_kvcache(q, *cache, cache_seqlens=lens + 90, block_table=table)
    layer_of.__globals__["_layer"].cache_clear()
    if any(name == "torch/sdpa" for name in ad.backends()):
        with ad.use_backend("torch/sdpa"), pytest.raises(NoBackendError, match="another order"):
            flash_attn_with_kvcache(q, *cache, cache_seqlens=lens, block_table=table)
    layer_of.__globals__["_layer"].cache_clear()
