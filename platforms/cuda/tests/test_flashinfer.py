"""FlashInfer without a GPU: verdicts on machines that are not here, calls against the real package, parts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch_cuda.batch import cut, page_lists
from attn_dispatch_cuda.flashinfer import MIXED_VARIABLE, FlashInferBackend, against_one_kernel

from .conftest import MakeMachine

flashinfer = pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")

from attn_dispatch_cuda.flashinfer_step import (  # noqa: E402
    InferStep,
    decode_arguments,
    mixed_arguments,
    parts_of,
    prefill_arguments,
    ragged_arguments,
)
from attn_dispatch_cuda.flashinfer_wrappers import mixed_bytes  # noqa: E402

SITE = Path(flashinfer.__file__).parent.parent
BLOCK = 16
MIXED = ad.AttentionMetadata.build([1, 1, 9, 3], [40, 7, 9, 0], [[3, 1, 2], [5], [7], []], BLOCK,
                                   slot_mapping=[39, 86, *range(112, 121), -1, -1, -1])  # fmt: skip


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": "bfloat16", "block_size": BLOCK}
    return ad.AttentionSpec(**(plain | fields))


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({}, []),
        ({"head_size": 64, "block_size": 1, "dtype": "float16"}, []),
        ({"head_size": 256, "window": (9, 0), "logits_soft_cap": 3.0, "sinks": True, "returns_lse": True}, []),
        ({"kv_cache_dtype": "float8_e4m3fn"}, []),
        ({"kv_cache_dtype": "float8_e5m2", "dtype": "float16"}, []),
        ({"kind": "encoder"}, []),
        ({"kind": "cross"}, []),
        ({"writes_kv": False}, []),
        ({"causal": False, "window": (9, -1)}, []),
        ({"causal": False, "window": (9, 0)}, []),
        ({"causal": False, "window": (9, 4)}, ["window"]),
        ({"dtype": "float32"}, ["dtype"]),
        ({"kv_cache_dtype": "float16"}, ["kv_cache_dtype"]),
        ({"kv_cache_dtype": "int8"}, ["kv_cache_dtype"]),
        ({"head_size": 96}, ["head_size"]),
        ({"value_head_size": 64}, ["value_head_size"]),
        ({"alibi": True}, ["alibi"]),
    ],
    ids=str,
)
def test_verdicts(machine: MakeMachine, fields: dict[str, Any], refused: list[str]) -> None:
    verdict = FlashInferBackend("x/infer", machine("NVIDIA H200", more=(SITE,))).verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused
    assert all(refusal.accepts and refusal.remedy for refusal in verdict.refusals)
    if verdict:
        assert "never run on a GPU" in verdict.note


@pytest.mark.parametrize(
    ("models", "installed", "compiler", "words"),
    [
        ((), True, True, "no NVIDIA GPU"),
        (("NVIDIA H200",), False, True, "FlashInfer is not installed"),
        (("Tesla T4",), True, True, "sm_75"),
        (("NVIDIA H200",), True, False, "no kernels"),
        (("NVIDIA H200",), True, True, ""),
    ],
    ids=str,
)
def test_what_is_missing_is_said(
    machine: MakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    models: tuple[str, ...],
    installed: bool,
    compiler: bool,
    words: str,
) -> None:
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    for tool in ("nvcc", "ninja") if compiler else ():
        (home / "bin" / tool).touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PATH", str(home / "bin"))
    found = FlashInferBackend("x/infer", machine(*models, more=(SITE,) if installed else ())).probe()
    assert bool(found) is not bool(words), found.reason
    assert words in found.reason
    assert found.remedy or found or not models


def test_the_layout_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FlashInferBackend("x/infer")
    assert backend.layout(spec()).name == "NHD"
    monkeypatch.setenv("ATTN_DISPATCH_CUDA_FLASHINFER_LAYOUT", "HND")
    assert backend.layout(spec()).name == "HND"
    monkeypatch.setenv("ATTN_DISPATCH_CUDA_FLASHINFER_LAYOUT", "HDN")
    with pytest.raises(ValueError, match="not one of NHD, HND"):
        backend.layout(spec())


def lists(batch: ad.AttentionMetadata) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    found = cut(batch.view("decoder"), BLOCK, paged=True)
    csr = page_lists(found.lens, found.tables, BLOCK)
    named = {name: torch.from_numpy(getattr(csr, name)) for name in ("indptr", "indices", "last_page_len")}
    return torch.from_numpy(found.query_start), named


LAYERS: list[dict[str, Any]] = [
    {},
    {"window": (9, 0), "logits_soft_cap": 3.0, "scale": 0.3},
    {"causal": False, "window": (9, 0), "dtype": "float16"},
    {"kv_cache_dtype": "float8_e4m3fn"},
]


@pytest.mark.interface
@pytest.mark.parametrize("fields", LAYERS, ids=str)
def test_the_wrappers_take_these_plans(fields: dict[str, Any]) -> None:
    """Held against the functions of the installed package (whose decode wrapper hands on to `_plan_impl`)."""
    layer = spec(**fields)
    start, csr = lists(MIXED)
    positional, named = decode_arguments(layer, csr)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    bound = inspect.signature(decode._plan_impl).bind(None, *positional, **named).arguments
    inspect.signature(decode.plan).bind(None, *positional, **named)
    positional, named = prefill_arguments(layer, start, csr)
    prefill = inspect.signature(flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan).bind(None, *positional, **named)
    positional, named = ragged_arguments(layer, start, start)
    ragged = inspect.signature(flashinfer.BatchPrefillWithRaggedKVCacheWrapper.plan).bind(None, *positional, **named)
    for given in (bound, prefill.arguments, ragged.arguments):
        assert given["sm_scale"] == layer.scale
        assert given["window_left"] == layer.window[0]
        assert given["logits_soft_cap"] == (layer.logits_soft_cap or 0.0)
        assert given["q_data_type"] == getattr(torch, layer.dtype)
        assert (given["num_qo_heads"], given["num_kv_heads"]) == (8, 2)
    assert bound["kv_data_type"] == prefill.arguments["kv_data_type"] == getattr(torch, layer.kv_cache_dtype)
    assert (bound["page_size"], bound["head_dim"]) == (BLOCK, 128)
    assert prefill.arguments["causal"] is True
    assert ragged.arguments["kv_data_type"] == getattr(torch, layer.dtype)
    for name in ("indptr", "indices", "last_page_len"):
        assert csr[name].dtype == torch.int32
        assert not csr[name].is_cuda


@pytest.mark.interface
def test_the_wrappers_are_made_and_run_like_this() -> None:
    """Constructors, with the buffers of a fixed plan, and `run`."""
    decode, prefill = flashinfer.BatchDecodeWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper
    buffers = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
    inspect.signature(decode).bind(
        0, "NHD", use_cuda_graph=True, use_tensor_cores=True, backend="fa2", **dict.fromkeys(buffers)
    )
    buffers = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
    inspect.signature(prefill).bind(0, "HND", use_cuda_graph=True, backend="auto", **dict.fromkeys(buffers))
    inspect.signature(ragged).bind(0, "NHD", backend="auto")
    given = {"out": 0, "lse": 0, "return_lse": True}
    for wrapper in (decode, prefill):
        inspect.signature(wrapper.run).bind(None, 0, (0, 0), **given, k_scale=0.5, v_scale=0.5)
    inspect.signature(ragged.run).bind(None, 0, 0, 0, **given)
    append = inspect.signature(flashinfer.append_paged_kv_cache).bind(*range(8), "NHD").arguments
    assert list(append)[2:] == [
        "batch_indices", "positions", "paged_kv_cache", "kv_indices", "kv_indptr", "kv_last_page_len", "kv_layout"
    ]  # fmt: skip


@pytest.mark.interface
def test_the_vendors_log_sum_exp_is_of_base_2() -> None:
    """Of which the adapter makes a natural one: by the default of `run`, and by what the package says of it."""
    parameters = inspect.signature(flashinfer.BatchPrefillWithPagedKVCacheWrapper.run).parameters
    assert parameters["lse_base"].default == "log2"
    source = inspect.getsource(flashinfer.BatchPrefillWithPagedKVCacheWrapper.run)
    assert "max + log2(sum(exp2(" in inspect.getsource(flashinfer.BatchPrefillWithRaggedKVCacheWrapper.run)
    assert "_finish_lse" in source


@pytest.mark.interface
def test_sinks_would_be_dropped_by_the_vendors_own_argument() -> None:
    """The CUDA-core decode kernel takes `sinks` and does nothing with them: they are applied to the result instead."""
    source = inspect.getsource(flashinfer.BatchDecodeWithPagedKVCacheWrapper.run)
    last = source[source.rindex("self._cached_module.paged_run") :]
    assert "sinks" not in last
    assert not FlashInferBackend("x/infer").sinks_inside(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("new", "parts"),
    [
        ([], []),
        ([1, 1, 1], [("decode", 0, 3)]),
        ([4, 9], [("prefill", 0, 2)]),
        ([1, 1, 7, 3], [("decode", 0, 2), ("prefill", 2, 4)]),
        ([7, 1, 1], [("prefill", 0, 1), ("decode", 1, 3)]),
        ([1, 7, 1], [("prefill", 0, 3)]),
        ([0, 1, 0, 1], [("decode", 0, 2)]),
    ],
    ids=str,
)
def test_parts(new: list[int], parts: list[tuple[str, int, int]]) -> None:
    """Decodes by the one wrapper, the rest by the other, as long as each is one run of neighbours."""
    tables = [list(range(4 * s, 4 * s + 4)) for s in range(len(new))]
    batch = cut(ad.AttentionMetadata.build(new, [n + 2 for n in new], tables, BLOCK).view("decoder"), BLOCK, paged=True)
    found = parts_of(batch, fixed=False)
    assert [(part.kind, *part.sequences) for part in found] == parts
    for part in found:
        assert part.rows == tuple(batch.query_start[list(part.sequences)])
    assert len(parts_of(batch, fixed=True)) <= 1
    # By one kernel what has both, in any order; what has one kind stays with its wrapper, and fixed plans as they are.
    mixed = {count == 1 for count in new if count} == {True, False}
    whole = parts_of(batch, fixed=False, one_kernel=True)
    assert whole == ([type(whole[0])("mixed", (0, batch.num_seqs), (0, batch.num_tokens))] if mixed else found)
    assert parts_of(batch, fixed=True, one_kernel=True) == parts_of(batch, fixed=True)


@pytest.mark.parametrize(
    ("fields", "models", "words"),
    [
        ({}, ("NVIDIA H200",), ""),
        ({"head_size": 256, "logits_soft_cap": 3.0, "sinks": True}, ("NVIDIA A100",), ""),
        ({"kind": "cross"}, ("NVIDIA B200",), ""),
        ({"window": (9, 0)}, ("NVIDIA H200",), "no windows"),
        ({"causal": False, "window": (-1, 0)}, ("NVIDIA H200",), ""),
        ({"kv_cache_dtype": "float8_e4m3fn"}, ("NVIDIA H200",), "own type (bfloat16)"),
        ({"kind": "encoder"}, ("NVIDIA H200",), "reads pages"),
        ({}, ("NVIDIA H200", "NVIDIA L40S"), "sm_89's shared memory"),
        ({}, ("NVIDIA GeForce RTX 5090",), "sm_120's shared memory"),
    ],
    ids=str,
)
def test_mixed_batches_are_the_users_choice(
    machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], models: tuple[str, ...], words: str
) -> None:
    """By one kernel where it computes the layer; where it does not, the verdict says so."""
    layer, backend = spec(**fields), FlashInferBackend("x/infer", machine(*models, more=(SITE,)))
    against = against_one_kernel(layer, backend.machine.capabilities)
    assert words in against
    assert bool(words) is bool(against)
    assert "mixed" not in backend.verdict(layer).note
    monkeypatch.setenv(MIXED_VARIABLE, "two-wrappers")
    assert "mixed" not in backend.verdict(layer).note
    monkeypatch.setenv(MIXED_VARIABLE, "batch-attention")
    note = backend.verdict(layer).note
    assert f"mixed batches by two wrappers: {against}" in note if against else "mixed batches by BatchAttention" in note
    monkeypatch.setenv(MIXED_VARIABLE, "batch")
    with pytest.raises(ValueError, match="not one of two-wrappers, batch-attention"):
        backend.verdict(layer)


@pytest.mark.interface
@pytest.mark.parametrize("fields", [{}, {"logits_soft_cap": 3.0, "scale": 0.3, "dtype": "float16"}], ids=str)
def test_batch_attention_takes_this_plan_and_runs(fields: dict[str, Any]) -> None:
    """Held against the installed class; it has no window to be given, and its soft-cap is one of `run` too."""
    layer = spec(**fields)
    start, csr = lists(MIXED)
    lens = torch.from_numpy(cut(MIXED.view("decoder"), BLOCK, paged=True).lens)
    positional, named = mixed_arguments(layer, start, lens, csr)
    kind = flashinfer.BatchAttention
    given = inspect.signature(kind.plan).bind(None, *positional, **named).arguments
    assert torch.equal(given["qo_indptr"], start)
    assert given["kv_indices"] is csr["indices"]
    assert given["kv_indptr"] is csr["indptr"]
    assert given["kv_len_arr"] is lens
    assert (given["num_qo_heads"], given["num_kv_heads"], given["page_size"]) == (8, 2, BLOCK)
    assert (given["head_dim_qk"], given["head_dim_vo"]) == (128, 128)
    assert (given["causal"], given["sm_scale"], given["logits_soft_cap"]) == (
        True, layer.scale, layer.logits_soft_cap or 0.0
    )  # fmt: skip
    assert given["q_data_type"] == given["kv_data_type"] == getattr(torch, layer.dtype)
    assert not [name for name in inspect.signature(kind.plan).parameters if "window" in name]
    inspect.signature(kind).bind("NHD", "cuda:0")
    inspect.signature(kind.run).bind(None, 0, (0, 0), out=0, lse=0, logits_soft_cap=0.0)


@pytest.mark.interface
def test_batch_attentions_workspace_is_as_large_as_its_schedule_asks() -> None:
    """The formula is that of the header that it is compiled from, the attribute that of its `run`; LSE of base 2."""
    headers = SITE / "flashinfer" / "data" / "include" / "flashinfer" / "attention"
    source = " ".join((headers / "scheduler.cuh").read_text().split())
    schedule = source[source.index("TwoStageHolisticPlan(") :]
    for words in (
        "CTA_TILE_Q_SIZES[NUM_TASKS] = {128, 16}",
        "if (head_dim >= 256) {",
        "num_sm *= 1;",
        "num_sm *= 2;",
        "max_num_kv_splits = 4 * num_clusters * cluster_size * (CTA_TILE_Q_SIZES[0] + CTA_TILE_Q_SIZES[1])",
        "max_num_kv_splits * sizeof_dtype_o * head_dim * num_kv_heads, 16,",
        "max_num_kv_splits * sizeof(float) * num_kv_heads, 16,",
    ):
        assert words in schedule, words
    assert "math::ptx_log2(d[mma_q][j]) + float(m[mma_q][j])" in (headers / "persistent.cuh").read_text()
    assert "self.float_workspace_buffer," in inspect.getsource(flashinfer.BatchAttention.plan)
    assert "self.float_workspace_buffer," in inspect.getsource(flashinfer.BatchAttention.run)
    # On an H200: its own 384 MiB are enough for 8 key/value heads, and not for 32.
    assert mixed_bytes(spec(num_heads=32, num_kv_heads=8), 132) < 384 << 20 < mixed_bytes(spec(num_kv_heads=8), 264)
    assert mixed_bytes(spec(num_heads=32, num_kv_heads=32), 132) > 3 * (384 << 20)


class Unplanned(InferStep):
    """The host's part and the tensors of a step, without wrappers: those need a GPU to be made."""

    def _plan(self) -> None:
        return

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors


def step(batch: ad.AttentionMetadata, capacity: int | None = None, **fields: Any) -> Unplanned:
    layer = spec(**fields)
    return Unplanned(layer, batch.view(layer.kind), torch.device("cpu"), paged=True, capacity=capacity, layout="NHD",
                     kernels="fa2")  # fmt: skip


def test_what_is_appended() -> None:
    """Sequence and position of every row lead to the slot that the batch names."""
    batch = ad.AttentionMetadata.build([1, 0, 9, 2], [40, 3, 9, 18], [[3, 1, 2], [5], [7], [0, 6]], BLOCK)
    named = step(batch)._tensors
    slots = []
    for s, at in zip(named["sequence"].tolist(), named["positions"].tolist(), strict=True):
        pages = named["indices"][named["indptr"][s] : named["indptr"][s + 1]].tolist()
        slots.append(pages[at // BLOCK] * BLOCK + at % BLOCK)
    assert slots == batch.slot_mapping.tolist()


@pytest.mark.parametrize(
    "fields", [{"kv_cache_dtype": "float8_e4m3fn"}, {"writes_kv": False}, {"kind": "cross"}], ids=str
)
def test_what_does_not_fit_the_vendors_model_is_written_by_index(fields: dict[str, Any]) -> None:
    batch = ad.AttentionMetadata.build([1, 9], [40, 9], [[3, 1, 2], [7]], BLOCK, encoder_seq_lens=[3, 4],
                                       encoder_block_tables=[[0], [4]])  # fmt: skip
    assert "positions" not in step(batch, **fields)._tensors
    assert "positions" not in step(MIXED)._tensors  # rows without a slot
    assert "positions" not in step(batch, capacity=64)._tensors


def test_a_step_without_queries_has_no_parts_and_writes_an_encoders_keys() -> None:
    batch = ad.AttentionMetadata.build([0, 0], [4, 9], [[3], [7]], BLOCK, encoder_seq_lens=[3, 20],
                                       encoder_block_tables=[[0], [4, 5]])  # fmt: skip
    found = step(batch, kind="cross")
    assert parts_of(found.batch, fixed=False) == []
    assert found.placed is not None
    assert len(found.placed.at[0]) == 23


def test_a_fixed_plan_has_room_for_every_page() -> None:
    batch = ad.AttentionMetadata.build([1, 1], [40, 9], [[3, 1, 2], [7]], BLOCK)
    found = step(batch, capacity=64)
    assert found._tensors["indices"].tolist() == [3, 1, 2, 7, 0, 0, 0, 0]
    after = ad.AttentionMetadata.build([1, 1], [41, 0], [[3, 1, 2], []], BLOCK, slot_mapping=[40, -1])
    made = found.prepared(after.view("decoder"))
    found.renew(made)
    assert found._tensors["indices"].tolist()[:4] == [3, 1, 2, 0]
    assert found._csr.indptr.tolist() == [0, 3, 4]
    assert found._csr.last_page_len.tolist() == [9, 1]


def test_importing_flashinfer_initialises_no_device() -> None:
    assert not torch.cuda.is_initialized()
