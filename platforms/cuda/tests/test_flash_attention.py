"""FlashAttention without a GPU: verdicts beside the vendors' real packages, and calls against their sources."""

from __future__ import annotations

import re
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.conformance.interface import signature
from attn_dispatch.contract import LayerParameters
from attn_dispatch.errors import BackendLoadError
from attn_dispatch_cuda.flash_attention import FlashAttentionBackend
from attn_dispatch_cuda.flash_attention_call import FUNCTIONS, FlashBatch, Functions
from attn_dispatch_cuda.flash_versions import Installed, installed
from platforms.cuda.evidence.stubs import operator_schema

from .conftest import MakeMachine, real

# A decode, a prompt, a chunk, padding, and a sequence that waits.
BATCH = ad.AttentionMetadata.build(
    query_lens=[1, 9, 40, 3, 0],
    seq_lens=[70, 9, 300, 0, 5],
    block_tables=[[3], [5], [0, 7], [], [2]],
    block_size=256,
)
DECODES = ad.AttentionMetadata.build([1, 1], [70, 9], [[3], [5]], block_size=256)


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": "bfloat16", "block_size": 256}
    return ad.AttentionSpec(**(plain | fields))


CPU = torch.device("cpu")
FA2, FA3, FA4 = "flash-attn", "fa3-fwd", "flash-attn-4"
H200, B200, A100, RTX, T4 = "NVIDIA H200", "NVIDIA B200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 5090", "Tesla T4"


@pytest.mark.parametrize(
    ("packages", "model", "fields", "refused"),
    [
        ((FA2,), A100, {}, []),
        ((FA2,), H200, {}, []),
        ((FA2,), RTX, {}, []),
        ((FA2,), T4, {}, [""]),
        ((FA2,), A100, {"block_size": 32}, ["block_size"]),
        ((FA2,), A100, {"block_size": 512}, []),
        ((FA2,), A100, {"alibi": True, "logits_soft_cap": 9.0, "sinks": True, "window": (9, 0)}, []),
        ((FA2,), A100, {"returns_lse": True, "kind": "encoder", "window": (9, 3)}, []),
        ((FA2,), A100, {"kind": "cross"}, []),
        ((FA2,), A100, {"dtype": "float32"}, ["dtype"]),
        ((FA2,), A100, {"dtype": "float16"}, []),
        ((FA2,), A100, {"kv_cache_dtype": "float8_e4m3fn"}, ["kv_cache_dtype"]),
        ((FA2,), A100, {"head_size": 100}, ["head_size", "value_head_size"]),
        ((FA2,), A100, {"head_size": 264}, ["head_size"]),
        ((FA2,), A100, {"value_head_size": 64}, ["value_head_size"]),
        ((FA3,), H200, {}, ["block_size"]),  # built without paged caches
        ((FA3,), H200, {"window": (9, 0), "dtype": "float16"}, ["block_size", "window", "dtype"]),
        ((FA2, FA3), H200, {}, []),
        ((FA4,), H200, {"block_size": 32}, []),
        ((FA4,), B200, {"block_size": 32, "sinks": True, "window": (9, 0), "logits_soft_cap": 3.0}, []),
        ((FA4,), H200, {"alibi": True}, ["alibi"]),
        ((FA4, FA2), H200, {"alibi": True}, []),
        ((FA4,), A100, {}, [""]),
        ((FA4,), RTX, {}, [""]),
        ((FA4,), B200, {"head_size": 192, "value_head_size": 128}, []),
        ((FA4,), B200, {"head_size": 192}, ["head_size"]),
        ((FA4,), B200, {"head_size": 256}, []),
        ((FA4,), H200, {"head_size": 192}, []),
        ((FA4,), H200, {"head_size": 64, "value_head_size": 256}, []),
        ((FA4,), H200, {"kv_cache_dtype": "float8_e4m3fn"}, ["kv_cache_dtype"]),
        ((), H200, {}, [""]),
    ],
    ids=str,
)
def test_verdicts(
    machine: MakeMachine, packages: tuple[str, ...], model: str, fields: dict[str, Any], refused: list[str]
) -> None:
    """On a machine with that GPU and the vendors' real packages."""
    verdict = FlashAttentionBackend("x/flash", machine(model, packages=packages)).verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused
    for refusal in verdict.refusals:
        assert refusal.accepts
        assert refusal.remedy
    if verdict:
        assert "never run on a GPU" in verdict.note


