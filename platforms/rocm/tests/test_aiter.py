"""AITER without a GPU: verdicts beside the real package, calls against its sources."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.conformance import CASES
from attn_dispatch.contract import LayerParameters
from attn_dispatch.errors import BackendRefusedError, CacheError
from attn_dispatch_rocm.aiter import AiterBackend
from attn_dispatch_rocm.aiter_calls import CALLS
from attn_dispatch_rocm.aiter_kernels import BATCH, DECODE, FUNCTIONS, UNIFIED, installed
from attn_dispatch_rocm.layer import owned
from attn_dispatch_rocm.step import RocmPlan, Step
from platforms.rocm.evidence.signature_check import bound, checked, fitted, pretended

from .conftest import MakeMachine, real

AITER = ("amd-aiter",)
CPU = torch.device("cpu")

# A decode, a prompt, a chunk, padding, and a sequence that waits; and decodes alone.
BATCH_OF_ALL = ad.AttentionMetadata.build([1, 9, 40, 3, 0], [70, 9, 130, 0, 5], [[3, 1], [5], [0, 7, 6], [], [2]], 64)
DECODES = ad.AttentionMetadata.build([1, 1, 1], [30, 9, 0], [[3, 1], [5], []], 16)


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": "bfloat16", "block_size": 64}
    return ad.AttentionSpec(**(plain | fields))


@pytest.mark.parametrize(
    ("target", "fields", "refused"),
    [
        ("gfx942", {}, []),
        ("gfx90a", {}, []),
        ("gfx950", {"dtype": "float16"}, []),
        ("gfx1100", {}, [""]),
        ("gfx1201", {}, [""]),
        ("gfx942", {"block_size": 16}, []),
        ("gfx942", {"block_size": 48}, []),  # by the batch prefill, which is told slots
        ("gfx942", {"block_size": 256}, []),
        ("gfx942", {"block_size": 48, "head_size": 256}, ["block_size"]),
        ("gfx942", {"block_size": 48, "head_size": 192, "value_head_size": 128}, ["head_size"]),
        ("gfx942", {"head_size": 256}, []),
        ("gfx942", {"head_size": 264}, ["head_size"]),
        ("gfx942", {"head_size": 100}, []),
        ("gfx942", {"head_size": 8}, []),
        ("gfx942", {"value_head_size": 64}, []),
        ("gfx942", {"head_size": 192, "value_head_size": 128}, ["head_size"]),
        ("gfx942", {"dtype": "float32"}, ["dtype"]),
        ("gfx942", {"dtype": "float64"}, ["dtype"]),
        ("gfx942", {"kv_cache_dtype": "float8_e4m3fn"}, []),
        ("gfx950", {"kv_cache_dtype": "float8_e5m2"}, []),
        ("gfx90a", {"kv_cache_dtype": "float8_e4m3fn"}, ["kv_cache_dtype"]),
        ("gfx942", {"kv_cache_dtype": "int8"}, ["kv_cache_dtype"]),
        ("gfx942", {"kv_cache_dtype": "float16"}, ["kv_cache_dtype"]),
        ("gfx942", {"window": (9, 0), "logits_soft_cap": 3.0, "sinks": True}, []),
        ("gfx942", {"alibi": True}, []),
        ("gfx942", {"alibi": True, "sinks": True}, ["sinks"]),
        ("gfx942", {"alibi": True, "returns_lse": True}, ["alibi"]),
        ("gfx942", {"returns_lse": True}, []),
        ("gfx942", {"returns_lse": True, "head_size": 256}, ["head_size"]),
        ("gfx942", {"returns_lse": True, "sinks": True, "window": (9, 0)}, []),
        ("gfx942", {"causal": False}, []),
        ("gfx942", {"causal": False, "window": (9, 3)}, []),
        ("gfx942", {"causal": False, "alibi": True}, ["alibi"]),
        ("gfx942", {"kind": "encoder", "window": (9, 3)}, []),
        ("gfx942", {"kind": "encoder", "alibi": True}, ["alibi"]),
        ("gfx942", {"kind": "cross"}, []),
        ("gfx942", {"kind": "cross", "head_size": 256}, ["head_size"]),
        ("gfx942", {"num_heads": 256, "num_kv_heads": 1, "head_size": 256}, ["num_kv_heads"]),
        ("gfx942", {"scale": 0.3}, []),
        ("gfx942", {"writes_kv": False}, []),
    ],
    ids=str,
)
def test_verdicts(machine: MakeMachine, target: str, fields: dict[str, Any], refused: list[str]) -> None:
    """On a machine with that GPU and the real package."""
    verdict = AiterBackend("x/aiter", machine(target, packages=AITER)).verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused
    for refusal in verdict.refusals:
        assert refusal.accepts
        assert refusal.remedy
    if verdict:
        assert "never run on an AMD GPU" in verdict.note


def test_gpus_of_two_kinds_must_both_be_served(machine: MakeMachine) -> None:
    mixed = AiterBackend("x/y", machine("gfx942", "gfx1100", packages=AITER))
    assert not mixed.verdict(spec())
    assert AiterBackend("x/y", machine("gfx942", "gfx950", packages=AITER)).verdict(spec())
    only = AiterBackend("x/y", machine("gfx90a", "gfx942", packages=AITER))
    assert not only.verdict(spec(kv_cache_dtype="float8_e4m3fn"))


@pytest.mark.parametrize(
    ("fields", "metadata", "kernel"),
    [
        ({}, BATCH_OF_ALL, UNIFIED),
        ({"block_size": 16}, DECODES, DECODE),
        ({"block_size": 16, "window": (9, 0)}, DECODES, DECODE),
        ({"block_size": 16, "logits_soft_cap": 2.0}, DECODES, DECODE),
        ({"block_size": 16, "logits_soft_cap": 2.0, "window": (9, 0)}, DECODES, UNIFIED),
        ({"block_size": 16, "sinks": True}, DECODES, UNIFIED),
        ({"block_size": 16, "head_size": 96}, DECODES, UNIFIED),
        ({"block_size": 16, "num_heads": 64, "num_kv_heads": 2}, DECODES, UNIFIED),
        ({"block_size": 16, "returns_lse": True}, DECODES, BATCH),
        ({"returns_lse": True}, BATCH_OF_ALL, BATCH),
        ({"causal": False}, BATCH_OF_ALL, BATCH),
        ({"value_head_size": 64}, BATCH_OF_ALL, BATCH),
    ],
    ids=str,
)
def test_the_kernel_is_chosen_by_spec_and_batch(
    fields: dict[str, Any], metadata: ad.AttentionMetadata, kernel: str
) -> None:
    assert step_of(spec(**fields), metadata).call.function == kernel


def test_a_context_that_the_decode_kernel_is_not_compiled_for() -> None:
    backend = AiterBackend("x/y", pretended("gfx942", real("amd-aiter")))
    long = 8 * 64 * 256 + 1
    table = [list(range(-(-long // 16)))]
    layer = spec(block_size=16)
    for tokens, kernel in ((long - 1, DECODE), (long, UNIFIED)):
        metadata = ad.AttentionMetadata.build([1], [tokens], table, 16)
        step = backend.step(layer, RocmPlan(spec=layer, view=metadata.view("decoder")), CPU, paged=True)
        assert step.call.function == kernel


def test_a_spec_that_no_kernel_computes_is_refused_at_the_plan_too() -> None:
    with pytest.raises(BackendRefusedError, match=r"gfx942: .*block_size=48"):
        step_of(spec(block_size=48, head_size=256), ad.AttentionMetadata.build([1], [1], [[0]], 48))


def step_of(layer: ad.AttentionSpec, metadata: ad.AttentionMetadata) -> Step:
    backend = AiterBackend("x/y", pretended("gfx942", real("amd-aiter")))
    return backend.step(layer, RocmPlan(spec=layer, view=metadata.view(layer.kind)), CPU, paged=layer.kind != "encoder")


def given(layer: ad.AttentionSpec, metadata: ad.AttentionMetadata, *, lse: bool = False) -> dict[str, Any]:
    """Return what the vendor's function is given, bound to its real signature."""
    step = step_of(layer, metadata)
    own: dict[str, Any] = {"alibi_slopes": np.ones(layer.num_heads)} if layer.alibi else {}
    own |= {"sinks": np.ones(layer.num_heads)} if layer.sinks else {}
    if layer.kv_cache_dtype.startswith("float8"):
        own |= {"k_scale": 0.5}
    q = torch.zeros(metadata.num_tokens, layer.num_heads, layer.head_size, dtype=torch.bfloat16)
    stored = getattr(torch, layer.kv_cache_dtype)
    cache = [
        torch.zeros(8, layer.block_size, layer.num_kv_heads, n, dtype=stored)
        for n in (layer.head_size, layer.value_head_size)
    ]
    out = torch.empty(metadata.num_tokens, layer.num_heads, layer.value_head_size, dtype=torch.bfloat16)
    mine = owned(LayerParameters(layer, **own), CPU)
    arguments = step.call.arguments(step, q, *cache, mine, out, lse=lse)
    return dict(bound(step.call, real("amd-aiter")).bind(**arguments).arguments)


