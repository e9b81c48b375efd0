"""FlashInfer without a GPU: verdicts on machines that are not here, calls against the real package, parts."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.adapters.batch import HostBatch, page_lists
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch_cuda.flashinfer import MIXED_VARIABLE, FlashInferBackend
from attn_dispatch_cuda.flashinfer_mixed import mixed_bytes, not_by_one_kernel

from .conftest import MakeMachine

flashinfer = pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")

from attn_dispatch_cuda import flashinfer_wrappers  # noqa: E402
from attn_dispatch_cuda.flashinfer_call import InferBatch, Part, parts_of, plan_arguments  # noqa: E402
from attn_dispatch_cuda.flashinfer_wrappers import WrapperKey, workspace_of  # noqa: E402
from platforms.cuda.evidence.signature_check import on_host  # noqa: E402
from platforms.cuda.evidence.stubs import flashinfer_stub  # noqa: E402

CPU = torch.device("cpu")
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


def host(batch: ad.AttentionMetadata) -> HostBatch:
    return HostBatch.of(batch.view("decoder"), spec(), paged=True)


def lists(batch: ad.AttentionMetadata) -> list[torch.Tensor]:
    """Where queries begin, lengths, and page lists, as `plan_arguments` is given them."""
    found = host(batch)
    pages = page_lists(found, BLOCK)
    return [*map(torch.from_numpy, (found.query_start, found.lens, pages.indptr, pages.indices, pages.last_page_len))]


def part(kind: Any, queries: int = 1) -> Part:
    return Part(kind, (0, 4), (0, 14), queries)


LAYERS: list[dict[str, Any]] = [
    {},
    {"window": (9, 0), "logits_soft_cap": 3.0, "scale": 0.3},
    {"causal": False, "window": (9, 0), "dtype": "float16"},
    {"kv_cache_dtype": "float8_e4m3fn"},
]


@pytest.mark.interface
@pytest.mark.parametrize("fields", LAYERS, ids=str)
def test_the_wrappers_take_these_plans(fields: dict[str, Any]) -> None:
    """Checked against the functions of the installed package (whose decode wrapper hands on to `_plan_impl`)."""
    layer = spec(**fields)
    start, lens, *pages = lists(MIXED)
    positional, named = plan_arguments(layer, part("decode", 4), start, lens, *pages)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    bound = inspect.signature(decode._plan_impl).bind(None, *positional, **named).arguments
    inspect.signature(decode.plan).bind(None, *positional, **named)
    inspect.signature(decode.workspace_size).bind(None, *positional, **named)
    positional, named = plan_arguments(layer, part("prefill"), start, lens, *pages)
    prefill = inspect.signature(flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan).bind(None, *positional, **named)
    inspect.signature(flashinfer.BatchPrefillWithPagedKVCacheWrapper.workspace_size).bind(None, *positional, **named)
    positional, named = plan_arguments(layer, part("ragged"), start, lens, start)
    ragged = inspect.signature(flashinfer.BatchPrefillWithRaggedKVCacheWrapper.plan).bind(None, *positional, **named)
    for given in (bound, prefill.arguments, ragged.arguments):
        assert given["sm_scale"] == layer.scale
        assert given["window_left"] == layer.window[0]
        assert given["logits_soft_cap"] == (layer.logits_soft_cap or 0.0)
        assert given["q_data_type"] == getattr(torch, layer.dtype)
        assert (given["num_qo_heads"], given["num_kv_heads"]) == (8, 2)
    assert bound["kv_data_type"] == prefill.arguments["kv_data_type"] == getattr(torch, layer.kv_cache_dtype)
    assert (bound["page_size"], bound["head_dim"], bound["q_len_per_req"]) == (BLOCK, 128, 4)
    assert prefill.arguments["causal"] is True
    assert ragged.arguments["kv_data_type"] == getattr(torch, layer.dtype)
    for array in pages:
        assert array.dtype == torch.int32
        assert not array.is_cuda


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
    assert not FlashInferBackend("x/infer").sinks_inside(None)  # type: ignore[arg-type]


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
        ([1] * 3 + [2] * 3, [("decode", 0, 3), ("prefill", 3, 6)]),
    ],
    ids=str,
)
def test_parts(new: list[int], parts: list[tuple[str, int, int]]) -> None:
    """Decodes by the one wrapper, the rest by the other, as long as each is one run of neighbours."""
    tables = [list(range(4 * s, 4 * s + 4)) for s in range(len(new))]
    batch = host(ad.AttentionMetadata.build(new, [n + 2 for n in new], tables, BLOCK))
    found = parts_of(batch, fixed=False)
    assert [(piece.kind, *piece.sequences) for piece in found] == parts
    for piece in found:
        assert piece.rows == tuple(batch.query_start[list(piece.sequences)])
    assert len(parts_of(batch, fixed=True)) <= 1
    # By one kernel what has both, in any order; what has one kind stays with its wrapper, and fixed plans as they are.
    mixed = {count == 1 for count in new if count} == {True, False}
    whole = parts_of(batch, fixed=False, one_kernel=True)
    assert whole == ([Part("mixed", (0, batch.num_seqs), (0, batch.num_tokens))] if mixed else found)
    assert parts_of(batch, fixed=True, one_kernel=True) == parts_of(batch, fixed=True)


@pytest.mark.parametrize(
    ("new", "fixed", "parts"),
    [
        ([4, 4, 4], False, [("decode", 0, 3, 4)]),
        ([4, 4, 4], True, [("decode", 0, 3, 4)]),
        ([1, 1, 4, 4], False, [("decode", 0, 2, 1), ("decode", 2, 4, 4)]),
        ([1, 1, 4, 4], True, [("prefill", 0, 4, 1)]),
        ([3, 4], False, [("decode", 0, 1, 3), ("decode", 1, 2, 4)]),
        ([3, 4, 3], False, [("prefill", 0, 3, 1)]),
        ([4, 4, 30], False, [("decode", 0, 2, 4), ("prefill", 2, 3, 1)]),
        ([9, 9], False, [("prefill", 0, 2, 1)]),
    ],
    ids=str,
)
def test_equally_many_drafts_are_decoded(new: list[int], fixed: bool, parts: list[tuple[str, int, int, int]]) -> None:
    """The decode wrapper takes several queries of each sequence, if they are as many."""
    tables = [list(range(4 * s, 4 * s + 4)) for s in range(len(new))]
    batch = host(ad.AttentionMetadata.build(new, [n + 2 for n in new], tables, BLOCK))
    found = parts_of(batch, fixed=fixed, drafts=True)
    assert [(piece.kind, *piece.sequences, piece.queries) for piece in found] == parts


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
    against = not_by_one_kernel(layer, backend.machine.capabilities)
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
    """Checked against the installed class; it has no window to be given, and its soft-cap is one of `run` too."""
    layer = spec(**fields)
    start, lens, indptr, indices, last = lists(MIXED)
    positional, named = plan_arguments(layer, part("mixed"), start, lens, indptr, indices, last)
    kind = flashinfer.BatchAttention
    given = inspect.signature(kind.plan).bind(None, *positional, **named).arguments
    assert given["qo_indptr"] is start
    assert given["kv_indices"] is indices
    assert given["kv_indptr"] is indptr
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


@pytest.fixture
def stub() -> Iterator[Any]:
    """Stubs in the place of FlashInfer's wrappers: real ones need a GPU to be made."""
    with flashinfer_stub() as found:
        yield found