def test_the_fastest_that_fits_is_chosen(machine: MakeMachine) -> None:
    both = (FA2, FA4)
    assert "FlashAttention 4" in FlashAttentionBackend("x/y", machine(H200, packages=both)).verdict(spec()).note
    assert "FlashAttention 2 " in FlashAttentionBackend("x/y", machine(RTX, packages=both)).verdict(spec()).note


def test_the_early_flash_attention_4_in_flash_attns_own_package_is_not_taken_for_one(machine: MakeMachine) -> None:
    """flash-attn 2.8.3 installs `flash_attn.cute`, whose functions do not take what 4 is given."""
    there = machine(H200, packages=(FA2,))
    assert (there.packages.folders("flash_attn")[0] / "cute" / "interface.py").exists()
    assert [one.kind for one in installed(there)] == ["fa2"]
    for packages in ((FA2, FA4), (FA4,)):
        assert "fa4" in [one.kind for one in installed(machine(H200, packages=packages))]


def test_gpus_of_two_kinds_must_both_be_served(machine: MakeMachine) -> None:
    mixed = machine(H200, A100, packages=(FA4,))
    assert not FlashAttentionBackend("x/y", mixed).verdict(spec())
    assert FlashAttentionBackend("x/y", machine(H200, A100, packages=(FA4, FA2))).verdict(spec())


def test_what_a_build_lacks_is_read_from_its_file(machine: MakeMachine) -> None:
    (found,) = installed(machine(H200, packages=(FA3,)))
    assert {"PAGEDKV", "LOCAL", "FP16"} <= found.lacks
    assert not {"SOFTCAP", "VARLEN"} & found.lacks
    verdict = FlashAttentionBackend("x/y", machine(H200, packages=(FA3,))).verdict(spec())
    assert "built without paged caches" in str(verdict)
    assert "FLASHATTENTION_DISABLE_PAGEDKV" in str(verdict)


@pytest.mark.parametrize(
    ("models", "packages", "torch_build", "words"),
    [
        ((), (FA2,), "13.0", ("no NVIDIA GPU",)),
        ((H200,), (FA2,), "", ("torch is not installed",)),
        ((H200,), (FA2,), "cpu", ("cpu build", "H200")),
        ((H200,), (), "13.0", ("no FlashAttention is installed",)),
        (("NVIDIA Something New",), (FA2,), "13.0", ("compute capability", "Something New")),
        ((T4,), (FA2,), "13.0", ("sm_75",)),
        ((H200,), (FA3,), "13.0", ("without paged caches",)),
    ],
    ids=str,
)
def test_what_is_missing_is_said(
    machine: MakeMachine, models: tuple[str, ...], packages: tuple[str, ...], torch_build: str, words: tuple[str, ...]
) -> None:
    found = FlashAttentionBackend("x/y", machine(*models, packages=packages, torch=torch_build)).probe()
    assert not found
    assert all(word in found.reason for word in words), found.reason
    assert found.remedy or not models


def test_available(machine: MakeMachine) -> None:
    found = FlashAttentionBackend("x/y", machine(H200, packages=(FA2,))).probe()
    assert found, found.reason
    assert "FlashAttention 2 2.8.3" in found.version
    assert "never run" in found.reason


def test_a_version_that_does_not_import_leaves_the_choice_to_the_next(machine: MakeMachine, tmp_path: Path) -> None:
    """Built for another torch, or with a library missing: known when the backend is chosen, not when it first runs."""
    broken = tmp_path / "broken" / "flash_attn_interface.py"
    broken.parent.mkdir()
    source = real(FA2) / "hopper" / "flash_attn_interface.py"
    broken.write_text(f"raise ImportError('undefined symbol')\n{source.read_text()}")
    backend = FlashAttentionBackend("x/y", machine(H200, more=(broken.parent,)))
    assert backend.probe()
    with pytest.raises(BackendLoadError, match="does not import"):
        backend.import_vendor()
    FlashAttentionBackend("x/y", machine(H200)).import_vendor()  # nothing is installed, and the verdict says so