@pytest.mark.interface
def test_unified_attention_is_given() -> None:
    found = given(spec(window=(30, 0), logits_soft_cap=20.0, sinks=True), BATCH_OF_ALL)
    assert found["cu_seqlens_q"].tolist() == [0, 1, 10, 50, 53]
    assert found["seqused_k"].tolist() == [70, 9, 130, 3]
    assert found["block_table"].tolist() == [[3, 1, 0], [5, 0, 0], [0, 7, 6], [0, 0, 0]]
    assert (found["max_seqlen_q"], found["max_seqlen_k"], found["causal"]) == (40, 130, True)
    assert (found["window_size"], found["softcap"], found["sinks"].tolist()) == ((30, 0), 20.0, [1.0] * 8)
    assert (found["q_descale"], found["k_descale"], found["alibi_slopes"]) == (None, None, None)
    found = given(spec(kv_cache_dtype="float8_e4m3fn", alibi=True), BATCH_OF_ALL)
    assert (float(found["k_descale"]), float(found["v_descale"]), found["window_size"]) == (0.5, 1.0, (-1, -1))
    assert found["alibi_slopes"].dtype == torch.float32


@pytest.mark.interface
def test_paged_attention_v1_is_given() -> None:
    """A window of 10 tokens; the third sequence is padding and attends to a token of block 0."""
    found = given(spec(block_size=16, window=(9, 0)), DECODES)
    assert (found["sliding_window"], found["kv_cache_layout"], found["kv_cache_dtype"]) == (10, "NHD", "auto")
    assert found["context_lens"].tolist() == [30, 9, 1]
    assert found["block_tables"].tolist() == [[3, 1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]]
    assert (found["max_context_len"], found["partition_size"], found["mtp"]) == (30, 256, 1)
    # f32 sums and maxima of one partition, and outputs of two bytes.
    assert found["workspace_buffer"].numel() == 3 * 8 * (4 + 4 + 128 * 2)
    assert given(spec(block_size=16), DECODES)["sliding_window"] == 0
    assert given(spec(block_size=16, logits_soft_cap=5.0), DECODES)["logits_soft_cap"] == 5.0


