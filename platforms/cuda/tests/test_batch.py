"""The host's part, against plain loops: batches, lists of pages, parts, writes, packing, renewing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_dispatch as ad
from attn_dispatch.contract import LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype, quantise
from attn_dispatch.errors import PlanError
from attn_dispatch_cuda.batch import cut, page_lists, part_of, writes_of
from attn_dispatch_cuda.layer import owned, with_sinks
from attn_dispatch_cuda.packing import Packed
from attn_dispatch_cuda.paged import neighbours
from attn_dispatch_cuda.plans import CudaPlan
from attn_dispatch_cuda.step import Step
from attn_dispatch_cuda.store import Placed, Store

CPU = torch.device("cpu")
BLOCK = 16


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "bfloat16", "block_size": BLOCK}
    return ad.AttentionSpec(**(plain | fields))


@st.composite
def batches(draw: st.DrawFn) -> ad.AttentionMetadata:
    """Decodes, prompts, chunks, idle sequences and padding, over shuffled blocks."""
    kinds = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.booleans()), max_size=7))
    new = [n for n, _, _ in kinds]
    lens = [0 if padding else n + before for n, before, padding in kinds]
    counts = [-(-n // BLOCK) for n in lens]
    blocks = draw(st.permutations(range(sum(counts) + 3)))
    ends = np.cumsum([0, *counts]).tolist()
    tables = [list(blocks[a:b]) for a, b in pairwise(ends)]
    slots = []
    for n, length, table in zip(new, lens, tables, strict=True):
        for i in range(n):
            at = length - n + i
            skip = not length or draw(st.integers(0, 9)) == 0
            slots.append(-1 if skip else table[at // BLOCK] * BLOCK + at % BLOCK)
    return ad.AttentionMetadata.build(new, lens, tables, BLOCK, slot_mapping=slots)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_a_batch_keeps_its_rows_and_their_keys(batch: ad.AttentionMetadata) -> None:
    view = batch.view("decoder")
    found = cut(view, BLOCK, paged=True)
    asking = [s for s in range(batch.num_seqs) if batch.query_lens[s]]
    assert found.num_seqs == len(asking)
    assert np.diff(found.query_start).tolist() == [int(batch.query_lens[s]) for s in asking]
    assert found.num_tokens == batch.num_tokens
    for row, s in enumerate(asking):
        length = int(batch.seq_lens[s])
        rows = slice(*found.query_start[row : row + 2])
        if length:
            assert found.lens[row] == length
            used = -(-length // BLOCK)
            assert found.tables[row, :used].tolist() == batch.block_table[s, :used].tolist()
            assert found.idle is None or not found.idle[rows].any()
        else:
            # It reads block 0, as many keys as it has queries, so that each of them sees one.
            assert found.lens[row] == batch.query_lens[s]
            assert not found.tables[row].any()
            assert found.idle is not None
            assert found.idle[rows].all()
    assert (found.lens >= 1).all()
    assert (found.max_query, found.max_keys) == (
        max((int(batch.query_lens[s]) for s in asking), default=0),
        int(found.lens.max(initial=0)),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_lists_of_pages(batch: ad.AttentionMetadata) -> None:
    found = cut(batch.view("decoder"), BLOCK, paged=True)
    csr = page_lists(found.lens, found.tables, BLOCK)
    assert csr.indptr[0] == 0
    assert csr.indptr[-1] == len(csr.indices)
    for s in range(found.num_seqs):
        pages = csr.indices[csr.indptr[s] : csr.indptr[s + 1]].tolist()
        slots = [page * BLOCK + b for page in pages for b in range(BLOCK)]
        length = (len(pages) - 1) * BLOCK + int(csr.last_page_len[s])
        assert 1 <= csr.last_page_len[s] <= BLOCK
        assert length == found.lens[s]
        assert slots[:length] == [
            int(found.tables[s, t // BLOCK]) * BLOCK + t % BLOCK for t in range(int(found.lens[s]))
        ]


def test_part_of_a_batch() -> None:
    batch = ad.AttentionMetadata.build([1, 1, 5, 9], [4, 20, 5, 30], [[1], [2, 3], [4], [5, 6]], BLOCK)
    part = part_of(cut(batch.view("decoder"), BLOCK, paged=True), 2, 4)
    assert part.query_start.tolist() == [0, 5, 14]
    assert part.lens.tolist() == [5, 30]
    assert part.tables.tolist() == [[4, 0], [5, 6]]
    assert (part.max_query, part.min_query, part.max_keys, part.uniform) == (9, 5, 30, False)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    batch=batches(),
    stored=st.sampled_from(["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"]),
    layout=st.sampled_from(["NHD", "HND"]),
    fixed=st.booleans(),
)
def test_writing_stores_what_the_contract_says_and_touches_nothing_else(
    batch: ad.AttentionMetadata, stored: str, layout: str, fixed: bool
) -> None:
    """On the CPU, by the code that runs on a GPU: rows with a slot, in both layouts, in shapes that may be fixed."""
    layer = spec(kv_cache_dtype=stored)
    blocks = int(batch.block_table.max(initial=0)) + 2
    cache = ad.attention(layer, "reference").allocate(blocks).to_layout(layout)
    rng = np.random.default_rng(0)
    for array in cache.arrays.values():
        array[...] = rng.standard_normal(array.shape).astype(numpy_dtype(stored))
    k, v = (rng.standard_normal((batch.num_tokens, 2, 64)).astype(numpy_dtype("bfloat16")) for _ in range(2))
    scaled = stored.startswith("float8")
    scales = {"k_scale": 0.5, "v_scale": 0.125} if scaled else {}
    parameters = owned(LayerParameters(layer, **scales), CPU)
    expected = [np.array(side) for side in cache.gather(range(blocks))]
    for s, (slot, name) in enumerate([(int(x), n) for n in (0, 1) for x in batch.slot_mapping]):
        row = s % max(batch.num_tokens, 1)
        if slot >= 0:
            factor = scales.get("v_scale" if name else "k_scale", 1.0)
            expected[name][slot // BLOCK, :, slot % BLOCK] = quantise((k, v)[name][row], stored, factor)

    found = writes_of(batch.slot_mapping, BLOCK, fixed=fixed)
    if found is not None:
        fields = ("rows", "block", "offset", "any_row")
        arrays = {name: getattr(found, name) for name in fields if getattr(found, name) is not None}
        placed = Placed(Packed(arrays, CPU).tensors)
        new = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (k, v)]
        store = Store(cache)
        store.write(placed, *new, parameters.k_scale_there, parameters.v_scale_there)
    for mine, side in zip(cache.gather(range(blocks)), expected, strict=True):
        assert np.array_equal(np.asarray(mine).view(np.uint8), side.view(np.uint8))


def test_arrays_of_many_types_in_one_copy() -> None:
    arrays = {
        "a": np.arange(3, dtype=np.int32),
        "b": np.array([True, False]),
        "c": np.arange(6, dtype=np.int64).reshape(2, 3),
        "none": np.zeros((0, 4), np.int32),
    }
    packed = Packed(arrays, CPU)
    for name, array in arrays.items():
        assert packed.tensors[name].numpy().tolist() == array.tolist()
        assert packed.tensors[name].data_ptr() % 16 == 0 or not array.size
    places = {name: tensor.data_ptr() for name, tensor in packed.tensors.items()}
    arrays["c"] = arrays["c"] + 7
    packed.renew(arrays)
    assert packed.tensors["c"].tolist() == arrays["c"].tolist()
    assert places == {name: tensor.data_ptr() for name, tensor in packed.tensors.items()}
    with pytest.raises(ValueError, match="bytes"):
        packed.renew({"a": np.arange(4, dtype=np.int32)})


def fixed_plan(batch: ad.AttentionMetadata, capacity: int) -> CudaPlan:
    plan = CudaPlan(spec=spec(), view=batch.view("decoder"), capacity=capacity)
    plan.steps[CPU, True] = Step(plan.spec, plan.view, CPU, paged=True, capacity=capacity)
    return plan


def test_a_fixed_plan_is_renewed_in_place() -> None:
    """Addresses and shapes stay, contents follow; a sequence that is over becomes padding."""
    plan = fixed_plan(ad.AttentionMetadata.build([1, 1, 1], [5, 17, 30], [[4], [2, 3], [0, 1]], BLOCK), 64)
    step = plan.steps[CPU, True]
    assert step.tables.shape == (3, 4)
    assert step.placed is not None
    assert step.idle is not None
    kept = [step.lens, step.tables, step.idle, *step.placed.at, step.placed.rows, step.placed.any_row]
    places = [tensor.data_ptr() for tensor in kept]
    after = ad.AttentionMetadata.build([1, 1, 1], [6, 0, 33], [[4], [], [0, 1, 7]], BLOCK, slot_mapping=[69, -1, 112])
    plan.renew(after)
    assert places == [tensor.data_ptr() for tensor in kept]
    assert step.lens.tolist() == [6, 1, 33]
    assert step.tables.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0], [0, 1, 7, 0]]
    assert step.idle.view(-1).tolist() == [False, True, False]
    assert [t.tolist() for t in step.placed.at] == [[4, 4, 7], [5, 5, 0]]
    assert step.placed.rows.tolist() == [0, 0, 2]
    assert plan.highest_block == 7
    assert step.batch.max_keys == 64
    plan.renew(ad.AttentionMetadata.build([1, 1, 1], [0, 0, 0], [[], [], []], BLOCK, slot_mapping=[-1] * 3))
    assert step.placed.any_row.tolist() == [False]
    assert step.idle.all()


@pytest.mark.parametrize(
    ("new", "lens", "words"),
    [
        ([1, 1], [5, 17], "3 query rows"),
        ([2, 1, 0], [5, 17, 3], "queries"),
        ([1, 1, 1], [5, 17, 65], "max_seq_len"),
    ],
)
def test_what_does_not_fit_a_fixed_plan_is_refused_and_changes_nothing(
    new: list[int], lens: list[int], words: str
) -> None:
    plan = fixed_plan(ad.AttentionMetadata.build([1, 1, 1], [5, 17, 30], [[4], [2, 3], [0, 1]], BLOCK), 64)
    before = plan.steps[CPU, True].lens.tolist()
    tables = [list(range(8 * s, 8 * s + 8)) for s in range(len(new))]
    with pytest.raises(PlanError, match=words):
        plan.renew(ad.AttentionMetadata.build(new, lens, tables, BLOCK))
    assert plan.steps[CPU, True].lens.tolist() == before


def test_only_a_fixed_plan_can_be_renewed() -> None:
    batch = ad.AttentionMetadata.build([1], [5], [[4]], BLOCK)
    with pytest.raises(PlanError, match="fixed_plan"):
        CudaPlan(spec=spec(), view=batch.view("decoder")).renew(batch)


def test_sinks_applied_to_a_result_are_sinks_in_the_softmax() -> None:
    """Against the reference, which has them in its denominators; a row that attends to nothing keeps its sink."""
    layer, plain = spec(sinks=True, returns_lse=True, dtype="float32"), spec(returns_lse=True, dtype="float32")
    sinks = np.array([0.7, -3.0, 5.0, -np.inf], np.float32)
    batch = ad.AttentionMetadata.build([1, 20, 1], [33, 20, 0], [[0, 1, 2], [3, 4], []], BLOCK,
                                       slot_mapping=[2 * BLOCK, *range(48, 68), -1])  # fmt: skip
    rng = np.random.default_rng(1)
    q = rng.standard_normal((22, 4, 64)).astype(np.float32)
    k, v = (rng.standard_normal((22, 2, 64)).astype(np.float32) for _ in range(2))
    results = []
    for which, own in ((layer, {"sinks": sinks}), (plain, {})):
        attn = ad.attention(which, "reference", **own)
        results.append(attn.run(attn.plan(batch), q, k, v, attn.allocate(5), return_lse=True))
    (expected, expected_lse), (out, lse) = results
    mine = torch.from_numpy(out)
    mine_lse = with_sinks(mine, torch.from_numpy(lse), torch.from_numpy(sinks))
    mine[-1] = 0
    assert np.abs(mine.numpy() - expected).max() < 1e-6
    finite = np.isfinite(expected_lse)
    assert np.array_equal(finite, np.isfinite(mine_lse.numpy()))
    assert np.abs(mine_lse.numpy()[finite] - expected_lse[finite]).max() < 1e-5


def test_runs_of_blocks() -> None:
    src, dst = np.array([3, 4, 5, 9, 1, 2]), np.array([0, 1, 2, 3, 8, 9])
    assert neighbours(src, dst) == [(3, 0, 3), (9, 3, 1), (1, 8, 2)]
    assert neighbours(np.array([], np.int64), np.array([], np.int64)) == []
