"""xFormers without a GPU: verdicts, calls against the real package, and its own masks against the contract."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.errors import BackendLoadError, PlanError
from attn_dispatch_cuda.xformers import XformersBackend, interpreted

from .conftest import MakeMachine, real

xformers = pytest.importorskip("xformers", reason="not run: xformers is not installed")
pytest.importorskip("xformers.ops.fmha", reason="not run: xformers does not import beside what is installed")
if interpreted():
    pytest.skip("not run: its kernels are interpreted (test_xformers_interpreted.py)", allow_module_level=True)

from xformers.ops import fmha  # noqa: E402
from xformers.ops.fmha.triton_splitk import FwOp  # noqa: E402

from attn_dispatch_cuda.xformers_call import XformersBatch, check_private_api, pieces_of  # noqa: E402

SITE = Path(xformers.__file__).parent.parent
BLOCK = 64
CPU = torch.device("cpu")
H200 = "NVIDIA H200"


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 6, "num_kv_heads": 2, "head_size": 64, "dtype": "bfloat16", "block_size": BLOCK}
    return ad.AttentionSpec(**(plain | fields))


def xformers_alone(tmp_path: Path) -> Path:
    """A folder in which the installed xFormers is, and nothing else of what is installed here."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for found in [SITE / "xformers", *SITE.glob("xformers-*.dist-info")]:
        (folder / found.name).symlink_to(found)
    return folder


def with_triton(tmp_path: Path) -> Path:
    """A folder in which Triton is installed (empty: nothing of it is read to find that out)."""
    (tmp_path / "more" / "triton").mkdir(parents=True)
    (tmp_path / "more" / "triton" / "__init__.py").touch()
    return tmp_path / "more"


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({}, []),
        ({"block_size": 128, "dtype": "float16", "head_size": 512}, []),
        ({"sinks": True, "returns_lse": True}, []),
        ({"kind": "cross"}, []),
        ({"causal": False}, []),
        ({"block_size": 32}, ["block_size"]),
        ({"head_size": 96}, ["head_size"]),
        ({"value_head_size": 32}, ["value_head_size"]),
        ({"window": (9, 0)}, ["window"]),
        ({"logits_soft_cap": 3.0}, ["logits_soft_cap"]),
        ({"alibi": True}, ["alibi"]),
        ({"kind": "encoder"}, ["kind"]),
        ({"dtype": "float32"}, ["dtype"]),
        ({"kv_cache_dtype": "float8_e4m3fn"}, ["kv_cache_dtype"]),
    ],
    ids=str,
)
def test_verdicts(machine: MakeMachine, fields: dict[str, Any], refused: list[str]) -> None:
    verdict = XformersBackend("x/formers", machine(H200, more=(SITE,))).verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused
    assert all(refusal.accepts and refusal.remedy for refusal in verdict.refusals)


def test_what_is_missing_is_said(machine: MakeMachine, tmp_path: Path) -> None:
    more, alone = with_triton(tmp_path), xformers_alone(tmp_path)
    probe = lambda *models, **have: XformersBackend("x/y", machine(*models, **have)).probe()  # noqa: E731
    assert "no NVIDIA GPU" in probe(more=(alone, more)).reason
    assert "not installed" in probe(H200, more=(more,)).reason
    assert "sm_75" in probe("Tesla T4", more=(alone, more)).reason
    assert probe(H200, more=(alone, more))
    metadata = more / "triton-3.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.9.0\n")
    assert "block pointers, which Triton 3.9.0 no longer has" in probe(H200, more=(alone, more)).reason
    metadata.rename(more / "triton-3.8.0.dist-info")
    (more / "triton-3.8.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.8.0\n")
    assert probe(H200, more=(alone, more))