@pytest.mark.interface
def test_mha_batch_prefill_is_given() -> None:
    layer = spec(causal=False, window=(20, 3), returns_lse=True)
    found = given(layer, BATCH_OF_ALL, lse=True)
    assert found["kv_indptr"].tolist() == [0, 70, 79, 209, 212]
    places = found["kv_page_indices"]
    assert places[:70].tolist() == [*range(192, 256), *range(64, 70)]
    assert places[70:79].tolist() == list(range(320, 329))
    assert places[79:209].tolist() == [*range(64), *range(448, 512), 384, 385]
    assert len(places) == 212 + 256
    assert found["k"].shape == (512, 2, 128)
    assert (found["causal"], found["window_size"], found["return_lse"]) == (False, (20, 3), True)
    assert "alibi_slopes" not in found
    encoded = ad.AttentionMetadata.build([5, 9], [5, 9])
    rows = torch.zeros(14, 2, 128, dtype=torch.bfloat16)
    step = step_of(spec(kind="encoder"), encoded)
    mine = owned(LayerParameters(spec(kind="encoder")), CPU)
    arguments = step.call.arguments(step, torch.zeros(14, 8, 128), rows, rows, mine, torch.empty(0), lse=False)
    assert arguments["k"] is rows
    assert arguments["kv_page_indices"][:14].tolist() == list(range(14))


def test_what_the_batch_prefill_cannot_reach_is_refused() -> None:
    """With 2 key heads of 128, 2^31 elements are 8,388,607 slots; the plan is made, the run is refused."""
    layer = spec(returns_lse=True)
    for block, fits in ((131070, True), (131071, False), (2**30, False)):
        step = step_of(layer, ad.AttentionMetadata.build([1], [1], [[block]], 64))
        assert step.call.function == BATCH
        if fits:
            step.call.check(step)
        else:
            with pytest.raises(CacheError, match="here 8388607 slots"):
                step.call.check(step)
    step = step_of(spec(), ad.AttentionMetadata.build([1], [1], [[2**30]], 64))
    assert step.call.function == UNIFIED
    step.call.check(step)


@pytest.mark.interface
def test_every_accepted_case_of_the_kit_binds() -> None:
    folder = real("amd-aiter")
    backend = AiterBackend("x/aiter", pretended("gfx942", folder))
    seen: dict[str, int] = {}
    for case in (fitted(case, page) for case in CASES for page in (16, 64)):
        if backend.verdict(case.spec):
            checked(backend, case, folder)
            layer = case.spec
            name = step_name(backend, case)
            seen[name] = seen.get(name, 0) + 1
            assert layer.dtype != "float32"
    assert seen.keys() == {UNIFIED, DECODE, BATCH}


