"""AITER without a GPU: verdicts beside the real package, calls against its sources."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.errors import BackendRefusedError, CacheError
from attn_dispatch_rocm.aiter import AiterBackend
from attn_dispatch_rocm.aiter_call import FUNCTIONS, AiterBatch
from attn_dispatch_rocm.aiter_kernels import BATCH, DECODE, SIGNATURES, UNIFIED, find_installed
from platforms.rocm.evidence.stubs import HostAiter, fake_machine, stubbed

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
    assert batch_of(spec(**fields), metadata).kernel == kernel


def test_a_context_that_the_decode_kernel_is_not_compiled_for() -> None:
    long = 8 * 64 * 256 + 1
    table = [list(range(-(-long // 16)))]
    for tokens, kernel in ((long - 1, DECODE), (long, UNIFIED)):
        metadata = ad.AttentionMetadata.build([1], [tokens], table, 16)
        assert batch_of(spec(block_size=16), metadata).kernel == kernel
        fixed = ad.AttentionMetadata.build([1], [5], table, 16)
        assert batch_of(spec(block_size=16), fixed, max_seq_len=tokens).kernel == kernel


def test_a_spec_that_no_kernel_computes_is_refused_at_the_plan_too() -> None:
    with pytest.raises(BackendRefusedError, match=r"gfx942: .*block_size=48"):
        batch_of(spec(block_size=48, head_size=256), ad.AttentionMetadata.build([1], [1], [[0]], 48))


def batch_of(layer: ad.AttentionSpec, metadata: ad.AttentionMetadata, max_seq_len: int | None = None) -> AiterBatch:
    backend = HostAiter("x/y", fake_machine("gfx942", real("amd-aiter")))
    plan = DevicePlan(spec=layer, view=metadata.view(layer.kind), max_seq_len=max_seq_len)
    return backend.device_batch(plan, CPU, paged=layer.kind != "encoder")


def given(layer: ad.AttentionSpec, metadata: ad.AttentionMetadata, *, lse: bool = False) -> dict[str, Any]:
    """Return what the vendor's function is given, bound to its real signature, when a layer is run."""
    own: dict[str, Any] = {"alibi_slopes": np.ones(layer.num_heads)} if layer.alibi else {}
    own |= {"sinks": np.ones(layer.num_heads)} if layer.sinks else {}
    if layer.kv_cache_dtype.startswith("float8"):
        own |= {"k_scale": 0.5}
    attn = ad.attention(layer, HostAiter("x/y", fake_machine("gfx942", real("amd-aiter"))), **own)
    seen: list[dict[str, Any]] = []
    widths = ((layer.num_heads, layer.head_size), (layer.num_kv_heads, layer.head_size))
    widths += ((layer.num_kv_heads, layer.value_head_size),)
    q, k, v = (torch.zeros(metadata.num_tokens, *width, dtype=torch.bfloat16) for width in widths)
    with stubbed(real("amd-aiter"), before=lambda name, arguments: seen.append(arguments)):
        cache = attn.allocate(8) if layer.kind != "encoder" else None
        attn.run(attn.plan(metadata), q, k, v, cache, return_lse=lse)
    (arguments,) = seen
    return arguments


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
    found = given(spec(kind="encoder"), ad.AttentionMetadata.build([5, 9], [5, 9]))
    assert found["k"].shape == (14, 2, 128)
    assert found["kv_page_indices"].tolist() == [*range(14), *[0] * 256]


def test_slots_of_keys_in_a_fixed_plan() -> None:
    """Their number depends on the capacity alone: 2 sequences of at most 80 tokens, and two tiles."""
    layer = spec(returns_lse=True, block_size=16)
    batch = batch_of(layer, ad.AttentionMetadata.build([1, 1], [18, 3], [[3, 1], [5]], 16), max_seq_len=80)
    slots = batch.key_slots
    assert slots is not None
    assert slots.tolist()[:21] == [*range(48, 64), 16, 17, 80, 81, 82]
    assert slots.shape == (2 * 80 + 256,)
    later = ad.AttentionMetadata.build([1, 1], [80, 0], [[3, 1, 0, 2, 4], []], 16)
    batch.renew(batch.prepare(later.view("decoder")))
    expected = [*range(48, 64), *range(16, 32), *range(16), *range(32, 48), *range(64, 80), 0]
    assert slots.tolist()[:81] == expected
    assert not slots[81:].any()