@pytest.mark.interface
def test_flash_attention_4_alone_keeps_xformers_from_being_imported(machine: MakeMachine, tmp_path: Path) -> None:
    """The real packages, side by side: that the probe says so is no guess. With FlashAttention 2 beside, it is gone."""
    alone, both = real("flash-attn-4"), real("flash-attn")
    environ = os.environ | {"PYTHONPATH": str(alone)}
    command = [sys.executable, "-c", "import xformers.ops.fmha"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "flash_attn.flash_attn_interface" in done.stderr
    folders = (xformers_alone(tmp_path), with_triton(tmp_path))
    found = XformersBackend("x/y", machine(H200, packages=("flash-attn-4",), more=folders)).probe()
    assert not found
    assert "FlashAttention 4 alone" in found.reason
    assert (both / "flash_attn" / "flash_attn_interface.py").exists()
    assert XformersBackend("x/y", machine(H200, packages=("flash-attn",), more=folders)).probe()


CROSS = {"encoder_seq_lens": [70, 3, 9], "encoder_block_tables": [[5, 0], [2], [1]]}
BATCHES: dict[str, tuple[dict[str, Any], ad.AttentionMetadata]] = {
    "decodes": ({}, ad.AttentionMetadata.build([1, 1, 1], [1, 70, 128], [[4], [3, 1], [0, 6]], BLOCK)),
    "speculation": ({}, ad.AttentionMetadata.build([4, 4], [4, 90], [[4], [3, 1]], BLOCK)),
    "a long prompt": ({}, ad.AttentionMetadata.build([45], [45], [[4]], BLOCK)),
    "mixed": ({}, ad.AttentionMetadata.build([1, 37, 5, 0, 2], [66, 100, 5, 9, 0], [[4, 1], [3, 6], [0], [7], []],
                                             BLOCK, slot_mapping=[-1] * 45)),
    "not causal": ({"causal": False}, ad.AttentionMetadata.build([1, 20], [30, 70], [[4], [3, 1]], BLOCK)),
    "cross": ({"kind": "cross"}, ad.AttentionMetadata.build([3, 1, 2], [3, 1, 2], [[3], [4], [6]], BLOCK, **CROSS)),
}  # fmt: skip


def reference(layer: ad.AttentionSpec, batch: ad.AttentionMetadata, q: Any, key: Any, value: Any) -> Any:
    """The contract's result over a filled cache, nothing written."""
    exact = ad.attention(layer, "reference")
    cache = exact.allocate(8)
    for name, side in (("key", key), ("value", value)):
        cache.arrays[name][...] = side.transpose(0, 2, 1, 3)
    shared = ad.attention(ad.AttentionSpec(**{**vars_of(layer), "writes_kv": False}), "reference")
    return shared.run(shared.plan(batch), q, cache=cache, return_lse=True)


def device_call(batch: XformersBatch, q: torch.Tensor, cache: CacheTensors) -> DeviceCall:
    return DeviceCall(batch, q, None, None, cache, None, None, False)  # type: ignore[arg-type]


def vars_of(layer: ad.AttentionSpec) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ad.AttentionSpec.__dataclass_fields__}


@pytest.mark.interface
@pytest.mark.parametrize("name", BATCHES)
def test_its_own_masks_say_what_the_contract_means(name: str) -> None:
    """xFormers writes its masks out (`materialize`): attention with them is the contract's, piece by piece."""
    fields, batch = BATCHES[name]
    layer = spec(dtype="float32", returns_lse=True, **fields)
    rng = np.random.default_rng(0)
    view = batch.view(layer.kind)
    q = rng.standard_normal((view.num_tokens, 6, 64)).astype(np.float32)
    key, value = (rng.standard_normal((8, BLOCK, 2, 64)).astype(np.float32) for _ in range(2))
    step = XformersBatch(layer, view, CPU, paged=True)
    out = np.full((view.num_tokens, 6, 64), np.nan, np.float32)
    for rows, mask in step.calls:
        at = np.arange(view.num_tokens) if rows is None else rows.numpy()
        # Written out, a table's unused entries would hide the block that they name: they name some of their own.
        used = -(-mask.k_seqinfo.seqlen // BLOCK)
        spare = 8 + torch.arange(mask.block_tables.shape[1], dtype=torch.int32)
        tables = torch.where(torch.arange(len(spare)) < used[:, None], mask.block_tables, spare)
        shape = (len(at), len(tables) * mask.k_seqinfo.padding)
        every = dataclasses.replace(mask, block_tables=tables).materialize(shape).numpy()
        every = every[:, : 8 * BLOCK]  # it ends with the highest block that is named
        flat = [np.repeat(side.reshape(-1, 2, 64)[: every.shape[1]], 3, axis=1) for side in (key, value)]
        scores = np.einsum("qhd,khd->hqk", q[at], flat[0]) * layer.scale + every
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[at] = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), flat[1])
        kind = type(mask)
        assert kind in (
            fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
            fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask,
        )
    if step.idle is not None:
        out[step.idle.numpy()[:, 0]] = 0
    expected, _ = reference(layer, batch, q, key, value)
    assert np.abs(out - expected).max() < 1e-5


@pytest.mark.interface
@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_takes_what_it_is_given(name: str) -> None:
    """xFormers' own list of reasons against, for the real inputs: nothing but that they are not on a GPU."""
    fields, batch = BATCHES[name]
    layer = spec(**fields)
    view = batch.view(layer.kind)
    cache = ad.attention(layer, "reference").allocate(8).to_layout("NHD")
    store = CacheTensors(cache)
    step = XformersBatch(layer, view, CPU, paged=True)
    q = torch.zeros(view.num_tokens, 6, 64, dtype=torch.bfloat16)
    for rows, mask in step.calls:
        given = step.arguments(device_call(step, q, store), q if rows is None else q[rows], mask)
        inputs = fmha.Inputs(**given)
        inputs.validate_inputs()
        reasons = FwOp.not_supported_reasons(inputs)
        allowed = ("device=cpu", "triton is not available", "bf16 is only supported on A100+")
        assert [r for r in reasons if not any(word in r for word in allowed)] == []
        assert given["key"].data_ptr() == store.key.data_ptr()
        assert given["key"].shape == (1, 8 * BLOCK, 2, 3, 64)
    inspect.signature(FwOp.apply).bind(inputs, needs_gradient=True)


