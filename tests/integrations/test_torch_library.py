"""Layers as operators: compiled models say what `Attention.run` says, and write what it writes, step after step."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="not run: needs torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.dispatch import verdict_of  # noqa: E402
from attn_dispatch.errors import ArrayError, CacheError, MetadataError, PlanError  # noqa: E402
from attn_dispatch.integrations import torch_library  # noqa: E402
from attn_dispatch.integrations.torch_library import Layer, step  # noqa: E402
from attn_dispatch.reference import ReferenceBackend  # noqa: E402

H, K, D, B, WIDTH, BLOCKS = 4, 2, 16, 32, 24, 9
SPEC = ad.AttentionSpec(num_heads=H, num_kv_heads=K, head_size=D, dtype="float32", block_size=B)
READER = replace(SPEC, writes_kv=False)

CXX = shutil.which(os.environ.get("CXX", "g++"))
COMPILERS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not CXX, reason="not run: needs a C++ compiler")),
]
# A prefill, prefill and decode together, decodes; then other lengths.
STEPS = [
    ([5, 40], [5, 40], [[4], [7, 0]]),
    ([1, 6], [6, 46], [[4], [7, 0]]),
    ([1, 1], [7, 47], [[4], [7, 0]]),
    ([3, 9, 1], [10, 9, 33], [[4], [2], [8, 1]]),
]


@pytest.fixture(params=[name for name, available in ad.backends().items() if available])
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    verdict = verdict_of(name, SPEC)
    return name if verdict else pytest.skip(f"refused: {verdict}")


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def batch(number: int) -> ad.AttentionMetadata:
    return ad.AttentionMetadata.build(*STEPS[number], B)


def contents(cache: ad.KVCache) -> list[np.ndarray]:
    return [array.view(torch.uint8).numpy().copy() for array in cache.arrays_as("torch").values()]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class Direct:
    """A layer without the operators: what they are compared with."""

    def __init__(self, attention: ad.Attention, cache: ad.KVCache | None) -> None:
        self.attention, self.cache = attention, cache
        self.batch: Any = None

    def __call__(self, q: Any, k: Any = None, v: Any = None) -> Any:
        return self.attention.run(self.attention.plan(self.batch), q, k, v, self.cache)


class Block(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    def __init__(self, layer: Any, reads: bool = False) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, (H + 2 * K) * D)
        self.out = torch.nn.Linear(H * D, WIDTH)
        self.layer, self.reads = layer, reads

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).split([H * D, K * D, K * D], dim=-1)
        if self.reads:
            y = self.layer(q.view(-1, H, D))
        else:
            y = self.layer(q.view(-1, H, D), k.view(-1, K, D), v.view(-1, K, D))
        return x + torch.tanh(self.out(y.flatten(1)))


def model(backend: str, make: Callable[..., Any]) -> tuple[Any, list[Any], list[ad.KVCache]]:
    """Two caches. The first is written, read by another layer, written again in the same slots, and read again."""
    writer, reader = ad.attention(SPEC, backend), ad.attention(READER, backend)
    caches = [writer.allocate(BLOCKS) for _ in range(2)]
    order = [(writer, 0), (reader, 0), (writer, 1), (writer, 0), (reader, 0), (reader, 1)]
    layers = [make(attention, caches[which]) for attention, which in order]
    torch.manual_seed(1)
    blocks = [Block(layer, attention is reader) for layer, (attention, _) in zip(layers, order, strict=True)]
    return torch.nn.Sequential(*blocks).requires_grad_(False), layers, caches


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_model_says_and_writes_what_runs_do(
    backend: str, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_of, direct, expected = model(backend, Direct)
    eager, _, by_eager = model(backend, Layer)
    inner, _, by_compiled = model(backend, Layer)
    compiled = torch.compile(inner, fullgraph=True, backend=compiler)
    copies = 0

    def counted(*args: Any) -> ad.KVCache:
        nonlocal copies
        copies += 1
        return ad.KVCache(*args)

    monkeypatch.setattr(torch_library, "KVCache", counted)
    for number in range(len(STEPS)):
        x, now = torch.randn(sum(STEPS[number][0]), WIDTH), batch(number)
        for layer in direct:
            layer.batch = now
        answer = expected_of(x)
        with step(now):
            assert torch.equal(eager(x), answer)
            torch.testing.assert_close(compiled(x), answer, atol=1e-5, rtol=1e-5)
        for one, two, three in zip(expected, by_eager, by_compiled, strict=True):
            assert same(contents(one), contents(two))
            for by_run, by_graph in zip(one.gather(range(BLOCKS)), three.gather(range(BLOCKS)), strict=True):
                np.testing.assert_allclose(np.asarray(by_graph), np.asarray(by_run), atol=1e-5, rtol=1e-5)
    assert any(array.any() for array in contents(expected[0]))
    # aot_eager computes on copies of the caches, which is what makes it a test; Inductor in place.
    assert bool(copies) == (compiler == "aot_eager")


@pytest.mark.parametrize("op", ["run", "run_lse", "run_out", "run_lse_out"])
def test_opcheck(backend: str, op: str) -> None:
    spec = replace(SPEC, returns_lse="lse" in op)
    if not (verdict := verdict_of(backend, spec)):
        pytest.skip(f"refused: {verdict}")
    attn = ad.attention(spec, backend)
    layer = Layer(attn, attn.allocate(BLOCKS))
    q, k, v = torch.randn(46, H, D)[1:], torch.randn(45, K, D), torch.randn(45, K, D)
    out = (torch.zeros(45, H, D),) if op.endswith("out") else ()
    with step(batch(0)):
        torch.library.opcheck(getattr(torch_library, op), (q, k, v, layer.arrays, layer.handle, D, *out))


class Strided(ReferenceBackend):
    """A backend that computes a head after the other."""

    def run(self, *args: Any, **named: Any) -> Any:
        found = super().run(*args, **named)
        heads_first = [x if x is None else x.swapaxes(0, 1).copy().swapaxes(0, 1) for x in found]
        return tuple(heads_first)


@pytest.mark.parametrize("op", ["run_lse", "run_lse_out"])
def test_results_lie_as_the_compiler_was_told(op: str) -> None:
    spec = replace(SPEC, returns_lse=True)
    attn = ad.attention(spec, Strided("test/strided"))
    layer = Layer(attn, attn.allocate(BLOCKS))
    q, k, v = torch.randn(45, H, D), torch.randn(45, K, D), torch.randn(45, K, D)
    out = (torch.zeros(45, H, D),) if op.endswith("out") else ()
    with step(batch(0)):
        torch.library.opcheck(getattr(torch_library, op), (q, k, v, layer.arrays, layer.handle, D, *out))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_lse_and_out(backend: str, compiler: str) -> None:
    spec = replace(SPEC, returns_lse=True)
    if not (verdict := verdict_of(backend, spec)):
        pytest.skip(f"refused: {verdict}")
    attn = ad.attention(spec, backend)
    layer = Layer(attn, attn.allocate(BLOCKS))
    q, k, v = torch.randn(45, H, D), torch.randn(45, K, D), torch.randn(45, K, D)
    expected = attn.run(attn.plan(batch(0)), q, k, v, attn.allocate(BLOCKS), return_lse=True)

    def each(q: Any, k: Any, v: Any, out: Any, other: Any) -> Any:
        first, sums = layer(q, k, v, return_lse=True)
        second, more = layer(q, k, v, out, return_lse=True)
        return first, sums, second + 0, more, layer(q, k, v, other) + 0

    given = torch.zeros(45, H, D), torch.zeros(45, H, D)
    with step(batch(0)):
        found = torch.compile(each, fullgraph=True, backend=compiler)(q, k, v, *given)
    for array in (found[0], found[2], found[4], *given):
        torch.testing.assert_close(array, expected[0])
    for array in (found[1], found[3]):
        torch.testing.assert_close(array, expected[1])


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_types_of_cache(backend: str, compiler: str, stored: str) -> None:
    """Also those that have scales of their own, or that NumPy has by extension."""
    spec = replace(SPEC, kv_cache_dtype=stored)
    if not (verdict := verdict_of(backend, spec)):
        pytest.skip(f"refused: {verdict}")
    attn = ad.attention(spec, backend)
    caches = [attn.allocate(BLOCKS) for _ in range(2)]
    layer = Layer(attn, caches[1])
    q, k, v = torch.randn(45, H, D), torch.randn(45, K, D), torch.randn(45, K, D)
    expected = attn.run(attn.plan(batch(0)), q, k, v, caches[0])
    with step(batch(0)):
        found = torch.compile(layer.__call__, fullgraph=True, backend=compiler)(q, k, v)
    assert torch.equal(found, expected)
    assert same(contents(caches[0]), contents(caches[1]))


def test_an_encoder_has_no_cache(backend: str) -> None:
    spec = replace(SPEC, kind="encoder", causal=False)
    if not (verdict := verdict_of(backend, spec)):
        pytest.skip(f"refused: {verdict}")
    attn = ad.attention(spec, backend)
    layer = Layer(attn)
    arrays = torch.randn(9, H, D), torch.randn(9, K, D), torch.randn(9, K, D)
    now = ad.AttentionMetadata.build([4, 5], [4, 5], block_size=B)
    with step(now):
        found = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")(*arrays)
        torch.library.opcheck(torch_library.run, (*arrays, (), layer.handle, D))
    assert torch.equal(found, attn.run(attn.plan(now), *arrays))


def test_a_step_compiles_nothing_anew() -> None:
    inner, _, _ = model("reference", Layer)
    for dynamic, steps, graphs in ((None, [0, 0, 0], 1), (True, [0, 1, 2, 3], 1), (None, [0, 1, 2, 3, 0], 2)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(inner, fullgraph=True, backend=counter, dynamic=dynamic)
        for shift, number in enumerate(steps):
            query_lens, seq_lens, tables = STEPS[number]
            moved = [[(block + shift) % BLOCKS for block in table] for table in tables]
            with step(ad.AttentionMetadata.build(query_lens, seq_lens, moved, B)):
                compiled(torch.randn(sum(query_lens), WIDTH))
        assert counter.frame_count == graphs


def test_blocks_that_are_compiled_each_by_itself_share_their_code() -> None:
    attn = ad.attention(SPEC, "reference")
    blocks = torch.nn.Sequential(*(Block(Layer(attn, attn.allocate(BLOCKS))) for _ in range(12)))
    x = torch.randn(45, WIDTH)
    with torch.inference_mode(), step(batch(0)):
        expected = blocks(x)
        counter = CompileCounterWithBackend("aot_eager")
        for block in blocks:
            block.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(blocks(x), expected)
    assert counter.frame_count == 2  # one layer's, then one for any layer


def test_layers_of_a_spec_share_a_plan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, layers, _ = model(backend, Layer)
    kind, planned = type(layers[0].attention.backend), list[Any]()
    plan = kind.plan

    def counted(self: Any, spec: Any, metadata: Any) -> Any:
        planned.append(spec)
        return plan(self, spec, metadata)

    monkeypatch.setattr(kind, "plan", counted)
    with step(batch(0)):
        inner(torch.randn(45, WIDTH))
        inner(torch.randn(45, WIDTH))
    assert planned == [SPEC, READER]


def test_a_plan_in_hand() -> None:
    attn, other = ad.attention(SPEC, "reference"), ad.attention(READER, "reference")
    cache = attn.allocate(BLOCKS)
    writes, reads = Layer(ad.attention(SPEC, "reference"), cache), Layer(other, cache)
    q, k, v = torch.randn(45, H, D), torch.randn(45, K, D), torch.randn(45, K, D)
    plan = attn.plan(batch(0))
    with step(plans={attn: plan}) as now:
        assert now.plan(writes) is plan
        out = writes(q, k, v)
        with pytest.raises(PlanError, match=r"no plan for .*writes_kv=False.*give step\(batch\)"):
            reads(q)
        with pytest.raises(PlanError, match="being captured"):
            now.plan(reads, captured=True)
        assert now.plan(writes, captured=True) is plan
    with step(batch(0), plans={attn: plan}) as now:
        assert torch.equal(reads(q), out)
        with pytest.raises(PlanError, match="being captured"):
            now.plan(reads, captured=True)
    with pytest.raises(PlanError, match="was given for"), step(plans={other: plan}):
        pass


def test_what_is_wrong_is_refused_before_anything_is_written(backend: str) -> None:
    inner, layers, caches = model(backend, Layer)
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    outside = ad.AttentionMetadata.build([5, 40], [5, 40], [[4], [7, 90]], B)
    wrong: list[tuple[Any, Any, Any, str]] = [
        (batch(0), 44, ArrayError, "q has shape"),
        (outside, 45, CacheError, "sequence 1: block 90"),
        (ad.AttentionMetadata.build([5], [5], [[4]], 16), 5, MetadataError, "block_size=16"),
    ]
    before = [contents(cache) for cache in caches]
    for run in (inner, compiled):
        for now, rows, error, words in wrong:
            with step(now), pytest.raises(error, match=words):
                run(torch.randn(rows, WIDTH))
        with pytest.raises(PlanError, match=r"no step is active.*with torch_library.step"):
            run(torch.randn(45, WIDTH))
    with step(batch(0)):
        q, k = torch.randn(45, H, D), torch.randn(45, K, D)
        with pytest.raises(ArrayError, match="k has shape"):
            layers[0](q, k[1:], k[1:])
        with pytest.raises(ArrayError, match="k and v must be given"):
            layers[0](q)
        with pytest.raises(ArrayError, match="has none"):
            layers[0](q.requires_grad_(), k, k)
        foreign = [torch.zeros(3) for _ in layers[0].arrays]
        with pytest.raises(CacheError, match="an array of the cache is"):
            torch_library.run(q.detach(), k, k, foreign, layers[0].handle, D)
    for cache, old in zip(caches, before, strict=True):
        assert same(contents(cache), old)


def test_a_layer_needs_its_cache() -> None:
    with pytest.raises(CacheError, match="needs its cache"):
        Layer(ad.attention(SPEC, "reference"))


def test_memory_that_is_never_written_is_refused() -> None:
    attn = ad.attention(SPEC, "reference")
    cache = attn.allocate(1)
    cache.arrays["key"] = type("Array", (), {"__module__": "jaxlib", "dtype": None})()
    with pytest.raises(CacheError, match="JAX's"):
        Layer(attn, cache)


def test_a_layer_is_not_copied() -> None:
    attn = ad.attention(SPEC, "reference")
    layer = Layer(attn, attn.allocate(1))
    for make, of in ((copy.copy, layer), (copy.deepcopy, Block(layer)), (pickle.dumps, layer)):
        with pytest.raises(CacheError, match="make a Layer for the copy"):
            make(of)


def test_steps_are_of_a_thread_and_may_be_nested() -> None:
    attn = ad.attention(SPEC, "reference")
    q, k, v = torch.randn(45, H, D), torch.randn(45, K, D), torch.randn(45, K, D)
    layers = [Layer(attn, attn.allocate(BLOCKS)) for _ in STEPS]
    expected, found = dict[int, Any](), dict[int, Any]()
    for number in range(len(STEPS)):
        rows = sum(STEPS[number][0])
        expected[number] = attn.run(attn.plan(batch(number)), q[:rows], k[:rows], v[:rows], attn.allocate(BLOCKS))
    together = threading.Barrier(len(STEPS))

    def work(number: int) -> None:
        rows = sum(STEPS[number][0])
        with step(batch(number)):
            together.wait(60)
            found[number] = layers[number](q[:rows], k[:rows], v[:rows])

    with step(batch(1)):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(STEPS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[number], expected[number]) for number in range(len(STEPS)))
        with step(batch(2)):
            assert torch.equal(layers[2](q[:2], k[:2], v[:2]), expected[2])
        assert torch.equal(layers[1](q[:7], k[:7], v[:7]), expected[1])
        alone: list[Exception] = []

        def without() -> None:
            try:
                layers[1](q[:7], k[:7], v[:7])
            except Exception as error:
                alone.append(error)

        thread = threading.Thread(target=without)
        thread.start()
        thread.join()
        assert isinstance(alone[0], PlanError)


def test_what_is_gone_is_gone() -> None:
    inner, layers, caches = model("reference", Layer)
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with step(batch(0)):
        compiled(torch.randn(45, WIDTH))
    last = [weakref.ref(thing) for thing in (*layers, *caches)]
    call = torch.randn(45, H, D), None, None, layers[1].arrays, layers[1].handle, D
    del inner, layers, caches, compiled
    gc.collect()
    assert [ref() for ref in last] == [None] * len(last)
    with step(batch(0)), pytest.raises(CacheError, match="gone"):
        torch_library.run(*call)