def step_name(backend: AiterBackend, case: Any) -> str:
    from platforms.rocm.evidence.signature_check import prepared

    return prepared(backend, case)[0].call.function


@pytest.mark.interface
def test_another_release_is_refused_with_words(machine: MakeMachine, tmp_path: Path) -> None:
    """Its batch prefill is told pages instead of slots: what is called by the old meaning would read other keys."""
    other = tmp_path / "other"
    shutil.copytree(real("amd-aiter") / "aiter", other / "aiter")
    file = other / "aiter" / FUNCTIONS[BATCH][0]
    text = file.read_text()
    at = text.index("def mha_batch_prefill_func(")
    file.write_text(text[:at] + text[at:].replace("    out=None,\n", "    out=None,\n    kv_last_page_lens=None,\n", 1))
    pretend = machine("gfx942")
    found = type(pretend)(pretend.platform, [*pretend.search, str(other)])
    (one,) = [installed(found)]
    assert one is not None
    assert set(one.lacks) == {BATCH}
    backend = AiterBackend("x/y", found)
    assert backend.verdict(spec())  # unified_attention is the same
    for fields in ({"causal": False}, {"kind": "cross"}, {"returns_lse": True}):
        refused = str(backend.verdict(spec(**fields)))
        assert "mha_batch_prefill_func also takes kv_last_page_lens" in refused
        assert "pip install amd-aiter==0.1.7.post2.dev18" in refused
    less = tmp_path / "less"
    shutil.copytree(real("amd-aiter") / "aiter", less / "aiter")
    (less / "aiter" / FUNCTIONS[UNIFIED][0]).unlink()
    without = AiterBackend("x/y", type(pretend)(pretend.platform, [*pretend.search, str(less)]))
    assert without.verdict(spec())  # the batch prefill serves
    assert "unified_attention.py" in str(without.verdict(spec(head_size=256)))


@pytest.mark.parametrize(
    ("targets", "packages", "torch_build", "words", "remedy"),
    [
        ((), AITER, "hip = '6.4'", "no AMD GPU", ""),
        (("gfx942",), AITER, "", "torch is not installed", "ROCm build"),
        (("gfx942",), AITER, "cuda = '13.0'", "a cu130 build, the machine has AMD gfx942", "ROCm build"),
        (("gfx942",), AITER, "cuda = None", "a cpu build", "ROCm build"),
        (("gfx942",), (), "hip = '6.4'", "AITER is not installed", "pip install amd-aiter"),
        (("gfx1100",), AITER, "hip = '6.4'", "this is gfx1100", "triton/paged"),
    ],
    ids=str,
)
def test_what_is_missing_is_said(
    machine: MakeMachine, targets: tuple[str, ...], packages: tuple[str, ...], torch_build: str, words: str, remedy: str
) -> None:
    found = AiterBackend("x/y", machine(*targets, packages=packages, torch=torch_build)).probe()
    assert not found
    assert words in found.reason
    assert remedy in found.remedy


def test_available(machine: MakeMachine) -> None:
    found = AiterBackend("x/y", machine("gfx942", packages=AITER)).probe()
    assert found, found.reason
    assert "AITER 0.1.7.post2.dev18 on AMD gfx942" in found.reason


def test_a_rocm_build_on_a_machine_with_nvidias_gpus(machine: MakeMachine) -> None:
    files = {
        "dev/nvidia0": "",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: NVIDIA H200\nDevice Minor: 0\n",
    }
    here = machine(files=files)
    found = AiterBackend("x/y", here).probe()
    assert "for NVIDIA H200 install torch's CUDA build" in found.remedy
    (problem,) = [p for p in here.platform.facts["problems"] if "build" in p]
    assert "a rocm6.4 build and cannot use 1x NVIDIA H200: install torch's CUDA build" in problem


def test_the_target_can_be_said(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under WSL, Windows' driver tells no target."""
    wsl = machine(packages=AITER, files={"dev/dxg": "", "opt/rocm/lib/librocdxg.so": ""})
    backend = AiterBackend("x/y", wsl)
    assert wsl.platform.name == "rocm"
    assert "ATTN_DISPATCH_ROCM_TARGET" in backend.probe().remedy
    assert not backend.verdict(spec())
    monkeypatch.setenv("ATTN_DISPATCH_ROCM_TARGET", "gfx942")
    assert backend.probe()
    assert backend.verdict(spec())
    monkeypatch.setenv("ATTN_DISPATCH_ROCM_TARGET", "MI300X")
    with pytest.raises(ValueError, match="as in ATTN_DISPATCH_ROCM_TARGET=gfx942"):
        backend.verdict(spec())


def test_the_table_of_calls_is_whole() -> None:
    assert CALLS.keys() == FUNCTIONS.keys()
    assert all(call.function == name for name, call in CALLS.items())