@pytest.mark.interface
def test_too_small_pages_and_too_many_queries_are_the_kernels_own_limits() -> None:
    """What the verdict refuses and the step cuts up is what xFormers itself would refuse."""
    layer = spec(block_size=32)
    batch = ad.AttentionMetadata.build([20], [20], [[4]], 32)
    cache = ad.attention(layer, "reference").allocate(8).to_layout("NHD")
    mask = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [20], [20], block_tables=torch.tensor([[4]], dtype=torch.int32), page_size=32
    )
    step = XformersBatch(layer, batch.view("decoder"), CPU, paged=True)
    q = torch.zeros(20, 6, 64, dtype=torch.bfloat16)
    given = step.arguments(device_call(step, q, CacheTensors(cache)), q, mask)
    reasons = " ".join(FwOp.not_supported_reasons(fmha.Inputs(**given)))
    assert "larger than 16 for causal" in reasons
    assert "page size should be divisible" in reasons


def test_our_masks_equal_those_of_the_vendors_own_maker() -> None:
    fields, batch = BATCHES["decodes"]
    step = XformersBatch(spec(**fields), batch.view("decoder"), CPU, paged=True)
    ((_, mask),) = step.calls
    theirs = type(mask).from_seqlens(
        [1, 1, 1], [1, 70, 128], block_tables=torch.tensor([[4, 0], [3, 1], [0, 6]], dtype=torch.int32), page_size=BLOCK
    )
    assert mask.block_tables.tolist() == theirs.block_tables.tolist()
    for side in ("q_seqinfo", "k_seqinfo"):
        mine, other = getattr(mask, side), getattr(theirs, side)
        assert mine.seqstart.tolist() == other.seqstart.tolist()
        assert list(mine.seqstart_py) == list(other.seqstart_py)
        assert (mine.max_seqlen, mine.min_seqlen) == (other.max_seqlen, other.min_seqlen)
    assert mask.k_seqinfo.seqlen.tolist() == theirs.k_seqinfo.seqlen.tolist()
    assert list(mask.k_seqinfo.seqlen_py) == list(theirs.k_seqinfo.seqlen_py)
    assert mask.k_seqinfo.padding == theirs.k_seqinfo.padding


def test_pieces_cover_every_query_once() -> None:
    batch = ad.AttentionMetadata.build([1, 37, 5, 16], [66, 100, 5, 40], [[4, 1], [3, 6], [0], [7]], BLOCK)
    pieces = pieces_of(HostBatch.of(batch.view("decoder"), spec(), paged=True), True)
    rows = np.concatenate([p.rows for p in pieces if p.rows is not None])
    assert sorted(rows.tolist()) == list(range(59))
    assert [p.query_lens[0] for p in pieces] == [1, 4, 16]
    assert all(len(set(p.query_lens)) == 1 for p in pieces)


def test_a_fixed_plan_is_refused_with_words() -> None:
    _, batch = BATCHES["decodes"]
    with pytest.raises(PlanError, match="has no fixed plans"):
        XformersBackend("x/y").fixed_plan(spec(), batch, 256)


def test_pieces_of_more_queries_than_keys_read_a_key_each() -> None:
    """A batch that writes nothing may have more queries than keys: no kernel is given a sequence without keys."""
    batch = ad.AttentionMetadata.read_only([37], [3], [[4]], BLOCK)
    host = HostBatch.of(batch.view("decoder"), spec(), paged=True)
    pieces = pieces_of(host, True)
    assert all((p.lens >= 1).all() for p in pieces)
    assert sorted(length for p in pieces for length in p.lens.tolist())[-2:] == [2, 3]


def test_an_xformers_whose_masks_are_made_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks' parts are private: another release may have others."""
    check_private_api()

    @dataclasses.dataclass
    class Other:
        seqstart: Any
        max_seqlen: int

    with monkeypatch.context() as patch:
        patch.setattr(fmha.attn_bias, "_SeqLenInfo", Other)
        with pytest.raises(BackendLoadError, match="_SeqLenInfo has no min_seqlen, seqstart_py"):
            check_private_api()
    monkeypatch.delattr(fmha.attn_bias, "_PaddedSeqLenInfo")
    with pytest.raises(BackendLoadError, match="_PaddedSeqLenInfo has no max_seqlen"):
        check_private_api()
