"""The XPU backends' calls, held against the vendors' real packages. None of their kernels runs without an Intel GPU."""

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
from attn_dispatch.contract import LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import registry

torch = pytest.importorskip("torch", reason="not run: needs torch")

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


def prepared(name: str, layer: ad.AttentionSpec) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return backend, plan, the plan's tensors, q of the rows that attend, and a filled NHD cache (host memory)."""
    backend: Any = registry().load(name)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(8, 64, 2, 64, generator=generator).bfloat16() for _ in range(2))
    plan = backend.plan(layer, BATCH)
    at = plan.on("cpu")
    q = torch.randn(BATCH.num_tokens, 4, 64, generator=generator).bfloat16()
    return backend, plan, at, q, key, value


def names_in(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_ipex_takes_these_arguments() -> None:
    """The front end is one class for both builds, and this is the CPU build's: names and order, not kernels."""
    needs("intel_extension_for_pytorch")
    import intel_extension_for_pytorch as ipex

    backend, plan, at, q, key, value = prepared(IPEX, spec(window=(30, 0), logits_soft_cap=20.0))
    op = ipex.llm.modules.PagedAttention.flash_attn_varlen_func
    picked = q.index_select(0, at.rows)
    positional, named = backend.attend_arguments(plan, at, picked, key, value, picked.clone())
    bound = inspect.signature(op).bind(*positional, **named).arguments
    assert bound["cu_seqlens_q"].tolist() == [0, 1, 10, 14, 15]
    assert bound["cu_seqlens_kv"].tolist() == [0, 70, 79, 179, 182]
    assert (bound["max_seqlen_q"], bound["max_seqlen_kv"], bound["scale"]) == (9, 100, 0.125)
    assert bound["block_tables"].tolist() == [[3, 1], [5, 0], [0, 7], [2, 0]]
    assert (bound["window_size_left"], bound["window_size_right"], bound["softcap"]) == (30, 0, 20.0)
    assert bound["is_cusal"] is True
    assert all(bound[name].is_contiguous() for name in ("cu_seqlens_q", "cu_seqlens_kv", "block_tables"))

    write = inspect.signature(ipex.llm.modules.PagedAttention.reshape_and_cache_flash)
    written = write.bind(*backend.write_arguments(q, q, key, value, at.slots)).arguments
    assert written["slot_mapping"] is at.slots
    assert (at.slots >= 0).all()


def test_vllm_takes_these_arguments() -> None:
    needs("vllm_xpu_kernels")
    from vllm_xpu_kernels.flash_attn_interface import flash_attn_varlen_func

    backend, plan, at, q, key, value = prepared(VLLM, spec(sinks=True))
    layer = LayerParameters(plan.spec, sinks=np.ones(4, np.float32))
    arguments = backend.attend_arguments(plan, at, q, key, value, layer, q)
    bound = inspect.signature(flash_attn_varlen_func).bind(**arguments).arguments
    assert bound["seqused_k"].tolist() == [70, 9, 100, 3]
    assert bound["s_aux"].dtype == q.dtype


def schemas(library: str) -> Iterator[str]:
    """Return the schemas of operators that a library of the wheel registers."""
    found = find_spec("vllm_xpu_kernels")
    assert found is not None
    assert found.submodule_search_locations is not None
    content = (Path(found.submodule_search_locations[0]) / library).read_bytes()
    for text in re.findall(rb"[a-z_0-9]+\(Tensor[ -~]{20,}\) -> [ -~]+", content):
        yield " ".join(text.decode().split())


def test_vllm_registers_these_ops() -> None:
    """The two ops that are called, as the compiled libraries declare them."""
    needs("vllm_xpu_kernels")
    (attend,) = {s for s in schemas("_vllm_fa2_C.abi3.so") if s.startswith("varlen_fwd(")}
    for part in ("Tensor!? out", "Tensor? seqused_k", "Tensor? block_table", "Tensor? softmax_sink", "bool is_causal"):
        assert part in attend
    (write,) = {s for s in schemas("_C.abi3.so") if s.startswith("reshape_and_cache_flash(")}
    assert write == (
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, "
        "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
    )
    backend: Any = registry().load(VLLM)
    given = backend.write_arguments(*[torch.zeros(1)] * 5, torch.ones(()))
    kinds = [part.strip().split(" ")[0].rstrip("!") for part in write.partition("(")[2].partition(")")[0].split(",")]
    assert ["Tensor" if isinstance(x, torch.Tensor) else type(x).__name__ for x in given] == kinds


@pytest.mark.parametrize(
    "fields",
    [{}, {"window": (30, 0)}, {"causal": False}, {"causal": False, "window": (20, 5)}, {"sinks": True}, {"scale": 0.3}],
    ids=str,
)
def test_vllm_means_by_these_arguments_what_the_contract_does(fields: dict[str, Any]) -> None:
    """The wheel's own fallback in PyTorch, which it takes where a kernel is missing, says what its arguments mean."""
    needs("vllm_xpu_kernels")
    from vllm_xpu_kernels.flash_attn_interface import _fallback_varlen_attn

    layer = spec(**fields)
    backend, plan, at, q, key, value = prepared(VLLM, layer)
    sinks = {"sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32)} if layer.sinks else {}
    parameters = LayerParameters(layer, **sinks)
    given = backend.attend_arguments(plan, at, q.index_select(0, at.rows), key, value, parameters, q)
    found, _ = _fallback_varlen_attn(
        given["q"],
        given["k"],
        given["v"],
        given["cu_seqlens_q"],
        None,
        given["seqused_k"],
        given["block_table"],
        given["softmax_scale"],
        given["causal"],
        tuple(given["window_size"]),
        0.0,
        s_aux=given["s_aux"],
    )
    exact = ad.attention(layer, "reference", **sinks)
    cache = exact.allocate(8)
    for name, side in (("key", key), ("value", value)):
        cache.arrays[name][...] = (
            side.permute(0, 2, 1, 3).contiguous().view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        )
    nothing = np.full(BATCH.num_tokens, -1)
    reads = ad.AttentionMetadata.build(BATCH.query_lens, BATCH.seq_lens, BATCH.block_table, 64, slot_mapping=nothing)
    expected = exact.run(exact.plan(reads), q, cache=cache)
    assert (found.float() - expected.index_select(0, at.rows).float()).abs().max() < 0.03
    assert at.idle.tolist() == [10, 11]


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
