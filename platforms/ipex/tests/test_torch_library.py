"""Layers on IPEX's CPU ops as operators of torch: a compiled model says what runs do."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import pytest

import attn_dispatch as ad

NAME = "ipex/paged-cpu"
if not (available := ad.backends()[NAME]):
    pytest.skip(f"not run: {available.reason}", allow_module_level=True)

torch = pytest.importorskip("torch")

from attn_dispatch.integrations import torch_library  # noqa: E402
from attn_dispatch.integrations.torch_library import Layer, step  # noqa: E402

H, K, D, B, BLOCKS = 4, 2, 64, 32, 9
SPEC = ad.AttentionSpec(num_heads=H, num_kv_heads=K, head_size=D, dtype="bfloat16", block_size=B)
# Prefills, prefill and decode together, decodes; then other lengths.
STEPS = [
    ([5, 40], [5, 40], [[4], [7, 0]]),
    ([1, 6], [6, 46], [[4], [7, 0]]),
    ([1, 1], [7, 47], [[4], [7, 0]]),
    ([3, 9, 1], [10, 9, 33], [[4], [2], [8, 1]]),
]


class Model:
    """Layers that write one cache, read it, and write it again in the same slots."""

    def __init__(self) -> None:
        self.attentions = [ad.attention(spec, NAME) for spec in (SPEC, replace(SPEC, writes_kv=False), SPEC)]
        self.cache = self.attentions[0].allocate(BLOCKS)
        self.layers = [Layer(attention, self.cache) for attention in self.attentions]

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        q = self.layers[0](q, k, v) + q
        q = self.layers[1](q)
        return self.layers[2](q * 2, v, k)

    def directly(self, now: ad.AttentionMetadata, q: Any, k: Any, v: Any) -> Any:
        plans = [attention.plan(now) for attention in self.attentions]
        q = self.attentions[0].run(plans[0], q, k, v, self.cache) + q
        q = self.attentions[1].run(plans[1], q, None, None, self.cache)
        return self.attentions[2].run(plans[2], q * 2, v, k, self.cache)


def rows(number: int) -> list[Any]:
    tokens = sum(STEPS[number][0])
    return [torch.randn(tokens, n, D).bfloat16() for n in (H, K, K)]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_model(compiler: str) -> None:
    if compiler == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("not run: needs a C++ compiler")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, other = Model(), Model()
    compiled = torch.compile(model.__call__, fullgraph=True, backend=compiler)
    for number in range(len(STEPS)):
        arrays, now = rows(number), ad.AttentionMetadata.build(*STEPS[number], B)
        with step(now):
            found = compiled(*arrays)
        torch.testing.assert_close(found, other.directly(now, *arrays), atol=1e-2, rtol=1e-2)
        for name, array in model.cache.arrays.items():
            assert torch.equal(array, other.cache.arrays[name])
    assert model.cache.key.any()


@pytest.mark.parametrize("op", ["run", "run_out"])
def test_opcheck(op: str) -> None:
    layer, arrays = Model().layers[0], rows(0)
    out = (torch.zeros_like(arrays[0]),) if op == "run_out" else ()
    with step(ad.AttentionMetadata.build(*STEPS[0], B)):
        torch.library.opcheck(getattr(torch_library, op), (*arrays, layer.arrays, layer.handle, D, *out))