def test_the_capability_can_be_said(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = machine("NVIDIA Something New", packages=(FA2,))
    assert not FlashAttentionBackend("x/y", unknown).verdict(spec())
    monkeypatch.setenv("ATTN_DISPATCH_CUDA_CAPABILITY", "9.0")
    assert FlashAttentionBackend("x/y", unknown).verdict(spec())
    monkeypatch.setenv("ATTN_DISPATCH_CUDA_CAPABILITY", "nine")
    with pytest.raises(ValueError, match=r"as in ATTN_DISPATCH_CUDA_CAPABILITY=9\.0"):
        FlashAttentionBackend("x/y", unknown).verdict(spec())


def vllm_machine(machine: MakeMachine, tmp_path: Path) -> Any:
    """A machine with vLLM's file where the wheel has it (empty: nothing of it is read before it is loaded)."""
    library = tmp_path / "vllm-site" / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "vllm-site" / "vllm" / "__init__.py").touch()
    return machine(H200, more=(tmp_path / "vllm-site",))


@pytest.mark.parametrize(
    ("fields", "allow", "refused"),
    [
        ({"block_size": 16}, "0", []),
        ({"alibi": True}, "0", ["alibi"]),
        ({"head_size": 192, "value_head_size": 128}, "0", []),
        ({"head_size": 64, "value_head_size": 512}, "0", []),
        ({"head_size": 128, "value_head_size": 64}, "0", ["value_head_size"]),
        ({"kv_cache_dtype": "float8_e4m3fn"}, "0", ["kv_cache_dtype"]),
        ({"kv_cache_dtype": "float8_e4m3fn"}, "1", []),
        ({"kv_cache_dtype": "float8_e5m2"}, "1", ["kv_cache_dtype"]),
        ({"kv_cache_dtype": "float8_e4m3fn", "dtype": "float16"}, "1", ["dtype"]),
        ({"kv_cache_dtype": "float8_e4m3fn", "head_size": 72}, "1", ["head_size", "value_head_size"]),
        ({"sinks": True, "window": (5, 0), "returns_lse": True, "kind": "encoder"}, "0", []),
    ],
    ids=str,
)
def test_vllms_flash_attention_3(
    machine: MakeMachine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    allow: str,
    refused: list[str],
) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CUDA_FP8_QUERIES", allow)
    verdict = FlashAttentionBackend("x/y", vllm_machine(machine, tmp_path)).verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused


def device_call(
    functions: Functions, batch: ad.AttentionMetadata, layer: ad.AttentionSpec, *, lse: bool = False, **own: Any
) -> DeviceCall:
    """A call of a version's function for a batch, with its tensors in host memory."""
    plan = DevicePlan(spec=layer, view=batch.view(layer.kind))
    on_cpu = FlashBatch(plan, CPU, paged=layer.kind != "encoder", functions=functions, capability=(9, 0))
    if layer.alibi:
        own["alibi_slopes"] = np.ones(layer.num_heads, np.float32)
    if layer.sinks:
        own.setdefault("sinks", np.ones(layer.num_heads, np.float32))
    dtype = getattr(torch, layer.dtype)
    q, k = (torch.zeros(batch.num_tokens, n, layer.head_size, dtype=dtype) for n in (layer.num_heads, 2))
    cache = CacheTensors(FlashAttentionBackend("x/y").allocate(layer, 8, "cpu")) if on_cpu.paged else None
    return DeviceCall(on_cpu, q, k, k, cache, LayerTensors.of(LayerParameters(layer, **own), CPU), None, lse)


def arguments_of(
    kind: str, batch: ad.AttentionMetadata, layer: ad.AttentionSpec, *, lse: bool = False
) -> tuple[str, dict[str, Any]]:
    """What a version's function is given."""
    functions = FUNCTIONS[kind](Installed(kind, kind, "", Path()))
    if kind == "vllm-fa3":
        vars(functions)["module"] = vllm_operator(VLLM_0_33)
    return functions.arguments(device_call(functions, batch, layer, lse=lse))


ENCODED = ad.AttentionMetadata.build([5, 9], [5, 9])
SOURCES = {
    "fa2": (FA2, "flash_attn/flash_attn_interface.py"),
    "fa3": (FA2, "hopper/flash_attn_interface.py"),
    "fa3-fwd": (FA3, "fa3_fwd_interface.py"),
    "fa4": (FA4, "flash_attn/cute/interface.py"),
}
LAYERS: list[tuple[dict[str, Any], ad.AttentionMetadata]] = [
    ({}, BATCH),
    ({}, DECODES),
    ({"window": (30, 0), "logits_soft_cap": 20.0}, BATCH),
    ({"causal": False, "window": (30, 5)}, BATCH),
    ({"kind": "encoder"}, ENCODED),
]


