"""What only an AMD GPU can show beside the kit: runs that wait for nothing, swaps, devices, a shared cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.backend import Backend
from attn_dispatch.dispatch import registry, verdict_of

NAMES = ("rocm/aiter", "rocm/flash-attention")


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    if not (torch.cuda.is_available() and torch.version.hip):
        pytest.skip("not run: needs amd")
    found = registry().load(request.param)
    available = found.probe()
    if not available:
        pytest.skip(f"not run: {available.reason}")
    return found


def plain(backend: Backend, **fields: Any) -> ad.AttentionSpec:
    for size in (64, 128, 16):
        spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=128, block_size=size, **fields)
        if verdict_of(backend, spec):
            return spec
    return pytest.skip(f"refused: {verdict_of(backend, spec)}")


def rows(tokens: int, device: str = "cuda") -> list[torch.Tensor]:
    return [torch.randn(tokens, n, 128, dtype=torch.bfloat16, device=device) for n in (8, 2, 2)]


def batch(spec: ad.AttentionSpec, lens: list[int]) -> ad.AttentionMetadata:
    """Decodes of these lengths after the step; 0 is padding."""
    pages = -(-600 // spec.block_size)
    tables = [list(range(s * pages, s * pages + -(-n // spec.block_size))) for s, n in enumerate(lens)]
    slots = [
        -1 if not n else table[(n - 1) // spec.block_size] * spec.block_size + (n - 1) % spec.block_size
        for n, table in zip(lens, tables, strict=True)
    ]
    return ad.AttentionMetadata.build([1] * len(lens), lens, tables, spec.block_size, slot_mapping=slots)


@pytest.mark.parametrize("sinks", [False, True])
def test_run_waits_for_nothing(backend: Backend, sinks: bool) -> None:
    spec = plain(backend, sinks=sinks)
    attn = ad.attention(spec, backend, **({"sinks": np.zeros(8, np.float32)} if sinks else {}))
    cache = attn.allocate(4 * -(-600 // spec.block_size))
    plan, inputs = attn.plan(batch(spec, [300, 0, 511, 1])), rows(4)
    attn.run(plan, *inputs, cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attn.run(plan, *inputs, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_blocks_are_swapped_to_pinned_memory_and_back(backend: Backend) -> None:
    attn = ad.attention(plain(backend), backend)
    cache, host = attn.allocate(16), attn.allocate(16, "cpu")
    assert host.key.is_pinned()
    cache.key.normal_()
    before = cache.key.clone()
    cache.swap_blocks(host, [(i, 15 - i) for i in range(16)])
    cache.key.zero_()
    host.swap_blocks(cache, [(15 - i, i) for i in range(16)])
    torch.cuda.synchronize()
    assert torch.equal(cache.key, before)


def test_the_device_is_that_of_the_tensors(backend: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("not run: needs two GPUs")
    spec = plain(backend)
    attn = ad.attention(spec, backend)
    inputs = rows(2)
    results = []
    for device in ("cuda:0", "cuda:1"):
        cache = attn.allocate(2 * -(-600 // spec.block_size), device)
        results.append(attn.run(attn.plan(batch(spec, [300, 17])), *(x.to(device) for x in inputs), cache).cpu())
    torch.testing.assert_close(*results)


def test_decodes_and_prefills_of_two_backends_share_a_cache(backend: Backend) -> None:
    """Of an equal layout: what one wrote the other reads."""
    other = registry().load(next(name for name in NAMES if name != backend.name))
    spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=128, block_size=128)
    if not (other.probe() and verdict_of(other, spec) and verdict_of(backend, spec)):
        pytest.skip("not run: needs both backends, with pages of 128")
    one, two = ad.attention(spec, backend), ad.attention(spec, other)
    cache = one.allocate(20)
    prompt = ad.AttentionMetadata.build([300], [300], [[3, 5, 7]], 128)
    one.run(one.plan(prompt), *rows(300), cache)
    step = ad.AttentionMetadata.build([1], [301], [[3, 5, 7]], 128)
    inputs = rows(1)
    torch.testing.assert_close(
        one.run(one.plan(step), *inputs, cache), two.run(two.plan(step), *inputs, cache), atol=2e-2, rtol=2e-2
    )
