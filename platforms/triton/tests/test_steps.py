"""Steps on a device: one copy for a plan, nothing waited for in `run`, and plans whose buffers stay for graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attn_dispatch as ad
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import PlanError
from attn_dispatch_triton import paged_call
from attn_dispatch_triton.paged import PagedBackend, interpreted

MOST = 192
SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, dtype="float32", block_size=16, returns_lse=True)
PAGES = MOST // SPEC.block_size


@pytest.fixture
def backend() -> PagedBackend:
    found = registry().load("triton/paged")
    assert isinstance(found, PagedBackend)
    if not (available := found.probe()):
        pytest.skip(f"not run: {available.reason}")
    return found


def device() -> str:
    return "cpu" if interpreted() else "cuda"


def batch(query_lens: list[int], lens: list[int]) -> ad.AttentionMetadata:
    """A step after which sequences have these lengths; 0 is padding."""
    block = SPEC.block_size
    tables = [list(range(s * PAGES, s * PAGES + -(-n // block))) for s, n in enumerate(lens)]
    slots: list[int] = []
    for query_len, length, table in zip(query_lens, lens, tables, strict=True):
        places = range(length - query_len, length)
        slots += [table[at // block] * block + at % block if length else -1 for at in places]
    return ad.AttentionMetadata.build(query_lens, lens, tables, block, slot_mapping=slots)


def rows(tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (SPEC.num_heads, SPEC.num_kv_heads, SPEC.num_kv_heads)
    return [torch.randn(tokens, n, SPEC.head_size, generator=generator).to(device()) for n in heads]


@pytest.mark.parametrize(
    ("query_lens", "steps"),
    [
        ([1, 1, 1], [[170, 17, 1], [71, 18, 2], [72, 0, 3], [0, 0, 0], [MOST, 1, 64]]),
        ([3, 12], [[3, 40], [90, 0], [0, MOST], [16, 12]]),
    ],
    ids=["decodes", "drafts and a prefill"],
)
def test_a_fixed_plan_is_renewed(backend: PagedBackend, query_lens: list[int], steps: list[list[int]]) -> None:
    attn = ad.attention(SPEC, backend)
    caches = [attn.allocate(len(query_lens) * PAGES) for _ in range(2)]
    torch.manual_seed(0)
    for name in ("key", "value"):
        caches[0].arrays[name].normal_()
        caches[1].arrays[name].copy_(caches[0].arrays[name])
    fixed = backend.fixed_plan(SPEC, batch(query_lens, steps[0]), MOST)
    (on_device,) = fixed.batches.values()
    read = [*on_device.sequences, on_device.slots]
    addresses = [x.data_ptr() for x in read if x is not None]
    assert len(addresses) == 5
    for number, lens in enumerate(steps):
        metadata = batch(query_lens, lens)
        inputs = rows(sum(query_lens), number)
        fixed.renew(metadata)
        found = attn.run(fixed, *inputs, caches[0], return_lse=True)
        expected = attn.run(attn.plan(metadata), *inputs, caches[1], return_lse=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        for name in ("key", "value"):
            assert torch.equal(caches[0].arrays[name], caches[1].arrays[name])
        assert list(fixed.batches.values()) == [on_device]
        assert [x.data_ptr() for x in read if x is not None] == addresses
        assert fixed.highest_block == metadata.view("decoder").side.highest_block


def test_a_batch_that_does_not_fit_changes_nothing(backend: PagedBackend) -> None:
    fixed = backend.fixed_plan(SPEC, batch([1, 1], [5, 9]), 64)
    (on_device,) = fixed.batches.values()
    before = {name: tensor.clone() for name, tensor in on_device.tensors.items()}
    for query_lens, lens in (([1, 2], [5, 9]), ([1], [5]), ([2, 0], [5, 9])):
        with pytest.raises(PlanError, match="keeps its shape"):
            fixed.renew(batch(query_lens, lens))
    with pytest.raises(PlanError, match="room for 64"):
        fixed.renew(batch([1, 1], [5, 65]))
    with pytest.raises(PlanError, match="block_size=32"):
        fixed.renew(ad.AttentionMetadata.build([1, 1], [5, 9], [[0], [1]], 32))
    with pytest.raises(PlanError, match="for one batch"):
        backend.plan(SPEC, batch([1, 1], [5, 9])).renew(batch([1, 1], [6, 10]))
    with pytest.raises(PlanError, match="room for 64"):
        backend.fixed_plan(SPEC, batch([1], [65]), 64)
    encoder = ad.AttentionSpec(num_heads=4, num_kv_heads=2, block_size=16, kind="encoder", causal=False)
    alone = ad.AttentionMetadata.build([4], [4], None, 16, encoder_query_lens=[4], encoder_seq_lens=[4])
    with pytest.raises(PlanError, match="layers with a cache"):
        backend.fixed_plan(encoder, alone, 64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in on_device.tensors.items())


class Recorded(TorchDispatchMode):
    """Names of the operations that torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_plan_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted():
        pytest.skip("not run: a GPU's own copies are counted by its profiler")
    empty = torch.empty
    # A device that is none: memory for it cannot be pinned.
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    view = batch([1, 1, 30], [70, 17, 64]).view("decoder")
    with Recorded() as seen:
        on_device = paged_call.PagedBatch(DevicePlan(spec=SPEC, view=view), torch.device("meta"), paged=True)
    assert len(on_device.launches) == 2
    assert on_device.sequences[3].is_meta
    assert seen.names.count("_to_copy") + seen.names.count("copy_") == 1


