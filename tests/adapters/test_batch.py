"""Batches on the host, against plain loops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_dispatch as ad
from attn_dispatch.adapters.batch import (
    HostBatch,
    check_renewable,
    page_lists,
    query_rows,
    slot_writes,
    split_decodes,
)
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import PlanError

BLOCK = 16


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "bfloat16", "block_size": BLOCK}
    return ad.AttentionSpec(**(plain | fields))


def host(batch: ad.AttentionMetadata, **fields: Any) -> HostBatch:
    return HostBatch.of(batch.view("decoder"), spec(**fields), paged=True)


@st.composite
def batches(draw: st.DrawFn) -> ad.AttentionMetadata:
    """Decodes, prompts, chunks, sequences without queries and padding, over shuffled blocks."""
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
@given(batch=batches(), tile=st.sampled_from([1, 64]))
def test_a_batch_keeps_its_rows_and_their_keys(batch: ad.AttentionMetadata, tile: int) -> None:
    found = HostBatch.of(batch.view("decoder"), spec(), paged=True, tile=tile)
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
    if found.num_seqs:
        assert found.tables.shape[1] * BLOCK >= -(-found.max_keys // tile) * tile
    assert (found.max_query, found.max_keys) == (
        max((int(batch.query_lens[s]) for s in asking), default=0),
        int(found.lens.max(initial=0)),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (0, 0), (3, 2), (-1, 0)], ids=str)
def test_rows_whose_keys_a_mask_hides_are_idle(window: tuple[int, int], causal: bool) -> None:
    """The rows that are idle are those whose LSE the reference has at -inf: with no keys, or fewer than queries."""
    window = (window[0], 0) if causal and window[1] > 0 else window
    layer = spec(causal=causal, window=window, returns_lse=True)
    # (Before the first key nothing of a causal layer can be: the core refuses it.)
    batch = ad.AttentionMetadata.read_only([3 if causal else 9, 1, 4, 12], [3, 5, 0, 12], [[0], [1], [], [2]], BLOCK)
    attn = ad.attention(layer, "reference")
    q = np.zeros((batch.num_tokens, 4, 64), numpy_dtype("bfloat16"))
    _, lse = attn.run(attn.plan(batch), q, cache=attn.allocate(4), return_lse=True)
    idle = host(batch, causal=causal, window=window).idle
    assert idle is not None
    assert idle.tolist() == np.isneginf(lse[:, 0]).tolist()


def test_keys_outside_of_a_cache_are_the_batchs_rows() -> None:
    batch = ad.AttentionMetadata.build([5, 0, 9], [5, 0, 9])
    found = HostBatch.of(batch.view("encoder"), spec(kind="encoder"), paged=False)
    assert found.lens.tolist() == [5, 9]
    assert found.key_start.tolist() == [0, 5, 14]
    assert found.tables.shape == (2, 0)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_page_lists(batch: ad.AttentionMetadata) -> None:
    found = host(batch)
    lists = page_lists(found, BLOCK)
    assert lists.indptr[0] == 0
    assert lists.indptr[-1] == len(lists.indices)
    assert {array.dtype.name for array in (lists.indptr, lists.indices, lists.last_page_len)} == {"int32"}
    for s in range(found.num_seqs):
        pages = lists.indices[lists.indptr[s] : lists.indptr[s + 1]].tolist()
        slots = [page * BLOCK + b for page in pages for b in range(BLOCK)]
        length = (len(pages) - 1) * BLOCK + int(lists.last_page_len[s])
        assert 1 <= lists.last_page_len[s] <= BLOCK
        assert length == found.lens[s]
        assert slots[:length] == [
            int(found.tables[s, t // BLOCK]) * BLOCK + t % BLOCK for t in range(int(found.lens[s]))
        ]


def test_part_of_a_batch() -> None:
    batch = ad.AttentionMetadata.build([1, 1, 5, 9], [4, 20, 5, 30], [[1], [2, 3], [4], [5, 6]], BLOCK)
    part = host(batch).part(2, 4)
    assert part.query_start.tolist() == [0, 5, 14]
    assert part.lens.tolist() == [5, 30]
    assert part.tables.tolist() == [[4, 0], [5, 6]]
    assert (part.max_query, part.min_query, part.max_keys, part.uniform) == (9, 5, 30, False)


def test_a_fixed_batch_has_the_shapes_of_its_capacity() -> None:
    batch = ad.AttentionMetadata.build([1, 1], [5, 33], [[4], [2, 3, 1]], BLOCK)
    found = host(batch).fixed(64, BLOCK)
    assert found.tables.tolist() == [[4, 0, 0, 0], [2, 3, 1, 0]]
    assert found.idle is not None
    assert found.idle.tolist() == [False, False]
    assert found.max_keys == 64


def test_a_fixed_batchs_tables_cover_whole_tiles_too() -> None:
    """A kernel that looks up tiles of 48 tokens reads table entries up to the capacity's last tile."""
    batch = ad.AttentionMetadata.build([1, 1], [5, 33], [[4], [2, 3, 1]], BLOCK)
    for capacity, blocks in ((48, 3), (49, 6), (64, 6)):
        assert host(batch).fixed(capacity, BLOCK, tile=48).tables.shape == (2, blocks)


