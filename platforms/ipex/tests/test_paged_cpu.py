"""IPEX's faults, each of which this backend has to keep out of reach: with IPEX's real ops."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.errors import ArrayError, BackendRefusedError, CacheError

NAME = "ipex/paged-cpu"

available = ad.backends()[NAME]
if not available:
    pytest.skip(f"not run: {available.reason}", allow_module_level=True)

torch = pytest.importorskip("torch")
KERNEL = "PAGED_ATTENTION_SINGLE_QUERY_KERNEL"


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32", "block_size": 32}
    return ad.AttentionSpec(**(plain | fields))


def inputs(layer: ad.AttentionSpec, tokens: int, rows: int | None = None) -> list[Any]:
    """q [tokens, H, D], and k and v [rows, K, D]."""
    generator = torch.Generator().manual_seed(tokens)
    heads = ((tokens, layer.num_heads), (rows or tokens, layer.num_kv_heads), (rows or tokens, layer.num_kv_heads))
    return [torch.randn(n, h, layer.head_size, generator=generator).to(getattr(torch, layer.dtype)) for n, h in heads]


def against_reference(layer: ad.AttentionSpec, batches: list[ad.AttentionMetadata], arrays: list[list[Any]]) -> float:
    """Run the same steps on both; return the largest difference of the last one."""
    outs = []
    for name in (NAME, "reference"):
        attn = ad.attention(layer, name)
        cache = attn.allocate(20)
        for batch, (q, k, v) in zip(batches, arrays, strict=True):
            out = attn.run(attn.plan(batch), q, k, v, cache)
        outs.append(out.double())
    return float((outs[0] - outs[1]).abs().max())


def test_many_sequences_that_share_their_first_block() -> None:
    """The op takes them for a beam search, and chooses a kernel that always raises."""
    layer = spec(num_heads=8)
    prompt = ad.AttentionMetadata.build([32], [32], [[7]])
    step = ad.AttentionMetadata.build([1] * 6, [33] * 6, [[7, i] for i in range(6)])
    arrays = [inputs(layer, 32), inputs(layer, 6)]
    assert against_reference(layer, [prompt, step], arrays) < 1e-5
    del os.environ[KERNEL]  # somebody cleared the environment: a plan sets it again
    assert against_reference(layer, [prompt, step], arrays) < 1e-5


@pytest.fixture
def ops() -> Any:
    from attn_dispatch_ipex import paged_cpu_call

    return paged_cpu_call


def test_the_variable_is_what_keeps_that_kernel_away(ops: Any) -> None:
    """Should a release of IPEX ever mend it, this says that the variable can go."""
    layer = spec(num_heads=8)
    attn = ad.attention(layer, NAME)
    cache = attn.allocate(20)
    plan = attn.plan(ad.AttentionMetadata.build([1] * 6, [33] * 6, [[7, i] for i in range(6)]))
    del os.environ[KERNEL]
    try:
        with pytest.raises(RuntimeError, match="Sliding window unsupported"):
            attn.run(plan, *inputs(layer, 6), cache)
    finally:
        os.environ[KERNEL] = "1"


@pytest.mark.parametrize("shift", [0.0, -20.0, -40.0])
@pytest.mark.parametrize("length", [150, 400])
def test_windows_over_scores_far_below_zero(shift: float, length: int) -> None:
    """The op takes the largest score of a partition that its window leaves out to be 0."""
    layer = spec(num_heads=2, num_kv_heads=1, window=(19, 0))
    table = [list(range(13))[::-1]]
    arrays = [inputs(layer, length), inputs(layer, 1)]
    for q, k, _ in arrays:
        q[..., 0], k[..., 0] = 8.0, shift  # 8 / sqrt(64) = 1: every score moves by `shift`
    batches = [
        ad.AttentionMetadata.build([length], [length], table),
        ad.AttentionMetadata.build([1], [length + 1], table),
    ]
    assert against_reference(layer, batches, arrays) < 1e-5


def test_that_fault_is_still_there(ops: Any) -> None:
    """The proof that the test above can fail: the same call without blocks left out."""
    length, window = 400, 20
    q, k, v = inputs(spec(num_heads=1, num_kv_heads=1), length)
    q, k = q[-1:].clone(), k.clone()
    q[..., 0], k[..., 0] = 8.0, -30.0
    key, value = torch.zeros(13, 1, 32, 64), torch.zeros(13, 1, 32, 64)
    ops._PAGED.reshape_and_cache(k, v, key, value, torch.arange(length, dtype=torch.int32))
    out = torch.empty(1, 1, 64)
    table, lens = torch.arange(13, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32)
    ops._PAGED.single_query_cached_kv_attention(
        out, q, key, value, ops._NO_MAPPING, 0.125, table, lens, 32, length, None, window
    )
    weights = torch.softmax(k[-window:, 0].double() @ q[0, 0].double() * 0.125, 0)
    assert (out[0, 0].double() - weights @ v[-window:, 0].double()).abs().max() > 0.1


def test_strides_that_the_ops_ignore() -> None:
    """Rows of a fused projection, transposed heads, every second element: the result is that of contiguous arrays."""
    layer = spec()
    batch = ad.AttentionMetadata.build([1, 12, 1], [40, 12, 9], [[4, 1], [0], [3]])
    q, k, v = inputs(layer, 14)
    attn = ad.attention(layer, NAME)
    expected = attn.run(attn.plan(batch), q, k, v, attn.allocate(6))

    fused = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
    parts = [x.unflatten(1, (-1, 64)) for x in fused.split([256, 128, 128], dim=1)]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    spread = [torch.repeat_interleave(x, 2, dim=2)[..., ::2] for x in (q, k, v)]
    for given in (parts, turned, spread):
        assert not given[0].is_contiguous()
        assert torch.equal(attn.run(attn.plan(batch), *given, attn.allocate(6)), expected)
        out = torch.full_like(given[0], float("nan"))
        result = attn.run(attn.plan(batch), *given, attn.allocate(6), out=out)
        assert result is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_stored_as_the_contract_says(dtype: str) -> None:
    """The op rounds float32 twice, and makes infinity of what it should saturate."""
    layer = spec(dtype=dtype, kv_cache_dtype="float8_e5m2")
    caches = []
    for name in (NAME, "reference"):
        attn = ad.attention(layer, name, k_scale=0.07, v_scale=3.0)
        cache = attn.allocate(8)
        q, k, v = inputs(layer, 256)
        v = v * 1e5
        attn.run(attn.plan(ad.AttentionMetadata.build([256], [256], [list(range(8))])), q, k, v, cache)
        caches.append([np.asarray(side.view(torch.uint8) if name == NAME else side) for side in cache.gather(range(8))])
    for own, exact in zip(*caches, strict=True):
        assert np.array_equal(own, exact.view(np.uint8))


@pytest.mark.parametrize("block", [20, 1_000_000])
def test_blocks_outside_the_cache_never_reach_an_op(ops: Any, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    called: list[str] = []

    class Recorded(ops._PAGED):  # type: ignore[misc]
        pass

    for op in ("reshape_and_cache", "single_query_cached_kv_attention", "flash_attn_varlen_func"):
        real = getattr(ops._PAGED, op)

        def record(*arguments: Any, op: str = op, real: Any = real, **named: Any) -> Any:
            called.append(op)
            return real(*arguments, **named)

        setattr(Recorded, op, staticmethod(record))
    monkeypatch.setattr(ops, "_PAGED", Recorded)
    layer = spec()
    attn = ad.attention(layer, NAME)
    cache = attn.allocate(20)
    arrays = inputs(layer, 3)
    with pytest.raises(CacheError, match=f"sequence 0: block {block} .* has 20 blocks"):
        attn.run(attn.plan(ad.AttentionMetadata.build([1, 2], [40, 2], [[3, block], [1]])), *arrays, cache)
    assert called == []
    assert not cache.key.any()
    attn.run(attn.plan(ad.AttentionMetadata.build([1, 2], [40, 2], [[3, 19], [1]])), *arrays, cache)
    assert called == ["reshape_and_cache", "single_query_cached_kv_attention", "flash_attn_varlen_func"]


def test_slots_beyond_32_bits_are_refused() -> None:
    attn = ad.attention(spec(), NAME)
    attn.plan(ad.AttentionMetadata.build([1], [1], [[2**26 - 1]]))
    with pytest.raises(CacheError, match=r"do not fit IPEX's 32-bit slots. Use blocks below 67108864"):
        attn.plan(ad.AttentionMetadata.build([1], [1], [[2**26]]))


def test_other_devices_are_refused() -> None:
    attn = ad.attention(spec(), NAME)
    plan, cache = attn.plan(ad.AttentionMetadata.build([3], [3], [[0]])), attn.allocate(2)
    with pytest.raises(ArrayError, match="q is on meta"):
        attn.run(plan, *[x.to("meta") for x in inputs(spec(), 3)], cache)
    with pytest.raises(CacheError, match="device='meta'"):
        attn.allocate(2, "meta")


def test_inputs_of_a_model_that_is_being_trained() -> None:
    layer = spec()
    attn = ad.attention(layer, NAME)
    plan = attn.plan(ad.AttentionMetadata.build([3], [3], [[0]]))
    arrays = inputs(layer, 3)
    expected = attn.run(plan, *arrays, attn.allocate(2))
    found = attn.run(plan, *[x.clone().requires_grad_() for x in arrays], attn.allocate(2))
    assert torch.equal(found.detach(), expected)


def test_nothing_but_rows_that_attend_to_nothing() -> None:
    layer = spec()
    attn = ad.attention(layer, NAME)
    batch = ad.AttentionMetadata.build([2, 1], [0, 0], [[3], [4]], slot_mapping=[-1, -1, -1])
    cache = attn.allocate(6)
    out = attn.run(attn.plan(batch), *inputs(layer, 3), cache)
    assert not out.any()
    assert not cache.key.any()


def test_an_encoder_with_a_cache_and_without_one() -> None:
    """Without, keys and values go through pages of their own, in the layer's type whatever the cache would store."""
    for stored, tolerance in (("float32", 1e-5), ("float8_e5m2", 1.0)):
        layer = spec(kind="encoder", kv_cache_dtype=stored)
        batch = ad.AttentionMetadata.build([150, 1, 0, 40], [150, 1, 0, 40], [[9, 1, 4, 2, 0], [5], [], [6, 3]])
        attn = ad.attention(layer, NAME)
        plan, (q, k, v) = attn.plan(batch), inputs(layer, 191)
        without = attn.run(plan, q, k, v)
        within = attn.run(plan, q, k, v, attn.allocate(10))
        exact = ad.attention(layer, "reference").run(ad.attention(layer, "reference").plan(batch), q, k, v)
        assert (without - exact).abs().max() < 1e-5
        assert (within - exact).abs().max() < tolerance