@pytest.mark.interface
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("fields", "batch"), LAYERS, ids=str)
def test_the_vendors_functions_take_these_arguments(
    source: str, fields: dict[str, Any], batch: ad.AttentionMetadata
) -> None:
    package, file = SOURCES[source]
    kind = source.removesuffix("-fwd")
    layer = spec(**fields)
    lse = not (source == "fa3" and layer.kind == "encoder")  # refused there: see the verdict
    name, arguments = arguments_of(kind, batch, layer, lse=lse)
    vendor = signature(real(package) / file, name)
    bound = vendor.bind(**arguments).arguments
    assert bound["causal"] is layer.causal
    assert bound["softmax_scale"] == layer.scale
    assert bound["softcap"] == (layer.logits_soft_cap or 0.0)
    no_side = None if kind == "fa4" else -1
    assert bound["window_size"] == tuple(no_side if side < 0 else side for side in layer.window)
    for start in ("cu_seqlens_q", "cu_seqlens_k"):
        if bound.get(start) is not None:
            assert bound[start].dtype == torch.int32
            assert bound[start].is_contiguous()


@pytest.mark.interface
def test_a_call_says_what_the_batch_is() -> None:
    """The decode, the prompt and the chunk as they are; padding attends to something, and is overwritten."""
    _, arguments = arguments_of("fa4", BATCH, spec())
    assert arguments["cu_seqlens_q"].tolist() == [0, 1, 10, 50, 53]
    assert arguments["seqused_k"].tolist() == [70, 9, 300, 3]
    assert arguments["page_table"].tolist() == [[3, 0], [5, 0], [0, 7], [0, 0]]
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (40, 300)
    _, arguments = arguments_of("fa2", BATCH, spec())
    assert arguments["cu_seqlens_k"].tolist() == [0, 70, 79, 379, 382]
    name, arguments = arguments_of("fa2", DECODES, spec(alibi=True))
    assert name == "flash_attn_with_kvcache"
    assert arguments["q"].shape == (2, 1, 8, 128)
    assert arguments["alibi_slopes"].shape == (8,)


def test_a_flash_attention_3_that_gives_no_lse_outside_of_a_cache_is_asked_for_none(
    machine: MakeMachine, tmp_path: Path
) -> None:
    """The interface in flash-attn's own sources (installed by its setup as one module), and fa3-fwd's newer one."""
    site = tmp_path / "fa3-site"
    site.mkdir()
    (site / "flash_attn_interface.py").write_text((real(FA2) / "hopper" / "flash_attn_interface.py").read_text())
    backend = FlashAttentionBackend("x/y", machine(H200, more=(site,)))
    assert backend.verdict(spec(kind="encoder"))
    assert [r.field for r in backend.verdict(spec(kind="encoder", returns_lse=True)).refusals] == ["returns_lse"]
    assert backend.verdict(spec(returns_lse=True))
    (found,) = installed(machine(H200, packages=(FA3,)))
    assert "VARLEN_LSE" not in found.lacks


@pytest.mark.interface
def test_flash_attention_3_registers_this_operator() -> None:
    """Of fa3-fwd's compiled library: the operator behind both interfaces."""
    (library,) = (real(FA3) / "fa3_fwd").glob("_C*.so")
    (schema,) = {text.decode() for text in re.findall(rb"fwd\(Tensor q,[ -~]{200,}", library.read_bytes())}
    for part in ("Tensor? page_table", "Tensor? seqused_k", "Tensor? q_descale", "float softcap", "int num_splits"):
        assert part in schema


VLLM_0_33 = (
    "(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
    "bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, "
    "Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
)
"""The operator's arguments, by vLLM 0.33.0's wheel."""


def vllm_operator(schema: str, run: Any = None) -> Any:
    """An operator of torch's with this schema, in a library of its own; `run` computes it on the CPU."""
    name = f"vllm_fa3_{next(_libraries)}"
    library = torch.library.Library(name, "DEF")
    library.define(f"fwd{schema}")
    if run is not None:
        library.impl("fwd", run, "CPU")
    _kept.append(library)
    return getattr(torch.ops, name)


