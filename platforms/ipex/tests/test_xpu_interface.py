"""The XPU backends' calls, checked against the vendors' real packages, whose kernels need an Intel GPU."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.backend import Backend
from attn_dispatch.contract import NHD, KVCache, LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import registry

torch = pytest.importorskip("torch", reason="not run: needs torch")

from attn_dispatch.adapters.torch.cache_tensors import CacheTensors  # noqa: E402
from attn_dispatch.adapters.torch.layer_pass import DeviceCall  # noqa: E402
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors  # noqa: E402

pytestmark = pytest.mark.interface

IPEX, VLLM = "ipex/paged-xpu", "ipex/vllm-xpu"

# Decodes, a prompt, a chunk, and padding, whose rows attend to nothing.
BATCH = ad.AttentionMetadata.build(
    query_lens=[1, 9, 2, 4, 1],
    seq_lens=[70, 9, 0, 100, 3],
    block_tables=[[3, 1], [5], [], [0, 7], [2]],
    block_size=64,
)


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "bfloat16", "block_size": 64}
    return ad.AttentionSpec(**(plain | fields))


def needs(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"not run: {module} is not installed")


def prepared(name: str, layer: ad.AttentionSpec, **parameters: Any) -> DeviceCall:
    """Return a call over a filled NHD cache in host memory."""
    backend: Any = registry().load(name)
    generator = torch.Generator().manual_seed(0)
    arrays = {side: torch.randn(8, 64, 2, 64, generator=generator).bfloat16() for side in ("key", "value")}
    cache = CacheTensors(KVCache(backend, layer.geometry, NHD, 8, arrays))
    device = torch.device("cpu")
    batch = backend.device_batch(backend.plan(layer, BATCH), device, paged=True)
    q = torch.randn(BATCH.num_tokens, 4, 64, generator=generator).bfloat16()
    tensors = LayerTensors.of(LayerParameters(layer, **parameters), device)
    return DeviceCall(batch, q, None, None, cache, tensors, None, return_lse=False)


def test_ipex_takes_these_arguments() -> None:
    """The front end is one class for both builds, and this is the CPU build's: names and order, not kernels."""
    needs("intel_extension_for_pytorch")
    import intel_extension_for_pytorch as ipex

    from attn_dispatch_ipex.paged_xpu_call import arguments

    call = prepared(IPEX, spec(window=(30, 0), logits_soft_cap=20.0))
    positional, named = arguments(call, call.output())
    op = ipex.llm.modules.PagedAttention.flash_attn_varlen_func
    bound = inspect.signature(op).bind(*positional, **named).arguments
    # (The padding, which has no keys, is given as many as it has rows; the adapter layer clears its output.)
    assert bound["cu_seqlens_q"].tolist() == [0, 1, 10, 12, 16, 17]
    assert bound["cu_seqlens_kv"].tolist() == [0, 70, 79, 81, 181, 184]
    assert (bound["max_seqlen_q"], bound["max_seqlen_kv"], bound["scale"]) == (9, 100, 0.125)
    assert bound["block_tables"].tolist() == [[3, 1], [5, 0], [0, 0], [0, 7], [2, 0]]
    assert (bound["window_size_left"], bound["window_size_right"], bound["softcap"]) == (30, 0, 20.0)
    assert bound["is_cusal"] is True
    assert all(bound[name].is_contiguous() for name in ("cu_seqlens_q", "cu_seqlens_kv", "block_tables"))
    assert all(bound[name].dtype == torch.int32 for name in ("cu_seqlens_q", "cu_seqlens_kv", "block_tables"))


def test_vllm_takes_these_arguments() -> None:
    needs("vllm_xpu_kernels")
    from vllm_xpu_kernels.flash_attn_interface import flash_attn_varlen_func

    from attn_dispatch_ipex.vllm_xpu_call import arguments

    call = prepared(VLLM, spec(sinks=True), sinks=np.ones(4, np.float32))
    bound = inspect.signature(flash_attn_varlen_func).bind(**arguments(call, call.output())).arguments
    assert bound["seqused_k"].tolist() == [70, 9, 2, 100, 3]
    assert bound["s_aux"].dtype == call.q.dtype


def schemas(library: str) -> Iterator[str]:
    """Return the schemas of operators that a library of the wheel registers."""
    wheel = find_spec("vllm_xpu_kernels")
    assert wheel is not None
    assert wheel.submodule_search_locations is not None
    content = (Path(wheel.submodule_search_locations[0]) / library).read_bytes()
    for text in re.findall(rb"[a-z_0-9]+\(Tensor[ -~]{20,}\) -> [ -~]+", content):
        yield " ".join(text.decode().split())


def test_vllm_registers_this_op() -> None:
    """The op that is called, as the compiled library declares it."""
    needs("vllm_xpu_kernels")
    (attend,) = {s for s in schemas("_vllm_fa2_C.abi3.so") if s.startswith("varlen_fwd(")}
    for part in ("Tensor!? out", "Tensor? seqused_k", "Tensor? block_table", "Tensor? softmax_sink", "bool is_causal"):
        assert part in attend