@pytest.mark.parametrize(
    ("fields", "kernel"), [({}, DECODE), ({"sinks": True}, UNIFIED), ({"returns_lse": True}, BATCH)], ids=str
)
def test_fixed_plans(fields: dict[str, Any], kernel: str) -> None:
    """Renewed, they give what plans made for each batch give; addresses and shapes of arguments stay."""
    layer = spec(block_size=16, num_heads=4, num_kv_heads=2, head_size=64, **fields)
    own = {"sinks": np.ones(4, np.float32)} if layer.sinks else {}
    backend = HostAiter("x/y", fake_machine("gfx942", real("amd-aiter")))
    attn = ad.attention(layer, backend, **own)
    caches = [attn.allocate(16) for _ in range(2)]
    tables = [list(range(s * 5, s * 5 + 5)) for s in range(3)]

    def batch(lens: list[int]) -> ad.AttentionMetadata:
        used = [table[: -(-n // 16)] for table, n in zip(tables, lens, strict=True)]
        slots = [table[(n - 1) // 16] * 16 + (n - 1) % 16 if n else -1 for table, n in zip(tables, lens, strict=True)]
        return ad.AttentionMetadata.build([1] * 3, lens, used, 16, slot_mapping=slots)

    seen: list[tuple[str, dict[str, Any]]] = []
    fixed = backend.fixed_plan(layer, batch([20, 1, 70]), 80)
    torch.manual_seed(0)
    with stubbed(real("amd-aiter"), before=lambda *entered: seen.append(entered)):
        for lens in ([20, 1, 70], [21, 0, 71], [22, 5, 80], [0, 0, 0]):
            inputs = [torch.randn(3, n, 64, dtype=torch.bfloat16) for n in (4, 2, 2)]
            fixed.renew(batch(lens))
            one = attn.run(fixed, *inputs, caches[0])
            two = attn.run(attn.plan(batch(lens)), *inputs, caches[1])
            torch.testing.assert_close(one, two)
            assert torch.equal(caches[0].key, caches[1].key)
    of_fixed = [arguments for name, arguments in seen[::2] if name == kernel]
    assert len(of_fixed) == 4
    for name, first in of_fixed[0].items():
        if isinstance(first, torch.Tensor) and name not in ("q", "query", "out"):
            assert {(x[name].data_ptr(), x[name].shape) for x in of_fixed} == {(first.data_ptr(), first.shape)}, name
        elif not isinstance(first, torch.Tensor):
            assert {x[name] for x in of_fixed} == {first}, name


def test_what_the_batch_prefill_cannot_reach_is_refused() -> None:
    """With 2 key heads of 128, 2^31 elements are 8,388,607 slots; the plan is made, the run is refused."""
    cache = HostAiter("x/y").zeros((1,), "float32", None)  # never looked at
    for block, fits in ((131070, True), (131071, False), (2**30, False)):
        batch = batch_of(spec(returns_lse=True), ad.AttentionMetadata.build([1], [1], [[block]], 64))
        assert batch.kernel == BATCH
        if fits:
            FUNCTIONS[BATCH].check_reach(batch, cache)
        else:
            with pytest.raises(CacheError, match="here 8388607 slots"):
                FUNCTIONS[BATCH].check_reach(batch, cache)
    batch = batch_of(spec(), ad.AttentionMetadata.build([1], [1], [[2**30]], 64))
    assert batch.kernel == UNIFIED
    FUNCTIONS[UNIFIED].check_reach(batch, cache)


def test_a_run_that_does_not_reach_its_cache_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_dispatch_rocm import aiter_call

    layer = spec(returns_lse=True)
    backend = HostAiter("x/y", fake_machine("gfx942", real("amd-aiter")))
    attn = ad.attention(layer, backend)
    cache, rows = attn.allocate(4), [torch.ones(1, n, 128, dtype=torch.bfloat16) for n in (8, 2, 2)]
    batches = [ad.AttentionMetadata.build([1], [1], [[block]], 64) for block in (1, 3)]
    monkeypatch.setattr(aiter_call, "_INT32_MAX", 3 * 64 * 2 * 128)  # the first three blocks
    with stubbed(real("amd-aiter")):
        attn.run(attn.plan(batches[0]), *rows, cache)
        before = cache.key.clone()
        with pytest.raises(CacheError, match="reaches slot 255"):
            attn.run(attn.plan(batches[1]), *rows, cache)
        # A graph that is replayed may reach every block of the cache.
        with pytest.raises(CacheError, match="reaches slot 255"):
            attn.run(backend.fixed_plan(layer, batches[0], 64), *rows, cache)
        assert torch.equal(cache.key, before)
        small = attn.allocate(3)
        attn.run(backend.fixed_plan(layer, batches[0], 64), *rows, small)
        assert small.key.any()


@pytest.mark.interface
def test_another_release_is_refused_with_words(machine: MakeMachine, tmp_path: Path) -> None:
    """Its batch prefill is told pages instead of slots: what is called by the old meaning would read other keys."""
    other = tmp_path / "other"
    shutil.copytree(real("amd-aiter") / "aiter", other / "aiter")
    file = other / "aiter" / SIGNATURES[BATCH][0]
    text = file.read_text()
    at = text.index("def mha_batch_prefill_func(")
    file.write_text(text[:at] + text[at:].replace("    out=None,\n", "    out=None,\n    kv_last_page_lens=None,\n", 1))
    pretend = machine("gfx942")
    search = [str(root) for root in (pretend.packages.search or ())]
    found = replace(pretend, packages=Packages([*search, str(other)]))
    package = find_installed(found.packages)
    assert package is not None
    assert set(package.lacks) == {BATCH}
    backend = AiterBackend("x/y", found)
    assert backend.verdict(spec())  # unified_attention is the same
    for fields in ({"causal": False}, {"kind": "cross"}, {"returns_lse": True}):
        refused = str(backend.verdict(spec(**fields)))
        assert "mha_batch_prefill_func also takes kv_last_page_lens" in refused
        assert "pip install amd-aiter==0.1.7.post2.dev18" in refused
    less = tmp_path / "less"
    shutil.copytree(real("amd-aiter") / "aiter", less / "aiter")
    (less / "aiter" / SIGNATURES[UNIFIED][0]).unlink()
    without = AiterBackend("x/y", replace(pretend, packages=Packages([*search, str(less)])))
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
    assert FUNCTIONS.keys() == SIGNATURES.keys()
    assert all(function.name == name for name, function in FUNCTIONS.items())