@pytest.mark.parametrize("fixed", [False, True])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_rows_are_written_where_their_slots_are(fixed: bool, batch: ad.AttentionMetadata) -> None:
    expected = {int(slot): t for t, slot in enumerate(batch.slot_mapping) if slot >= 0}
    found = slot_writes(batch.slot_mapping, BLOCK, fixed=fixed)
    if found is None:
        assert not expected
        return
    rows = np.arange(batch.num_tokens) if found.rows is None else found.rows
    written = dict(zip((found.block * BLOCK + found.offset).tolist(), rows.tolist(), strict=True))
    if found.any_row is not None and not found.any_row[0]:
        assert not expected
    else:
        assert written == expected
    assert not fixed or len(found.block) == batch.num_tokens  # whichever rows are written


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(lens=st.lists(st.integers(0, 4), min_size=1, max_size=8), data=st.data())
def test_rows_of_sequences(lens: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.permutations(range(len(lens))))[: data.draw(st.integers(0, len(lens)))]
    start = np.cumsum([0, *lens]).astype(np.int32)
    rows = query_rows(start, np.array(chosen, np.intp))
    expected = [t for s in chosen for t in range(start[s], start[s + 1])]
    assert np.arange(start[-1])[rows].tolist() == expected


def test_decodes_and_prefills() -> None:
    lens = np.array([1, 0, 8, 9, 2], np.int32)
    assert [part.tolist() for part in split_decodes(lens)] == [[0], [2, 3, 4]]
    assert [part.tolist() for part in split_decodes(lens, 8)] == [[0, 2, 4], [3]]


@pytest.mark.parametrize(
    ("new", "lens", "words"),
    [
        ([1, 1], [5, 17], "3 query rows in 3 sequences"),
        ([2, 1, 0], [5, 17, 3], r"\(1, 1, 1 queries\).*\(2, 1, 0\)"),
        ([1, 1, 1], [5, 17, 65], "max_seq_len"),
    ],
)
def test_what_does_not_fit_a_fixed_plan(new: list[int], lens: list[int], words: str) -> None:
    tables = [list(range(8 * s, 8 * s + 8)) for s in range(3)]
    old = ad.AttentionMetadata.build([1, 1, 1], [5, 17, 30], tables, BLOCK).view("decoder")
    check_renewable(old, old, 64)
    with pytest.raises(PlanError, match=words):
        check_renewable(old, ad.AttentionMetadata.build(new, lens, tables[: len(new)], BLOCK).view("decoder"), 64)