def test_a_cache_of_another_backend_with_the_same_layout() -> None:
    """Prefill on the reference, decode here: one cache."""
    layer = spec()
    first, then = ad.attention(layer, "reference"), ad.attention(layer, NAME)
    cache = first.allocate(6)
    prompt, step = inputs(layer, 50), inputs(layer, 1)
    table = [[4, 1]]
    first.run(first.plan(ad.AttentionMetadata.build([50], [50], table)), *prompt, cache)
    batch = ad.AttentionMetadata.build([1], [51], table)
    found = then.run(then.plan(batch), *step, cache)
    assert (found - first.run(first.plan(batch), *step, cache)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"dtype": "float64"}, "dtype", "float32, bfloat16, float16"),
        ({"kv_cache_dtype": "float8_e4m3fn"}, "kv_cache_dtype", "e5m2"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype", "e5m2"),
        ({"dtype": "float16", "kv_cache_dtype": "float8_e5m2"}, "kv_cache_dtype", "e5m2"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype", "own type"),
        ({"head_size": 16, "kv_cache_dtype": "float8_e5m2"}, "head_size, kv_cache_dtype", "crashes"),
        ({"value_head_size": 32}, "value_head_size", "as wide as keys, 64"),
        ({"sinks": True}, "sinks", "no sink"),
        ({"returns_lse": True}, "returns_lse", "not return LSE"),
        ({"scale": 0.0}, "scale", "masked"),
        ({"scale": -0.5}, "scale", "masked"),
        ({"alibi": True, "causal": False}, "alibi", "causal"),
        ({"alibi": True, "block_size": 48}, "alibi, block_size", "divides 128"),
        ({"alibi": True, "window": (8, 0), "logits_soft_cap": 2.0}, "alibi, logits_soft_cap, window", "soft-cap"),
        ({"window": (0, 3), "causal": False}, "window", r"treats window\[0\]=0 as no window"),
        ({"window": (0, 0), "block_size": 256}, "window, block_size", "divides 128"),
        ({"alibi": True, "kv_cache_dtype": "float8_e5m2"}, "alibi, kv_cache_dtype", "bfloat16"),
    ],
)
def test_refusals(fields: dict[str, Any], field: str, words: str) -> None:
    alibi = {"alibi_slopes": np.ones(4, np.float32)} if fields.get("alibi") else {}
    sinks = {"sinks": np.ones(4, np.float32)} if fields.get("sinks") else {}
    with pytest.raises(BackendRefusedError, match=words):
        ad.attention(spec(**fields), NAME, **alibi, **sinks)
    verdicts = {v.backend: v for v in ad.explain(spec(**fields)).verdicts}
    assert [refusal.field for refusal in verdicts[NAME].refusals] == [field]


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({}, ""),
        ({"block_size": 48}, "prefill op"),
        ({"window": (8, 0), "logits_soft_cap": 2.0}, "prefill op"),
        ({"alibi": True}, "token by token"),
        ({"window": (0, 0)}, "token by token"),
    ],
)
def test_notes_say_what_is_slow(fields: dict[str, Any], note: str) -> None:
    verdicts = {v.backend: v for v in ad.explain(spec(**fields)).verdicts}
    assert verdicts[NAME]
    assert (note in verdicts[NAME].note) if note else verdicts[NAME].note == ""
