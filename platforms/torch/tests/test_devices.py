"""Devices: meta tensors through every path, inference mode, threads, and arrays that are not where they should be."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.errors import ArrayError
from attn_dispatch_torch.sdpa import SdpaBackend

SPEC = ad.AttentionSpec(num_heads=6, num_kv_heads=2, head_size=32, dtype="float32")
FEATURES = [{}, {"window": (9, 0)}, {"logits_soft_cap": 2.0}, {"alibi": True}, {"sinks": True}, {"value_head_size": 16}]


def batch(new: list[int], lens: list[int]) -> tuple[ad.AttentionMetadata, int]:
    used, table = 0, []
    for n in lens:
        table.append(list(range(used, used - (-n // 32))))
        used += len(table[-1])
    return ad.AttentionMetadata.build(new, lens, table), used


def inputs(tokens: int, spec: ad.AttentionSpec = SPEC, device: str = "cpu") -> list[torch.Tensor]:
    rows = (
        (spec.num_heads, spec.head_size),
        (spec.num_kv_heads, spec.head_size),
        (spec.num_kv_heads, spec.value_head_size),
    )
    return [torch.randn(tokens, *row, device=device) for row in rows]


@pytest.mark.parametrize("fields", FEATURES, ids=str)
@pytest.mark.parametrize("stored", ["float32", "float8_e4m3fn", "int8"])
def test_another_device_runs_without_reading_back(fields: dict, stored: str) -> None:
    """Meta tensors have no contents: whatever asked for some would raise. So do syncs on a device."""
    spec = ad.AttentionSpec(
        num_heads=6, num_kv_heads=2, head_size=32, dtype="float32", returns_lse=True, kv_cache_dtype=stored, **fields
    )
    own = {"alibi_slopes": np.ones(6)} if spec.alibi else {"sinks": np.ones(6)} if spec.sinks else {}
    attn = ad.attention(spec, "torch/sdpa", **own)
    metadata, blocks = batch([1, 40, 1, 3], [70, 90, 33, 3])
    cache = attn.allocate(blocks, "meta")
    assert cache.device == "meta"
    plan = attn.plan(metadata)
    out, lse = attn.run(plan, *inputs(45, spec, "meta"), cache, return_lse=True)
    assert (out.shape, out.device.type) == ((45, 6, spec.value_head_size), "meta")
    assert (lse.shape, lse.dtype) == ((45, 6), torch.float32)
    assert attn.run(plan, *inputs(45, spec, "meta"), cache).shape == out.shape


@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_an_array_elsewhere_is_refused_before_anything_is_written(which: str) -> None:
    attn = ad.attention(SPEC, "torch/sdpa")
    metadata, blocks = batch([1], [1])
    cache, plan = attn.allocate(blocks), attn.plan(metadata)
    q, k, v = inputs(1)
    arrays = {"q": q, "k": k, "v": v, "out": torch.empty_like(q)}
    arrays[which] = arrays[which].to("meta")
    with pytest.raises(ArrayError, match="meta"):
        attn.run(plan, arrays["q"], arrays["k"], arrays["v"], cache, arrays["out"])
    assert not cache.key.any()


def test_inference_mode_leaves_nothing_behind_that_cannot_be_used_outside() -> None:
    attn = ad.attention(SPEC, SdpaBackend("torch/modes"))
    metadata, blocks = batch([1, 20, 1], [40, 20, 64])
    x = inputs(22)
    with torch.inference_mode():
        cache, plan = attn.allocate(blocks), attn.plan(metadata)
        inside = attn.run(plan, *x, cache)
    outside = attn.run(plan, *x, cache)
    with torch.inference_mode():
        again = attn.run(attn.plan(metadata), *x, cache)
    assert torch.equal(inside, outside)
    assert torch.equal(inside, again)


def test_strided_arrays_are_taken_as_they_are() -> None:
    """Models hand over views of [heads, tokens, size], and of one projection for all three."""
    attn = ad.attention(SPEC, "torch/sdpa")
    metadata, blocks = batch([1, 20, 4], [40, 20, 64])
    x = inputs(25)
    expected = attn.run(attn.plan(metadata), *x, attn.allocate(blocks))
    headwise = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in x]
    columns = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x]
    fused = torch.cat([y.flatten(1) for y in x], 1).split([6 * 32, 2 * 32, 2 * 32], 1)
    for given in (headwise, columns, [y.unflatten(1, (-1, 32)) for y in fused]):
        assert not given[0].is_contiguous()
        torch.testing.assert_close(attn.run(attn.plan(metadata), *given, attn.allocate(blocks)), expected)


def test_two_threads_share_a_plan() -> None:
    """Gathered memory is a thread's own: the same plan over two caches at once."""
    attn = ad.attention(SPEC, "torch/sdpa")
    metadata, blocks = batch([1, 20, 1, 1], [400, 20, 640, 33])
    plan = attn.plan(metadata)
    work = [(inputs(23), attn.allocate(blocks)) for _ in range(2)]
    for _, cache in work:
        cache.key.normal_()
        cache.value.normal_()
    alone = [attn.run(plan, *x, cache) for x, cache in work]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        x, cache = work[i]
        wrong.extend(n for n in range(50) if not torch.equal(attn.run(plan, *x, cache), alone[i]))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_loading_imports_no_torch() -> None:
    code = (
        "import sys; from attn_dispatch_torch.sdpa import SdpaBackend; import attn_dispatch as ad;"
        "b = SdpaBackend('x/y'); assert b.probe(); assert b.verdict(ad.AttentionSpec(num_heads=2));"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