@pytest.mark.parametrize(
    "fields",
    [{}, {"window": (30, 0)}, {"causal": False}, {"causal": False, "window": (20, 5)}, {"sinks": True}, {"scale": 0.3}],
    ids=str,
)
def test_vllm_means_by_these_arguments_what_the_contract_does(fields: dict[str, Any]) -> None:
    """The wheel's own fallback in PyTorch, which it takes where a kernel is missing, says what its arguments mean."""
    needs("vllm_xpu_kernels")
    from vllm_xpu_kernels.flash_attn_interface import _fallback_varlen_attn

    from attn_dispatch_ipex.vllm_xpu_call import arguments

    layer = spec(**fields)
    sinks = {"sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32)} if layer.sinks else {}
    call = prepared(VLLM, layer, **sinks)
    named = arguments(call, call.output())
    attended, _ = _fallback_varlen_attn(
        named["q"],
        named["k"],
        named["v"],
        named["cu_seqlens_q"],
        None,
        named["seqused_k"],
        named["block_table"],
        named["softmax_scale"],
        named["causal"],
        tuple(named["window_size"]),
        0.0,
        s_aux=named["s_aux"],
    )
    exact = ad.attention(layer, "reference", **sinks)
    cache = exact.allocate(8)
    for name, side in (("key", call.key), ("value", call.value)):
        cache.arrays[name][...] = (
            side.permute(0, 2, 1, 3).contiguous().view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        )
    nothing = np.full(BATCH.num_tokens, -1)
    reads = ad.AttentionMetadata.build(BATCH.query_lens, BATCH.seq_lens, BATCH.block_table, 64, slot_mapping=nothing)
    expected = exact.run(exact.plan(reads), call.q, cache=cache)
    idle = call.batch.idle.flatten()
    assert idle.nonzero().flatten().tolist() == [10, 11]
    assert (attended.float() - expected.float())[~idle].abs().max() < 0.03


def test_a_whole_pass_of_the_vendors_own_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing, attending and clearing, in host memory: with what the wheel takes where a kernel is missing."""
    needs("vllm_xpu_kernels")
    from vllm_xpu_kernels.flash_attn_interface import _fallback_varlen_attn

    from attn_dispatch_ipex import vllm_xpu_call

    class Interface:
        @staticmethod
        def flash_attn_varlen_func(**named: Any) -> None:
            names = ("q", "k", "v", "cu_seqlens_q", "seqused_k", "block_table", "softmax_scale", "causal")
            q, k, v, start, lens, table, scale, causal = (named[name] for name in names)
            window, sinks = tuple(named["window_size"]), named["s_aux"]
            attended, _ = _fallback_varlen_attn(
                q, k, v, start, None, lens, table, scale, causal, window, 0.0, s_aux=sinks
            )
            named["out"].copy_(attended)

    monkeypatch.setattr(vllm_xpu_call, "_interface", Interface)
    backend: Any = registry().load(VLLM)
    monkeypatch.setattr(type(backend), "device_type", "cpu")
    layer = spec(sinks=True, window=(30, 0))
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    generator = torch.Generator().manual_seed(1)
    prompt = ad.AttentionMetadata.build([69, 96], [69, 96], [[3, 1], [0, 7]], 64)
    steps = [
        (batch, [torch.randn(batch.num_tokens, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2)])
        for batch in (prompt, BATCH)
    ]
    outs, stored = [], []
    for attn in (ad.Attention(layer, backend, LayerParameters(layer, sinks=sinks)),
                 ad.attention(layer, "reference", sinks=sinks)):  # fmt: skip
        cache = attn.allocate(8)
        for batch, (q, k, v) in steps:
            out = attn.run(attn.plan(batch), q, k, v, cache)
        outs.append(out.float())
        stored.append([np.asarray(torch.as_tensor(np.asarray(x, np.float32)) if not torch.is_tensor(x) else x.float())
                       for x in cache.gather(range(8))])  # fmt: skip
    assert (outs[0] - outs[1]).abs().max() < 0.03
    assert not outs[0][10:12].any()
    for ours, exact in zip(*stored, strict=True):
        np.testing.assert_array_equal(ours, exact)


@pytest.mark.parametrize(
    ("name", "fields", "refused"),
    [
        (IPEX, {}, []),
        (VLLM, {}, []),
        (IPEX, {"dtype": "float32"}, ["dtype"]),
        (VLLM, {"dtype": "float32"}, ["dtype"]),
        (IPEX, {"block_size": 32}, ["block_size"]),
        (VLLM, {"block_size": 48}, ["block_size"]),
        (VLLM, {"block_size": 32}, []),
        (IPEX, {"logits_soft_cap": 5.0}, []),
        (VLLM, {"logits_soft_cap": 5.0}, ["logits_soft_cap"]),
        (IPEX, {"sinks": True}, ["sinks"]),
        (VLLM, {"sinks": True}, []),
        (IPEX, {"alibi": True}, ["alibi"]),
        (VLLM, {"alibi": True}, ["alibi"]),
        (IPEX, {"window": (0, 0)}, ["window"]),
        (VLLM, {"window": (0, 0)}, ["window"]),
        (IPEX, {"head_size": 512}, ["head_size"]),
        (VLLM, {"head_size": 80}, ["head_size"]),
        (IPEX, {"kv_cache_dtype": "float8_e5m2"}, ["kv_cache_dtype"]),
        (VLLM, {"kv_cache_dtype": "float8_e4m3fn"}, ["kv_cache_dtype"]),
        (IPEX, {"returns_lse": True}, ["returns_lse"]),
        (VLLM, {"returns_lse": True}, ["returns_lse"]),
        (IPEX, {"kind": "encoder"}, ["kind"]),
        (VLLM, {"value_head_size": 128}, ["value_head_size"]),
    ],
)
def test_verdicts(name: str, fields: dict[str, Any], refused: list[str]) -> None:
    backend: Backend = registry().load(name)
    verdict = backend.verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused
    if verdict:
        assert "never run on an Intel GPU" in verdict.note
