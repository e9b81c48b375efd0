"""What is torch's own: independent arithmetic, devices, and decode against prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attn_dispatch as ad
from attn_dispatch.conformance import CASES
from attn_dispatch.conformance.problem import make_problem
from attn_dispatch.conformance.tolerance import attend_rounded
from attn_dispatch.contract import LayerParameters
from attn_dispatch.errors import ArrayError, GradientError
from attn_dispatch.reference import attend

SPEC = ad.AttentionSpec(num_heads=6, num_kv_heads=2, head_size=32, dtype="float32")


def run(attn: ad.Attention, new: int, length: int, table: list[int], x: list, cache: ad.KVCache) -> torch.Tensor:
    return attn.run(attn.plan(ad.AttentionMetadata.build([new], [length], [table])), *x, cache)


@pytest.mark.parametrize("window", [(-1, -1), (19, 0)])
@pytest.mark.parametrize("length", [5, 16, 17, 130, 1100])
def test_token_by_token_gives_what_a_prefill_gives(length: int, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    spec = ad.AttentionSpec(num_heads=6, num_kv_heads=2, head_size=32, dtype="float32", window=window)
    x = [torch.randn(length, heads, 32) for heads in (6, 2, 2)]
    blocks = -(-length // 32)
    table = list(range(blocks))[::-1]
    attn = ad.attention(spec, "torch/sdpa")
    whole, parts = attn.allocate(blocks), attn.allocate(blocks)
    expected = run(attn, length, length, table, x, whole)
    at, found = 0, []
    for n in [length // 2, *[1] * min(3, length - length // 2), 10**9]:
        n = min(n, length - at)
        if n > 0:
            found.append(run(attn, n, at + n, table, [y[at : at + n] for y in x], parts))
            at += n
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(whole.key, parts.key)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_what_torch_computes(causal: bool) -> None:
    """The oracle's arithmetic against torch's own, in float64: neither was written after the other."""
    torch.manual_seed(1)
    spec = ad.AttentionSpec(num_heads=6, num_kv_heads=2, head_size=32, dtype="float64", causal=causal)
    q, k, v = torch.randn(9, 6, 32).double(), torch.randn(9, 2, 32).double(), torch.randn(9, 2, 32).double()
    expected = F.scaled_dot_product_attention(
        *(y.transpose(0, 1)[None] for y in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))), is_causal=causal
    )[0].transpose(0, 1)
    found, lse = attend(spec, q.numpy(), k.numpy(), v.numpy(), LayerParameters(spec))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-12)
    scores = torch.einsum("nhd,mhd->nhm", q, k.repeat_interleave(3, 1)) * 32**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool()[:, None], -torch.inf)
    np.testing.assert_allclose(lse, torch.logsumexp(scores, -1).numpy(), atol=1e-12)


def eager(spec: ad.AttentionSpec, q: np.ndarray, key: np.ndarray, value: np.ndarray, layer: LayerParameters) -> tuple:
    """Attention as one writes it in torch, in the spec's own type throughout."""
    dtype = getattr(torch, spec.dtype)
    q, key, value = (torch.from_numpy(np.asarray(x, np.float64)).to(dtype) for x in (q, key, value))
    key, value = (x.repeat_interleave(spec.group_size, 1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", q, key) * spec.scale
    if spec.logits_soft_cap:
        scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
    ahead = torch.arange(len(key))[None] - torch.arange(len(q))[:, None] - (len(key) - len(q))
    if layer.alibi_slopes is not None:
        scores = scores - (torch.tensor(layer.alibi_slopes)[:, None, None] * ahead.abs()).to(dtype)
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if spec.causal:
        hidden |= ahead > 0
    if spec.window[0] >= 0:
        hidden |= ahead < -spec.window[0]
    scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("hnm,mhd->nhd", torch.softmax(scores, -1), value).double().numpy()
    return out, torch.logsumexp(scores.double(), -1).T.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kits_rounded_computation_errs_like_torch(dtype: str) -> None:
    """Clause 11 is about plain PyTorch's error; the kit computes it without torch. The two must be alike."""
    features = {"mixed", "window", "soft-cap", "ALiBi", "prefill"}
    errors = []
    for case in CASES:
        if case.feature not in features or case.spec.dtype != dtype:
            continue
        problem = make_problem(case)
        stored = ([x.astype(np.float64) for x in side] for side in (problem.keys, problem.values))
        reading = problem.reading(*stored)
        # Long sequences are for kernels, and many: what rounding does shows in the short ones.
        sequences = [s for s, n in enumerate(problem.view.query_lens) if n and problem.view.kv_lens[s] <= 1000][:4]
        exact, rounded, torchs = (
            [reading.solve(problem.view, s, function)[0] for s in sequences]
            for function in (attend, attend_rounded, eager)
        )
        for right, ours, theirs in zip(exact, rounded, torchs, strict=True):
            errors.append((np.abs(ours - right).max(), np.abs(theirs - right).max()))
    assert errors
    ours, theirs = (np.mean(side) for side in zip(*errors, strict=True))
    assert 0.4 < ours / theirs < 2.5, (ours, theirs)


def test_another_device_is_a_clear_error_and_nothing_is_written() -> None:
    attn = ad.attention(SPEC, "torch/sdpa")
    cache = attn.allocate(1)
    plan = attn.plan(ad.AttentionMetadata.build([1], [1], [[0]]))
    q, k = torch.zeros(1, 6, 32, device="meta"), torch.ones(1, 2, 32, device="meta")
    with pytest.raises(ArrayError, match="q is on meta, the cache on cpu"):
        attn.run(plan, q, k, k, cache)
    assert not cache.key.any()


def test_a_plan_copies_its_indices_once() -> None:
    attn = ad.attention(SPEC, "torch/sdpa")
    cache = attn.allocate(2)
    plan = attn.plan(ad.AttentionMetadata.build([1], [40], [[0, 1]]))
    x = [torch.randn(1, heads, 32) for heads in (6, 2, 2)]
    attn.run(plan, *x, cache)
    (batch,) = plan.batches.values()
    launch = batch.launch(False)
    attn.run(plan, *x, cache)
    attn.run(plan, *x, cache, return_lse=True)
    assert list(plan.batches.values()) == [batch]
    assert batch.launch(False) is batch.launch(True) is launch


def test_tensors_that_want_a_gradient_are_no_part_of_the_cache() -> None:
    attn = ad.attention(SPEC, "torch/sdpa")
    plan = attn.plan(ad.AttentionMetadata.build([1], [1], [[0]]))
    x = [torch.randn(1, heads, 32, requires_grad=True) for heads in (6, 2, 2)]
    cache = attn.allocate(1)
    out = attn.run(plan, *x, cache)
    assert not cache.key.requires_grad
    with pytest.raises(GradientError, match="no gradient"):
        out.sum().backward()
