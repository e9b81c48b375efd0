"""Layers of this folder's backends as operators of torch: what the compiler sees of them, and compiled steps.

Without a GPU: shapes, types and devices on tensors without memory; steps around a call in plain PyTorch; and xFormers'
own kernel in Triton's interpreter. With one: compiled models, captured in CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.attention import Attention
from attn_dispatch.backend import Backend
from attn_dispatch.contract import LayerParameters
from attn_dispatch.dispatch import registry, verdict_of
from attn_dispatch.errors import PlanError
from attn_dispatch.integrations import torch_library
from attn_dispatch.integrations.torch_library import Layer, step
from attn_dispatch_cuda.xformers import interpreted

NAMES = ("cuda/flash-attention", "cuda/flashinfer", "cuda/xformers")
B, MOST = 64, 256
PAGES = MOST // B


def rows(tokens: int, spec: ad.AttentionSpec, device: str) -> list[torch.Tensor]:
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    dtype = getattr(torch, spec.dtype)
    return [torch.randn(tokens, n, spec.head_size, device=device).to(dtype) for n in heads]


def batch(lens: list[int]) -> ad.AttentionMetadata:
    """Decodes of these lengths after the step; 0 is padding."""
    tables = [list(range(s * PAGES, s * PAGES + -(-n // B))) for s, n in enumerate(lens)]
    slots = [table[-1] * B + (n - 1) % B if n else -1 for n, table in zip(lens, tables, strict=True)]
    return ad.AttentionMetadata.build([1] * len(lens), lens, tables, B, slot_mapping=slots)


class Twice:
    """Two layers on one cache: the first writes, the second reads what it wrote."""

    def __init__(self, backend: Backend, device: str) -> None:
        fields: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": B}
        fields["dtype"] = "bfloat16" if device == "cuda" else "float16"
        self.specs = [ad.AttentionSpec(**fields, writes_kv=writes) for writes in (True, False)]
        for spec in self.specs:
            if not (verdict := verdict_of(backend, spec)):
                pytest.skip(f"refused: {verdict}")
        self.attentions = [ad.attention(spec, backend) for spec in self.specs]
        self.cache = self.attentions[0].allocate(4 * PAGES, device)
        self.layers = [Layer(attention, self.cache) for attention in self.attentions]

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        return self.layers[1](self.layers[0](q * 2, k, v) + q)

    def directly(self, now: ad.AttentionMetadata, q: Any, k: Any, v: Any) -> Any:
        plans = [attention.plan(now) for attention in self.attentions]
        first = self.attentions[0].run(plans[0], q * 2, k, v, self.cache)
        return self.attentions[1].run(plans[1], first + q, None, None, self.cache)


def bare(name: str, **fields: Any) -> Attention:
    """A layer on a backend whose GPU need not be here: nothing is run."""
    spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=128, block_size=B, returns_lse=True, **fields)
    return Attention(spec, registry().load(name), LayerParameters(spec))


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_compiler_sees(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device that the tensors say that they are on, with a cache in the backend's layout."""
    if order == "HND" and name != "cuda/flashinfer":
        pytest.skip("refused: its pages are NHD")
    monkeypatch.setenv("ATTN_DISPATCH_CUDA_FLASHINFER_LAYOUT", order)
    attn = bare(name)
    assert attn.backend.layout(attn.spec).name == order
    layer = Layer(attn, attn.allocate(7, "meta"))
    assert layer.arrays[0].shape == ((7, B, 2, 128) if order == "NHD" else (7, 2, B, 128))
    q, k, v = rows(5, attn.spec, "meta")
    out, lse = layer(q, k, v, return_lse=True)
    given = torch.empty_like(q)
    assert layer(q, k, v, given) is given
    for found, shape, dtype in ((out, (5, 8, 128), torch.bfloat16), (lse, (5, 8), torch.float32)):
        assert (tuple(found.shape), found.dtype, found.device.type) == (shape, dtype, "meta")
        assert found.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_without_memory(name: str) -> None:
    """Traced, functionalised and run, all of it on tensors that have shapes alone."""
    attn = bare(name)
    layers = [Layer(attn, attn.allocate(7, "meta")) for _ in range(3)]
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def model(q: Any, k: Any, v: Any) -> Any:
        for layer in layers:
            q = layer(q, k, v, return_lse=True)[0]
        return q

    from torch._dynamo.backends.common import aot_autograd

    for backend in (keep, aot_autograd(fw_compiler=keep)):
        torch._dynamo.reset()
        out = torch.compile(model, fullgraph=True, backend=backend)(*rows(5, attn.spec, "meta"))
        assert (tuple(out.shape), out.dtype) == ((5, 8, 128), torch.bfloat16)
    run = torch_library.run_lse
    assert [sum(run in (n.target, *n.args) for n in graph.graph.nodes) for graph in graphs] == [3, 3]


