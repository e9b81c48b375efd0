"""What only a GPU can show beside the kit: a replayed graph, and runs that wait for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.dispatch import registry
from attn_dispatch_triton.paged import PagedBackend, interpreted

SPEC = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=128, dtype="bfloat16", block_size=16)
MOST, PAGES = 640, 40


@pytest.fixture
def attn() -> Any:
    if interpreted() or not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia or amd")
    found = registry().load("triton/paged")
    if not (available := found.probe()):
        pytest.skip(f"not run: {available.reason}")
    return ad.attention(SPEC, found)


def batch(lens: list[int]) -> ad.AttentionMetadata:
    """Decodes of these lengths after the step; 0 is padding."""
    tables = [list(range(s * PAGES, s * PAGES + -(-n // 16))) for s, n in enumerate(lens)]
    slots = [table[-1] * 16 + (n - 1) % 16 if n else -1 for n, table in zip(lens, tables, strict=True)]
    return ad.AttentionMetadata.build([1] * len(lens), lens, tables, 16, slot_mapping=slots)


def test_a_graph_is_replayed_with_new_metadata(attn: Any) -> None:
    assert isinstance(attn.backend, PagedBackend)
    steps = [[300, 17, 511, 1], [301, 18, 512, 2], [302, 0, 513, 0], [0, 0, 0, 0], [599, 19, 1, 3]]
    caches = [attn.allocate(4 * PAGES) for _ in range(2)]
    for name in ("key", "value"):
        caches[0].arrays[name].normal_()
        caches[1].arrays[name].copy_(caches[0].arrays[name])
    inputs = [torch.randn(4, n, 128, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2)]
    plan = attn.backend.fixed_plan(SPEC, batch(steps[0]), MOST)
    out = torch.empty_like(inputs[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attn.run(plan, *inputs, caches[0], out)  # Triton compiles before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attn.run(plan, *inputs, caches[0], out)
    for lens in steps:
        for tensor in inputs:
            tensor.normal_()
        plan.renew(batch(lens))
        graph.replay()
        expected = attn.run(attn.plan(batch(lens)), *inputs, caches[1])
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)
        for name in ("key", "value"):
            assert torch.equal(caches[0].arrays[name], caches[1].arrays[name])


def test_run_waits_for_nothing(attn: Any) -> None:
    cache = attn.allocate(4 * PAGES)
    plan = attn.plan(batch([300, 0, 511, 1]))
    inputs = [torch.randn(4, n, 128, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2)]
    attn.run(plan, *inputs, cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attn.run(plan, *inputs, cache)
        attn.plan(batch([301, 0, 512, 2]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