_libraries, _kept = count(), []  # type: ignore[var-annotated]


@pytest.mark.interface
def test_the_operator_in_vllms_wheel() -> None:
    """The schema in the library, which is one file of the wheel."""
    assert operator_schema(real("vllm") / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so") == f"fwd{VLLM_0_33}"


def names_in(schema: str) -> list[str]:
    inside = schema.partition("(")[2].rpartition(") ->")[0]
    return [part.split()[-1].partition("=")[0] for part in inside.split(",")]


def test_vllms_operator_is_given_its_arguments_by_name() -> None:
    name, arguments = arguments_of("vllm-fa3", BATCH, spec(sinks=True))
    assert name == "fwd"
    assert set(arguments) == set(names_in(VLLM_0_33))
    assert len(arguments) == 37
    assert arguments["s_aux"].dtype == torch.bfloat16
    assert (arguments["cu_seqlens_k"], arguments["out"]) == (None, None)
    assert (arguments["is_rotary_interleaved"], arguments["num_splits"], arguments["cp_world_size"]) == (True, 0, 1)
    _, arguments = arguments_of("vllm-fa3", ENCODED, spec(kind="encoder"))
    assert (arguments["page_table"], arguments["seqused_k"]) == (None, None)
    assert arguments["cu_seqlens_k"].tolist() == [0, 5, 14]


OLDER = VLLM_0_33.replace(", Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k", "")
NEWER = VLLM_0_33.replace("Tensor? cp_tot_seqused_k", "Tensor? cp_tot_seqused_k, Tensor? mask=None, int tile=64")
ORDERED = VLLM_0_33.replace("Tensor? page_table, Tensor? kv_batch_idx", "Tensor? kv_batch_idx, Tensor? page_table")


@pytest.mark.parametrize("schema", [VLLM_0_33, OLDER, NEWER, ORDERED], ids=["0.33", "older", "newer", "reordered"])
def test_an_operator_of_another_vllm_is_called_by_what_it_says_that_it_takes(schema: str) -> None:
    """An operator of torch's own, with that schema: the dispatcher refuses what does not fit it."""
    seen: dict[str, Any] = {}

    def run(*args: Any) -> list[torch.Tensor]:
        seen.update(zip(names_in(schema), args, strict=False))  # defaults at the end are left out
        return [torch.zeros_like(args[0]), args[0].new_zeros(args[0].shape[1], len(args[0]), dtype=torch.float32)]

    functions = FUNCTIONS["vllm-fa3"](Installed("vllm-fa3", "FlashAttention 3 of the vLLM wheel", "0.1", Path()))
    vars(functions)["module"] = vllm_operator(schema, run)
    call = device_call(functions, BATCH, spec(sinks=True), lse=True)
    out, lse = functions.attend(call)
    assert (tuple(out.shape), tuple(lse.shape)) == ((53, 8, 128), (53, 8))  # type: ignore[union-attr]
    assert torch.equal(seen["page_table"], call.batch.tables)
    assert torch.equal(seen["seqused_k"], call.batch.lens)
    assert (seen["is_causal"], seen["max_seqlen_k"], seen["kv_batch_idx"]) == (True, 300, None)
    # Where the operator takes no sinks, they are added to what it returns.
    assert functions.takes_sinks(call) is ("s_aux" in seen)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (VLLM_0_33.replace("int sm_margin", "int sm_margin, int fancy"), "wants fancy, which is not known here"),
        (VLLM_0_33.replace("Tensor? page_table, ", ""), "takes no page_table"),
    ],
)
def test_an_operator_that_cannot_be_called_rightly_is_refused_before_it_is(schema: str, words: str) -> None:
    functions = FUNCTIONS["vllm-fa3"](Installed("vllm-fa3", "FlashAttention 3 of the vLLM wheel", "0.1", Path()))
    vars(functions)["module"] = vllm_operator(schema)
    with pytest.raises(BackendLoadError, match=words):
        functions.attend(device_call(functions, BATCH, spec()))


