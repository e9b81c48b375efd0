"""The kit over everything but the vendors' calls: batches cut, brought over and written by this package's own code.

The call in the middle is attention in plain PyTorch, on the CPU, by the step's own tensors: it stands for no vendor and
is no evidence of one. What it shows is that what surrounds a call is right: writes, padding, sinks, outputs, renewing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.conformance import BackendConformance
from attn_dispatch.contract import HND, NHD, AttentionSpec, CacheLayout
from attn_dispatch_cuda.layer import Owned
from attn_dispatch_cuda.paged import PagedCudaBackend
from attn_dispatch_cuda.plans import CudaPlan
from attn_dispatch_cuda.step import Step
from attn_dispatch_cuda.store import Store


class Plain(PagedCudaBackend):
    """Attention in float32, one sequence after the other, over block tables on the CPU."""

    order: CacheLayout = NHD

    @property
    def device_type(self) -> str:
        return "cpu"

    def default_device(self) -> torch.device:
        return torch.device("cpu")

    def probe(self) -> Availability:
        return Availability(True, "PyTorch on the CPU, in this test", evidence="simulated on CPU")

    def verdict(self, spec: AttentionSpec) -> Verdict:
        if spec.kv_cache_dtype in ("uint8", "uint4", "int8", "float64") or spec.dtype == "float64" or spec.alibi:
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, "this test's types"))
        return self.accept()

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        return self.order

    def step(self, spec: Any, plan: CudaPlan, device: Any, *, paged: bool, capacity: int | None) -> Step:
        return Step(spec, plan.view, device, paged=paged, capacity=capacity)

    def attend(
        self, step: Any, q: Any, k: Any, v: Any, store: Store | None, owned: Owned, out: Any, *, wants_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spec: AttentionSpec = step.spec
        result = torch.full((len(q), spec.num_heads, spec.value_head_size), torch.nan, dtype=q.dtype)
        lse = torch.full((len(q), spec.num_heads), torch.nan)
        start = step.query_start.tolist()
        for s, length in enumerate(step.lens.tolist()):
            rows = slice(*start[s : s + 2])
            if store is None:
                key, value = k[rows].float(), v[rows].float()
            else:
                key, value = (self._read(x, step.tables[s], length) for x in (store.key, store.value))
                key, value = key * owned.k_scale, value * owned.v_scale
            key, value = (x.repeat_interleave(spec.group_size, 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", q[rows].float(), key) * spec.scale
            if spec.logits_soft_cap is not None:
                scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
            at = torch.arange(len(key)) - (torch.arange(rows.stop - rows.start)[:, None] + len(key))
            ahead = at + (rows.stop - rows.start)
            left, right = spec.window
            hidden = torch.zeros_like(ahead, dtype=torch.bool)
            hidden |= (ahead > 0) & spec.causal
            hidden |= (ahead < -left) & (left >= 0)
            hidden |= (ahead > right) & (right >= 0)
            scores = scores.masked_fill(hidden, -torch.inf)
            lse[rows] = scores.logsumexp(-1).T
            result[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(q.dtype)
        return result, lse if wants_lse else None

    def _read(self, array: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
        tokens = array[table.long()] if self.order == NHD else array[table.long()].transpose(1, 2)
        return tokens.reshape(-1, *tokens.shape[2:])[:length].float()


class PlainHnd(Plain):
    order = HND


class TestNhd(BackendConformance):
    backend = Plain("test/nhd")


class TestHnd(BackendConformance):
    backend = PlainHnd("test/hnd")
    examples = 20


def test_a_fixed_plan_computes_each_batch_that_it_is_renewed_with() -> None:
    """As a replayed graph would: the same tensors every time, with decodes that begin, grow and end."""
    backend = Plain("test/fixed")
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32", returns_lse=True, sinks=True)
    attn = ad.attention(spec, backend, sinks=np.array([0.5, -1.0, 2.0, 0.0]))
    cache, other = attn.allocate(12), attn.allocate(12)

    def batch(lens: list[int]) -> ad.AttentionMetadata:
        tables = [[3 * s + i for i in range(-(-n // 32))] for s, n in enumerate(lens)]
        slots = [-1 if not n else t[(n - 1) // 32] * 32 + (n - 1) % 32 for n, t in zip(lens, tables, strict=True)]
        return ad.AttentionMetadata.build([1] * len(lens), lens, tables, slot_mapping=slots)

    plan = backend.fixed_plan(spec, batch([40, 1, 64, 7]), 96)
    for lens in ([40, 1, 64, 7], [41, 2, 65, 8], [42, 0, 66, 0], [0, 0, 0, 0], [96, 3, 1, 33]):
        metadata = batch(lens)
        inputs = [torch.randn(4, n, 64) for n in (4, 2, 2)]
        plan.renew(metadata)
        out, lse = attn.run(plan, *inputs, cache, return_lse=True)
        expected, expected_lse = attn.run(attn.plan(metadata), *inputs, other, return_lse=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        assert torch.equal(cache.key, other.key)
        assert torch.equal(cache.value, other.value)


def test_an_output_that_is_given_is_the_one_returned() -> None:
    backend = Plain("test/out")
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
    attn = ad.attention(spec, backend)
    plan = attn.plan(ad.AttentionMetadata.build([1, 9], [40, 9], [[1, 0], [2]]))
    inputs = [torch.randn(10, n, 64) for n in (4, 2, 2)]
    expected = attn.run(plan, *inputs, attn.allocate(3))
    for given in (torch.empty(10, 4, 64), torch.empty(4, 10, 64).transpose(0, 1)):
        assert attn.run(plan, *inputs, attn.allocate(3), given) is given
        assert torch.equal(given, expected)


def test_arrays_elsewhere_are_refused_before_anything_is_written() -> None:
    backend = Plain("test/where")
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
    attn = ad.attention(spec, backend)
    cache, plan = attn.allocate(1), attn.plan(ad.AttentionMetadata.build([1], [1], [[0]]))
    inputs = [torch.randn(1, n, 64) for n in (4, 2, 2)]
    with pytest.raises(ValueError, match="meta"):
        attn.run(plan, inputs[0], inputs[1], inputs[2].to("meta"), cache)
    with pytest.raises(ValueError, match="meta"):
        attn.run(plan, inputs[0].to("meta"), inputs[1], inputs[2], cache)
    assert not cache.key.any()