def test_xformers_kernel_in_the_interpreter() -> None:
    """In a process of its own, where Triton is told so before it is imported."""
    if not interpreted():
        if importlib.util.find_spec("xformers") is None or importlib.util.find_spec("triton") is None:
            pytest.skip("not run: needs xformers and triton")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "ignore",
            f"{__file__}::{_THIS}",
            "-p",
            "no:cacheprovider",
        ]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-4000:]
        if "1 passed" not in done.stdout:
            pytest.skip(done.stdout.strip().splitlines()[-1])
        return
    backend = registry().load("cuda/xformers")
    if not (available := backend.probe()):
        pytest.skip(f"not run: {available.reason}")
    torch.manual_seed(0)
    model, other = Twice(backend, "cpu"), Twice(backend, "cpu")
    compiled = torch.compile(model.__call__, fullgraph=True, backend="aot_eager")
    for lens in ([30, 1], [31, 2]):
        arrays = rows(2, model.specs[0], "cpu")
        with step(batch(lens)):
            found = compiled(*arrays)
            torch.library.opcheck(
                torch_library.run,
                (*arrays, model.layers[0].arrays, model.layers[0].handle, 64),
                test_utils=("test_schema", "test_faketensor"),
            )
        torch.testing.assert_close(found, other.directly(batch(lens), *arrays), atol=1e-2, rtol=1e-2)


_THIS = test_xformers_kernel_in_the_interpreter.__name__


@pytest.fixture(params=NAMES)
def on_gpu(request: pytest.FixtureRequest) -> Any:
    if not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia")
    found = registry().load(request.param)
    if not (available := found.probe()):
        pytest.skip(f"not run: {available.reason}")
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_on_a_gpu(on_gpu: Any, mode: str) -> None:
    """Also where Inductor captures graphs by itself: what depends on the step must not be in them."""
    torch.manual_seed(0)
    model, other = Twice(on_gpu, "cuda"), Twice(on_gpu, "cuda")
    compiled = torch.compile(model.__call__, fullgraph=True, mode=mode)
    for lens in ([30, 1, 64, 7], [31, 2, 65, 8], [32, 3, 66, 9], [33, 4, 67, 10], [MOST, 5, 1, 33]):
        arrays = rows(4, model.specs[0], "cuda")
        with step(batch(lens)):
            found = compiled(*arrays)
        torch.testing.assert_close(found, other.directly(batch(lens), *arrays), atol=3e-2, rtol=3e-2)
        for name in ("key", "value"):
            assert torch.equal(model.cache.arrays[name], other.cache.arrays[name])


def test_a_compiled_model_in_a_cuda_graph(on_gpu: Any) -> None:
    if on_gpu == "cuda/xformers":
        pytest.skip("refused: xFormers' masks keep lengths on the host")
    torch.manual_seed(0)
    model, other = Twice(on_gpu, "cuda"), Twice(on_gpu, "cuda")
    compiled = torch.compile(model.__call__, fullgraph=True)
    steps = [[30, 1, 64, 7], [31, 2, 65, 8], [32, 0, 66, 0], [0, 0, 0, 0], [MOST, 3, 1, 33]]
    plans = {attention: on_gpu.fixed_plan(attention.spec, batch(steps[0]), MOST) for attention in model.attentions}
    arrays = rows(4, model.specs[0], "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), step(plans=plans):
        for _ in range(3):  # what is compiled and allocated, before the capture
            compiled(*arrays)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with step(plans=plans), torch.cuda.graph(graph):
        out = compiled(*arrays)
    for lens in steps:
        for array in arrays:
            array.normal_()
        for plan in plans.values():
            plan.renew(batch(lens))
        graph.replay()
        expected = other.directly(batch(lens), *arrays)
        torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
        for name in ("key", "value"):
            assert torch.equal(model.cache.arrays[name], other.cache.arrays[name])


def test_capture_of_a_steps_own_plan_is_refused(on_gpu: Any) -> None:
    model = Twice(on_gpu, "cuda")
    arrays = rows(4, model.specs[0], "cuda")
    now = batch([30, 1, 64, 7])
    with step(now):
        model(*arrays)
        before = [array.clone() for array in model.cache.arrays.values()]
        torch.cuda.synchronize()
        with pytest.raises(PlanError, match="being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(*arrays)
    assert all(torch.equal(array, old) for array, old in zip(model.cache.arrays.values(), before, strict=True))
