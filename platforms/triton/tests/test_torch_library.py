"""Layers on `triton/paged` as operators of torch: compiled models, and graphs that are replayed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.dispatch import registry
from attn_dispatch.integrations import torch_library
from attn_dispatch.integrations.torch_library import Layer, step
from attn_dispatch_triton.paged import PagedBackend, interpreted

H, K, D, B = 4, 2, 16, 16
MOST = 96
PAGES = MOST // B
SPEC = ad.AttentionSpec(num_heads=H, num_kv_heads=K, head_size=D, dtype="float32", block_size=B, returns_lse=True)
DEVICE = "cpu" if interpreted() else "cuda"
STEPS = [[30, 1, 64, 7], [31, 2, 65, 8], [32, 0, 66, 0], [MOST, 3, 1, 33]]


@pytest.fixture
def backend() -> PagedBackend:
    found = registry().load("triton/paged")
    assert isinstance(found, PagedBackend)
    if not (available := found.probe()):
        pytest.skip(f"not run: {available.reason}")
    torch._dynamo.reset()
    torch.manual_seed(0)
    return found


def batch(lens: list[int]) -> ad.AttentionMetadata:
    """Decodes of these lengths after the step; 0 is padding."""
    tables = [list(range(s * PAGES, s * PAGES + -(-n // B))) for s, n in enumerate(lens)]
    slots = [table[-1] * B + (n - 1) % B if n else -1 for n, table in zip(lens, tables, strict=True)]
    return ad.AttentionMetadata.build([1] * len(lens), lens, tables, B, slot_mapping=slots)


class Model:
    """Layers that write one cache, read it, and write it again in the same slots."""

    def __init__(self, backend: PagedBackend) -> None:
        specs = [SPEC, replace(SPEC, writes_kv=False), SPEC]
        self.attentions = [ad.attention(spec, backend) for spec in specs]
        self.cache = self.attentions[0].allocate(4 * PAGES, DEVICE)
        self.layers = [Layer(attention, self.cache) for attention in self.attentions]

    def __call__(self, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        q = torch.tanh(self.layers[0](q, k, v)) + q
        q, lse = self.layers[1](q, return_lse=True)
        return self.layers[2](q * 2, v, k), lse

    def directly(self, now: ad.AttentionMetadata, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        plans = [attention.plan(now) for attention in self.attentions]
        q = torch.tanh(self.attentions[0].run(plans[0], q, k, v, self.cache)) + q
        q, lse = self.attentions[1].run(plans[1], q, None, None, self.cache, return_lse=True)
        return self.attentions[2].run(plans[2], q * 2, v, k, self.cache), lse


def check(found: tuple[Any, Any], model: Model, other: Model, now: ad.AttentionMetadata, arrays: list[Any]) -> None:
    for one, two in zip(found, other.directly(now, *arrays), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    for name in ("key", "value"):
        assert torch.equal(model.cache.arrays[name], other.cache.arrays[name])
    assert model.cache.key.any()


def rows() -> list[Any]:
    return [torch.randn(4, n, D, device=DEVICE) for n in (H, K, K)]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_model(backend: PagedBackend, compiler: str) -> None:
    """With each batch planned by the step, and with plans whose buffers stay."""
    if compiler == "inductor" and interpreted() and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("not run: needs a C++ compiler")
    model, other = Model(backend), Model(backend)
    compiled = torch.compile(model.__call__, fullgraph=True, backend=compiler)
    plans = {each: backend.fixed_plan(each.spec, batch(STEPS[0]), MOST) for each in model.attentions}
    for lens in STEPS:
        arrays, now = rows(), batch(lens)
        with step(now):
            found = compiled(*arrays)
        check(found, model, other, now, arrays)
        for plan in plans.values():
            plan.renew(now)
        with step(plans=plans):
            check(compiled(*arrays), model, other, now, arrays)


@pytest.mark.parametrize("op", ["run", "run_lse", "run_out", "run_lse_out"])
def test_opcheck(backend: PagedBackend, op: str) -> None:
    model = Model(backend)
    out = (torch.zeros(4, H, D, device=DEVICE),) if op.endswith("out") else ()
    with step(batch(STEPS[0])):
        torch.library.opcheck(
            getattr(torch_library, op), (*rows(), model.layers[0].arrays, model.layers[0].handle, D, *out)
        )


def test_a_compiled_model_in_a_graph(backend: PagedBackend) -> None:
    if interpreted() or not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia or amd")
    model, other = Model(backend), Model(backend)
    compiled = torch.compile(model.__call__, fullgraph=True)
    plans = {each: backend.fixed_plan(each.spec, batch(STEPS[0]), MOST) for each in model.attentions}
    arrays = rows()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), step(plans=plans):
        for _ in range(3):  # what is compiled and allocated, before the capture
            compiled(*arrays)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with step(plans=plans), torch.cuda.graph(graph):
        found = compiled(*arrays)
    for lens in STEPS:
        for array in arrays:
            array.normal_()
        for plan in plans.values():
            plan.renew(batch(lens))
        graph.replay()
        check(found, model, other, batch(lens), arrays)