def infer_batch(batch: ad.AttentionMetadata, capacity: int | None = None, **fields: Any) -> InferBatch:
    layer = spec(**fields)
    plan = DevicePlan(spec=layer, view=batch.view(layer.kind), max_seq_len=capacity)
    return InferBatch(plan, CPU, paged=True, layout="NHD", kernels="fa2", one_kernel=False)


def test_what_is_appended(stub: Any) -> None:
    """Sequence and position of every row lead to the slot that the batch names."""
    batch = ad.AttentionMetadata.build([1, 0, 9, 2], [40, 3, 9, 18], [[3, 1, 2], [5], [7], [0, 6]], BLOCK)
    named = infer_batch(batch).tensors
    slots = []
    for s, at in zip(named["sequence"].tolist(), named["positions"].tolist(), strict=True):
        pages = named["indices"][named["indptr"][s] : named["indptr"][s + 1]].tolist()
        slots.append(pages[at // BLOCK] * BLOCK + at % BLOCK)
    assert slots == batch.slot_mapping.tolist()


@pytest.mark.parametrize(
    "fields",
    [{"kv_cache_dtype": "float8_e4m3fn"}, {"writes_kv": False}, {"kind": "cross", "causal": False}],
    ids=str,
)
def test_what_does_not_fit_the_vendors_model_is_written_by_index(stub: Any, fields: dict[str, Any]) -> None:
    batch = ad.AttentionMetadata.build([1, 9], [40, 9], [[3, 1, 2], [7]], BLOCK, encoder_seq_lens=[3, 4],
                                       encoder_block_tables=[[0], [4]])  # fmt: skip
    assert "positions" not in infer_batch(batch, **fields).tensors
    assert "positions" not in infer_batch(MIXED).tensors  # rows without a slot
    writes = ad.AttentionMetadata.write_only(batch.view("decoder").side)
    assert infer_batch(writes).writes is not None
    assert "positions" not in infer_batch(writes).tensors  # rows of sequences that ask for nothing
    assert "positions" not in infer_batch(batch, capacity=64).tensors


def test_a_batch_without_queries_has_no_parts_and_writes_an_encoders_keys(stub: Any) -> None:
    batch = ad.AttentionMetadata.build([0, 0], [4, 9], [[3], [7]], BLOCK, encoder_seq_lens=[3, 20],
                                       encoder_block_tables=[[0], [4, 5]])  # fmt: skip
    found = infer_batch(batch, kind="cross", causal=False)
    assert found.parts == []
    assert found.writes is not None
    assert len(found.writes.block) == 23


def test_a_fixed_plan_has_room_for_every_page(stub: Any) -> None:
    batch = ad.AttentionMetadata.build([1, 1], [40, 9], [[3, 1, 2], [7]], BLOCK)
    found = infer_batch(batch, capacity=64)
    assert found.tensors["indices"].tolist() == [3, 1, 2, 7, 0, 0, 0, 0]
    after = ad.AttentionMetadata.build([1, 1], [41, 0], [[3, 1, 2], []], BLOCK, slot_mapping=[40, -1])
    found.renew(found.prepare(after.view("decoder")))
    assert found.tensors["indices"].tolist()[:4] == [3, 1, 2, 0]
    assert found.arrays["indptr"].tolist() == [0, 3, 4]
    assert found.arrays["last_page_len"].tolist() == [9, 1]


class Device:
    """A GPU that has not begun yet: what it is given waits, in order, until somebody waits for it."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.done = 0

    def enqueue(self, work: Any) -> None:
        self.waiting.append(work)

    def run(self, count: int) -> None:
        for work in self.waiting[self.done : count]:
            work()
        self.done = max(self.done, count)

    def event(self, device: torch.device) -> Any:
        behind = len(self.waiting)
        return SimpleNamespace(query=lambda: self.done >= behind, synchronize=lambda: self.run(behind))


class Pinned:
    """A wrapper as FlashInfer's are: `plan` writes into one pinned buffer, which the device is told to copy."""

    def __init__(self, device: Device) -> None:
        self.device, self.pinned, self.planned = device, torch.zeros(4), torch.zeros(4)

    def plan(self, value: float) -> None:
        self.pinned.fill_(value)
        self.device.enqueue(lambda: self.planned.copy_(self.pinned))

    def run(self, out: list[float]) -> None:
        self.device.enqueue(lambda: out.append(float(self.planned[0])))


def test_a_host_that_is_steps_ahead_plans_nothing_over_what_the_device_has_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fixed plans are renewed in place: the wrapper, and its pinned memory, stay the same."""
    device, out = Device(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(flashinfer_wrappers, "record_event", device.event)
    monkeypatch.setattr(flashinfer_wrappers, "_make", lambda key, memory: Pinned(device))
    key = WrapperKey("decode", spec(), "NHD", "fa2", (2, 8))
    wrapper = flashinfer_wrappers.Workspace(CPU).lease(key, object())
    for step in range(4):
        wrapper.plan(step)
        wrapper.run(out)
    device.run(len(device.waiting))
    assert out == [0, 1, 2, 3]


def test_a_wrapper_is_leased_again_when_its_plan_is_gone_and_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(flashinfer_wrappers, "record_event", device.event)
    monkeypatch.setattr(flashinfer_wrappers, "_make", lambda key, memory: Pinned(device))
    workspace, key = flashinfer_wrappers.Workspace(CPU), WrapperKey("decode", spec(), "NHD", "fa2")

    class Batch:
        pass

    batches = [Batch(), Batch()]
    first, second = (workspace.lease(key, batch) for batch in batches)
    assert first is not second
    first.plan(1.0)
    second.plan(2.0)
    batches.clear()
    gc.collect()
    assert workspace.lease(key, Batch()) not in (first, second)  # the device has read neither
    device.run(len(device.waiting))
    assert workspace.lease(key, Batch()) in (first, second)


def workspace_needed(queries: int, sequences: int, layer: ad.AttentionSpec, uniform: int = 0) -> int:
    """What a fixed plan of this many queries sets aside for partial results, by the vendor's header (scheduler.cuh)."""
    source = (SITE / "flashinfer" / "data" / "include" / "flashinfer" / "attention" / "scheduler.cuh").read_text()
    for words in (
        "total_num_tiles_q = ceil_div(total_num_rows * gqa_group_size, cta_tile_q) + batch_size - 1;",
        "total_num_tiles_q = batch_size * ceil_div(packed_uniform_len, cta_tile_q);",
        "ceil_div(static_cast<size_t>(padded_batch_size) * cta_tile_q, gqa_group_size);",
        'num_qo_heads * max_partial_rows * head_dim_vo * sizeof(float), 16, "batch_prefill_tmp_v");',
        'num_qo_heads * max_partial_rows * sizeof(float), 16, "batch_prefill_tmp_s");',
    ):
        assert words in source, words
    group = layer.group_size
    tile = 16 if uniform * group in range(1, 17) else 128
    tiles = sequences * -(-uniform * group // tile) if uniform else -(-queries * group // tile) + sequences - 1
    return layer.num_heads * -(-tiles * tile // group) * (layer.value_head_size + 1) * 4


def test_a_batch_that_needs_more_workspace_gets_it(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 sequences of 4 drafts and one more, as a fixed plan: more than the 128 MiB that FlashInfer recommends."""
    layer, new = spec(num_heads=32, num_kv_heads=8), [4] * 255 + [5]
    needed = workspace_needed(sum(new), 256, layer)
    assert needed > 150e6
    sizes: list[int] = []
    stubbed = flashinfer.BatchPrefillWithPagedKVCacheWrapper

    class Planning(stubbed):  # type: ignore[misc, valid-type]
        """Fails as the vendor's does: in `plan`, when the memory does not do."""

        def __init__(self, memory: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            super().__init__(memory, *args, **kwargs)
            self.memory = memory

        def plan(self, *args: Any, **kwargs: Any) -> None:
            if self.memory.numel() < needed:
                raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")
            sizes.append(self.memory.numel())
            super().plan(*args, **kwargs)

        def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            inspect.signature(PREFILL.workspace_size).bind(self, *args, **kwargs)
            return needed, 8 << 20

    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Planning)
    metadata = ad.AttentionMetadata.build(new, [9] * 256, [[s] for s in range(256)], BLOCK)
    plan = DevicePlan(spec=layer, view=metadata.view("decoder"), max_seq_len=64)
    for _ in range(2):
        InferBatch(plan, CPU, paged=True, layout="NHD", kernels="fa2", one_kernel=False)
    assert sizes == [needed, needed]


def test_equally_many_drafts_need_a_tenth_of_the_workspace(stub: Any) -> None:
    """By the decode wrapper, which is told that they are."""
    layer = spec(num_heads=32, num_kv_heads=8)
    metadata = ad.AttentionMetadata.build([4] * 256, [9] * 256, [[s] for s in range(256)], BLOCK)
    plan = DevicePlan(spec=layer, view=metadata.view("decoder"), max_seq_len=64)
    batch = InferBatch(plan, CPU, paged=True, layout="NHD", kernels="fa2", one_kernel=False)
    assert [(piece.kind, piece.queries) for piece in batch.parts] == [("decode", 4)]
    assert workspace_needed(1024, 256, layer, uniform=4) < 17e6 < 150e6 < workspace_needed(1024, 256, layer)


PREFILL = flashinfer.BatchPrefillWithPagedKVCacheWrapper


def test_what_fails_for_another_reason_fails(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel")

    real = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setattr(real, "plan", plan)
    monkeypatch.setattr(real, "workspace_size", lambda self, *args, **kwargs: (1, 1), raising=False)
    with pytest.raises(RuntimeError, match="no kernel"):
        infer_batch(ad.AttentionMetadata.build([1], [5], [[0]], BLOCK))


class Stream:
    """A stream, as an object that remembers for which others it waits."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


def test_two_streams_have_two_workspaces(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels run at the same time: partial results in one memory would overwrite each other."""
    streams, current = [Stream(), Stream()], [0]
    monkeypatch.setattr(flashinfer_wrappers, "current_stream", lambda device: streams[current[0]])
    metadata = ad.AttentionMetadata.build([1], [5], [[0]], BLOCK)
    batches = []
    for number in (0, 1):
        current[0] = number
        batches.append(infer_batch(metadata))
    memories = {batch._workspace.memory.data_ptr() for batch in batches}
    assert len(memories) == 2
    # A plan of one stream that runs on another waits for what was queued on its own, and the other way round.
    for number, expected in ((1, [[], [streams[0]]]), (1, [[], [streams[0]]]), (0, [[streams[1]], [streams[0]]])):
        current[0] = number
        with batches[0]._workspace.running():
            pass
        assert [stream.waited for stream in streams] == expected
    monkeypatch.setattr(flashinfer_wrappers, "capturing", lambda device: True)
    current[0] = 1
    with batches[0]._workspace.running():
        pass
    assert streams[1].waited == [streams[0]]


def test_graphs_have_a_workspace_of_their_own(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay may run while another stream computes a step of its own."""
    metadata = ad.AttentionMetadata.build([1], [5], [[0]], BLOCK)
    memories = [infer_batch(metadata, capacity)._workspace.memory.data_ptr() for capacity in (None, 64, 128)]
    assert memories[0] != memories[1] == memories[2]


def test_an_event_is_recorded_where_the_plan_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not on the current device."""
    recorded = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the current stream of {device}")
    flashinfer_wrappers.record_event(torch.device("cuda", 1))
    assert recorded == ["the current stream of cuda:1"]
    assert flashinfer_wrappers.record_event(CPU) is None


def test_wrappers_are_made_outside_of_inference_mode_and_of_the_default_device(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's buffers could not be planned into otherwise, and what it makes on the host must be there."""
    seen = []
    real = flashinfer.BatchDecodeWithPagedKVCacheWrapper

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.append((torch.is_inference_mode_enabled(), torch.empty(0).device.type))
            super().__init__(*args, **kwargs)

        def plan(self, *args: Any, **kwargs: Any) -> None:
            seen.append((torch.is_inference_mode_enabled(), torch.empty(0).device.type))
            super().plan(*args, **kwargs)

    monkeypatch.setattr(flashinfer, "BatchDecodeWithPagedKVCacheWrapper", Watched)
    backend = on_host(FlashInferBackend)
    metadata = ad.AttentionMetadata.build([1], [5], [[0]], BLOCK)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            backend.plan(spec(), metadata)
            backend.fixed_plan(spec(), metadata, 64).renew(metadata)
    finally:
        torch.set_default_device(None)
    assert seen == [(False, "cpu")] * 5
    assert not workspace_of(CPU, graphs=True).memory.is_inference()


def test_importing_flashinfer_initialises_no_device() -> None:
    assert not torch.cuda.is_initialized()