@pytest.mark.parametrize("kind", ["fa3", "vllm-fa3"])
def test_rounded_queries_are_scaled_by_their_own_sequence(kind: str) -> None:
    """What padding holds, and who else is in the batch, changes nothing in another sequence's queries."""
    layer = spec(kv_cache_dtype="float8_e4m3fn")
    functions = FUNCTIONS[kind](Installed(kind, kind, "", Path()))
    if kind == "vllm-fa3":
        vars(functions)["module"] = vllm_operator(VLLM_0_33)
    torch.manual_seed(0)
    rows = torch.randn(53, 8, 128).bfloat16()
    rows[10:50] *= 1000
    results = []
    for padding in (0.0, 1e30, torch.nan, torch.inf):
        call = device_call(functions, BATCH, layer)
        call.q = rows.clone()
        call.q[50:] = padding
        _, arguments = functions.arguments(call)
        results.append((arguments["q"][:50].float(), arguments["q_descale"]))
    for q, descale in results:
        assert torch.equal(q, results[0][0])
        assert torch.equal(descale[:3], results[0][1][:3])
        assert torch.isfinite(descale).all()
    descale = results[0][1]
    assert descale.shape == (4, 2)
    for s, (a, b) in enumerate([(0, 1), (1, 10), (10, 50)]):
        assert descale[s, 0].item() == pytest.approx(rows[a:b].abs().max().item() / 448, rel=1e-6)
        torch.testing.assert_close(
            results[0][0][a:b] * descale[s, 0], rows[a:b].float(), rtol=2**-4, atol=1e-2 * 1000 ** (s == 2)
        )
    call = device_call(functions, BATCH, layer)
    call.q = rows.clone()
    call.q[3] = torch.nan  # in the second sequence
    _, arguments = functions.arguments(call)
    assert [bool(x) for x in torch.isnan(arguments["q_descale"][:, 0])] == [False, True, False, False]
    assert torch.equal(arguments["q"][10:50].float(), results[0][0][10:50])


@pytest.mark.interface
@pytest.mark.parametrize("kind", ["fa2", "fa3", "vllm-fa3"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"window": (30, 0)}, {"window": (0, 0)}, {"logits_soft_cap": 2.0}, {"causal": False, "window": (20, 5)}],
    ids=str,
)
def test_the_vendor_means_by_these_arguments_what_the_contract_does(
    monkeypatch: pytest.MonkeyPatch, kind: str, fields: dict[str, Any]
) -> None:
    """The vendor's own tests compute in plain PyTorch what windows, caps and causality mean."""
    pytest.importorskip("einops", reason="not run: einops is not installed")
    monkeypatch.syspath_prepend(str(real(FA2) / "hopper"))
    monkeypatch.delitem(sys.modules, "test_util", raising=False)
    import test_util

    layer = spec(dtype="float32", writes_kv=False, **fields)
    batch = ad.AttentionMetadata.build([1, 9, 40], [70, 9, 300], [[3], [5], [0, 7]], block_size=256)
    _, arguments = arguments_of(kind, batch, layer)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((50, 8, 128)).astype(np.float32)
    key, value = (rng.standard_normal((8, 256, 2, 128)).astype(np.float32) for _ in range(2))
    exact = ad.attention(layer, "reference")
    cache = exact.allocate(8)
    cache.arrays["key"][...], cache.arrays["value"][...] = (side.transpose(0, 2, 1, 3) for side in (key, value))
    expected = exact.run(exact.plan(batch), q, cache=cache)
    window = arguments.get("window_size") or (arguments["window_size_left"], arguments["window_size_right"])
    causal = arguments["causal"] if "causal" in arguments else arguments["is_causal"]
    tables = arguments.get("block_table") if kind == "fa2" else arguments["page_table"]
    lens = (
        np.diff(arguments["cu_seqlens_k"])
        if kind == "fa2"
        else arguments.get("cache_seqlens", arguments.get("seqused_k"))
    )
    for s, (length, table) in enumerate(zip(lens.tolist(), tables.tolist(), strict=True)):
        rows = slice(*arguments["cu_seqlens_q"][s : s + 2].tolist())
        keys, values = (torch.from_numpy(side[table].reshape(-1, 2, 128)[None, :length]) for side in (key, value))
        found, _ = test_util.attention_ref(
            torch.from_numpy(q[None, rows]),
            keys,
            values,
            causal=causal,
            window_size=window,
            softcap=arguments["softcap"],
        )
        assert np.abs(found[0].numpy() - expected[rows]).max() < 1e-5
