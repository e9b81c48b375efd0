"""How a batch is cut into calls must not show: many small calls give what one large one gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.conformance import CASES, Case, run_case
from attn_dispatch_torch import grouping, launch_plan
from attn_dispatch_torch.grouping import Limits
from attn_dispatch_torch.sdpa import SdpaBackend

BACKEND = SdpaBackend("torch/cut")
SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
CUT = [c for c in CASES if c.spec.dtype == "float32" and "size" not in c.name and not c.name.startswith("type")]
ROOMY = Limits(chunk_bytes=1 << 30, call_bytes=1 << 30)


@pytest.mark.parametrize("few", [0, 2, 100])
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_small_calls(case: Case, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "DECODE_TOKENS", few)
    monkeypatch.setattr(grouping, "_TILE_TOKENS", 7)
    monkeypatch.setattr(grouping, "_TILE_ELEMENTS", 500)
    monkeypatch.setattr(launch_plan, "_CPU", Limits(chunk_bytes=1, call_bytes=0) if few < 100 else ROOMY)
    run_case(BACKEND, case)


@pytest.mark.parametrize("fields", [{}, {"window": (600, 0)}, {"alibi": True}, {"logits_soft_cap": 2.0}], ids=str)
def test_long_chunks(fields: dict) -> None:
    """Several tiles, masks wider than the kernel's own blocks of keys, more memory than one call may gather."""
    spec = ad.AttentionSpec(num_heads=2, num_kv_heads=1, head_size=64, dtype="float32", returns_lse=True, **fields)
    run_case(BACKEND, Case("long chunks", "", spec, (1400, 0, 2500), (700, 1300, 1)))


def tables(lens: list[int]) -> list[list[int]]:
    ids = iter(np.random.default_rng(0).permutation(sum(-(-n // 32) for n in lens)).tolist())
    return [[next(ids) for _ in range(-(-n // 32))] for n in lens]


def made(new: list[int], lens: list[int], spec: ad.AttentionSpec = SPEC, **limits: int) -> launch_plan.LaunchPlan:
    batch = ad.AttentionMetadata.build(new, lens, tables(lens))
    found, launch_plan._CPU = launch_plan._CPU, Limits(**({"chunk_bytes": 1 << 30, "call_bytes": 0} | limits))
    try:
        return launch_plan.make_launch_plan(spec, batch.view("decoder"), torch.device("cpu"), False, cpu=True)
    finally:
        launch_plan._CPU = found


def test_decodes_of_one_length_are_one_call_without_a_mask() -> None:
    folds = made([1] * 6, [70] * 6).decodes
    assert len(folds) == 1
    assert folds[0].mask is None
    assert folds[0].rows == slice(0, 6)
    assert (folds[0].begin, folds[0].end) == (0, 70)


def test_padding_is_bought_only_where_a_call_costs_more() -> None:
    lens = [40, 900, 41, 901, 64]
    assert [f.rows if isinstance(f.rows, slice) else f.rows.tolist() for f in made([1] * 5, lens).decodes] == [
        [0, 2, 4],
        [1, 3],
    ]
    together = made([1] * 5, lens, call_bytes=1 << 30).decodes
    assert [f.rows for f in together] == [slice(0, 5)]


def test_a_window_gathers_its_own_blocks_alone() -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32", window=(31, 0))
    (fold,) = made([1], [1000], spec).decodes
    assert len(fold.index) == 2 * spec.num_kv_heads
    (long,) = made([100], [1000], spec).prefills
    assert long.index is not None
    assert len(long.index) == 5 * spec.num_kv_heads


def test_a_fresh_prompt_is_not_gathered_but_a_partly_cached_one_is() -> None:
    assert made([100], [100]).prefills[0].index is None
    assert made([100], [130]).prefills[0].index is not None
    batch = ad.AttentionMetadata.build([100], [100], tables([100]), slot_mapping=None)
    slots = batch.slot_mapping.copy()
    slots[3] = -1
    batch = ad.AttentionMetadata.build([100], [100], tables([100]), slot_mapping=slots)
    again = launch_plan.make_launch_plan(SPEC, batch.view("decoder"), torch.device("cpu"), False, cpu=True)
    assert again.prefills[0].index is not None


def test_each_query_tile_looks_at_what_it_sees_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "_TILE_TOKENS", 64)
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32", window=(99, 0))
    (long,) = made([300], [300], spec).prefills
    seen = [tile.high - tile.low for tile in long.tiles]
    assert len(seen) == 5
    assert max(seen) == 64 + 99
    shared = {tile.mask.untyped_storage().data_ptr() for tile in long.tiles if tile.mask is not None}
    assert len(shared) == 1