def test_run_waits_for_nothing(backend: PagedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ad.AttentionSpec(
        num_heads=4, num_kv_heads=2, head_size=16, dtype="float32", kv_cache_dtype="int8", block_size=16, sinks=True
    )
    attn = ad.attention(spec, backend, sinks=np.zeros(4, np.float32), k_scale=0.1, v_scale=0.2)
    cache, plan, inputs = attn.allocate(3 * PAGES), attn.plan(batch([1, 1, 30], [170, 17, 64])), rows(32, 0)
    attn.run(plan, *inputs, cache)  # what a layer owns has been brought to the device
    launched: list[str] = []

    class Launcher:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **__: launched.append(self.name)

    names = paged_call.kernels.__all__
    monkeypatch.setattr(paged_call, "kernels", SimpleNamespace(**{name: Launcher(name) for name in names}))
    with Recorded() as seen:
        attn.run(plan, *inputs, cache)
    assert launched == ["write", "write", "decode", "merge", "prefill"]
    # Of what is left: memory, views, and the rounding of new keys and values to int8.
    wait = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "copy_"}
    assert not wait & set(seen.names), seen.names
    assert seen.names.count("_to_copy") == 2, "to int8, on the device, keys and values"
    assert len(seen.names) < 30, seen.names


def test_a_plan_is_renewed_wherever_it_is(backend: PagedBackend) -> None:
    fixed = backend.fixed_plan(SPEC, batch([1], [5]), 64)
    assert fixed.max_seq_len == 64
    attn, inputs = ad.attention(SPEC, backend), rows(1, 0)
    fixed.batches.clear()  # as on a device that it was not made for
    fixed.renew(batch([1], [7]))
    caches = [attn.allocate(PAGES) for _ in range(2)]
    found = attn.run(fixed, *inputs, caches[0])
    assert fixed.batches
    torch.testing.assert_close(found, attn.run(attn.plan(batch([1], [7])), *inputs, caches[1]))


@pytest.mark.parametrize("default", ["meta", torch.float64], ids=str)
def test_torchs_defaults_change_nothing(backend: PagedBackend, default: Any) -> None:
    """With `torch.set_default_device` host buffers are still host memory, and what is made lies beside the queries."""
    attn, inputs, metadata = ad.attention(SPEC, backend), rows(4, 0), batch([3, 1], [20, 9])
    caches = [attn.allocate(2 * PAGES, device()) for _ in range(2)]
    expected = attn.run(attn.plan(metadata), *inputs, caches[0], return_lse=True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_device(default) if isinstance(default, str) else torch.set_default_dtype(default)
        fixed = backend.fixed_plan(SPEC, metadata, 64)
        fixed.renew(metadata)
        for plan in (attn.plan(metadata), fixed):
            out, lse = attn.run(plan, *inputs, caches[1], return_lse=True)
            assert out.device == lse.device == inputs[0].device
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
