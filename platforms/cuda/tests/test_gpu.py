"""What only a GPU can show beside the kit: replayed graphs, runs that wait for nothing, swaps, other devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.backend import Backend
from attn_dispatch.dispatch import registry, verdict_of

NAMES = ("cuda/flash-attention", "cuda/flashinfer", "cuda/xformers")


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    if not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia")
    found = registry().load(request.param)
    available = found.probe()
    if not available:
        pytest.skip(f"not run: {available.reason}")
    return found


def plain(backend: Backend, **fields: Any) -> ad.AttentionSpec:
    for size in (64, 256, 16):
        spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=128, block_size=size, **fields)
        if verdict_of(backend, spec):
            return spec
    return pytest.skip(f"refused: {verdict_of(backend, spec)}")


def rows(spec: ad.AttentionSpec, tokens: int, device: str = "cuda") -> list[torch.Tensor]:
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return [torch.randn(tokens, n, spec.head_size, dtype=torch.bfloat16, device=device) for n in heads]


def batch(spec: ad.AttentionSpec, lens: list[int]) -> ad.AttentionMetadata:
    """Decodes of these lengths after the step; 0 is padding."""
    pages = -(-600 // spec.block_size)
    tables = [list(range(s * pages, s * pages + -(-n // spec.block_size))) for s, n in enumerate(lens)]
    slots = [
        -1 if not n else table[(n - 1) // spec.block_size] * spec.block_size + (n - 1) % spec.block_size
        for n, table in zip(lens, tables, strict=True)
    ]
    return ad.AttentionMetadata.build([1] * len(lens), lens, tables, spec.block_size, slot_mapping=slots)


def test_a_graph_is_replayed_with_new_metadata(backend: Backend) -> None:
    if not backend.capabilities.fixed_plans:
        pytest.skip("refused: xFormers' masks keep lengths on the host")
    spec = plain(backend)
    attn = ad.attention(spec, backend)
    steps = [[300, 17, 511, 1], [301, 18, 512, 2], [302, 0, 513, 0], [0, 0, 0, 0], [599, 19, 1, 3]]
    caches = [attn.allocate(4 * -(-600 // spec.block_size)) for _ in range(2)]
    caches[0].key.normal_()
    caches[0].value.normal_()
    for name in ("key", "value"):
        caches[1].arrays[name].copy_(caches[0].arrays[name])
    inputs = rows(spec, 4)
    plan = backend.fixed_plan(spec, batch(spec, steps[0]), 600)
    out = torch.empty_like(inputs[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what a vendor allocates and compiles, before the capture
            attn.run(plan, *inputs, caches[0], out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attn.run(plan, *inputs, caches[0], out)
    for lens in steps:
        metadata = batch(spec, lens)
        for tensor in inputs:
            tensor.normal_()
        plan.renew(metadata)
        graph.replay()
        expected = attn.run(attn.plan(metadata), *inputs, caches[1])
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
        assert torch.equal(caches[0].key, caches[1].key)
        assert torch.equal(caches[0].value, caches[1].value)


def test_run_waits_for_nothing(backend: Backend) -> None:
    spec = plain(backend, sinks=True)
    attn = ad.attention(spec, backend, sinks=np.zeros(8, np.float32))
    cache = attn.allocate(4 * -(-600 // spec.block_size))
    plan, inputs = attn.plan(batch(spec, [300, 0, 511, 1])), rows(spec, 4)
    attn.run(plan, *inputs, cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attn.run(plan, *inputs, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_blocks_are_swapped_to_pinned_memory_and_back(backend: Backend) -> None:
    spec = plain(backend)
    attn = ad.attention(spec, backend)
    cache, host = attn.allocate(16), attn.allocate(16, "cpu")
    assert host.key.is_pinned()
    cache.key.normal_()
    cache.value.normal_()
    before = cache.key.clone(), cache.value.clone()
    cache.swap_blocks(host, [(i, 15 - i) for i in range(16)])
    cache.key.zero_()
    cache.value.zero_()
    host.swap_blocks(cache, [(15 - i, i) for i in range(16)])
    torch.cuda.synchronize()
    assert torch.equal(cache.key, before[0])
    assert torch.equal(cache.value, before[1])


def test_the_device_is_that_of_the_tensors(backend: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("not run: needs two GPUs")
    spec = plain(backend)
    attn = ad.attention(spec, backend)
    metadata = batch(spec, [300, 17])
    torch.manual_seed(0)
    inputs = rows(spec, 2)
    results = []
    for device in ("cuda:0", "cuda:1"):
        cache = attn.allocate(2 * -(-600 // spec.block_size), device)
        results.append(attn.run(attn.plan(metadata), *(x.to(device) for x in inputs), cache).cpu())
    torch.testing.assert_close(*results)


def captured(attn: Any, plan: Any, inputs: list[torch.Tensor], cache: Any, out: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph of a layer, after what a vendor allocates and compiles was done."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attn.run(plan, *inputs, cache, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attn.run(plan, *inputs, cache, out)
    return graph


def test_a_host_that_is_steps_ahead_of_the_gpu(backend: Backend) -> None:
    """Nothing is waited for between steps: each replay must still see the plan of its own step."""
    if not backend.capabilities.fixed_plans:
        pytest.skip("refused: xFormers' masks keep lengths on the host")
    spec = plain(backend)
    attn = ad.attention(spec, backend)
    pages = 4 * -(-600 // spec.block_size)
    cache, other = attn.allocate(pages), attn.allocate(pages)
    cache.key.normal_()
    cache.value.normal_()
    other.key.copy_(cache.key)
    other.value.copy_(cache.value)
    steps = [[300 + i, 17 + 40 * i, 511 - 60 * i, 1 + 70 * i] for i in range(8)]
    inputs, out = rows(spec, 4), torch.empty(4, 8, 128, dtype=torch.bfloat16, device="cuda")
    plan = backend.fixed_plan(spec, batch(spec, steps[0]), 600)
    graph = captured(attn, plan, inputs, cache, out)
    results = []
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second, in which the host does all that follows
    for lens in steps:
        plan.renew(batch(spec, lens))
        graph.replay()
        results.append(out.clone())
    for lens, found in zip(steps, results, strict=True):
        expected = attn.run(attn.plan(batch(spec, lens)), *inputs, other)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_two_streams_compute_side_by_side(backend: Backend) -> None:
    """Long contexts, whose keys are split: partial results of one stream must not lie where the other's do."""
    spec = plain(backend)
    attn = ad.attention(spec, backend)
    pages = 4 * -(-600 // spec.block_size)
    jobs = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        cache, inputs = attn.allocate(pages), rows(spec, 4)
        cache.key.normal_()
        cache.value.normal_()
        jobs.append((stream, cache, inputs, attn.run(attn.plan(batch(spec, [600] * 4)), *inputs, cache)))
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream, cache, inputs, _ in jobs:
            with torch.cuda.stream(stream):
                found.append(attn.run(attn.plan(batch(spec, [600] * 4)), *inputs, cache))
        torch.cuda.synchronize()
        for mine, (*_, expected) in zip(found, jobs, strict=True):
            assert torch.equal(mine, expected)
