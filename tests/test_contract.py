"""The contract's own objects: specs, batches, layouts, caches."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attn_dispatch as ad
from attn_dispatch.contract import CacheGeometry, CacheLayout
from attn_dispatch.contract.arrays import as_library, library_of
from attn_dispatch.contract.dtypes import dtype_name, quantise
from attn_dispatch.errors import ArrayError, CacheError, MetadataError, SpecError

LLAMA = ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16", block_size=32)


def test_defaults_are_a_llama_layers() -> None:
    assert LLAMA.scale == pytest.approx(128**-0.5)
    assert (LLAMA.causal, LLAMA.window, LLAMA.logits_soft_cap, LLAMA.kind) == (True, (-1, -1), None, "decoder")
    assert (LLAMA.value_head_size, LLAMA.kv_cache_dtype, LLAMA.writes_kv) == (128, "bfloat16", True)
    assert ad.AttentionSpec(num_heads=4).num_kv_heads == 4


def test_a_spec_is_frozen_hashable_and_has_one_form() -> None:
    with pytest.raises(FrozenInstanceError):
        LLAMA.num_heads = 3  # type: ignore[misc]
    assert len({LLAMA, replace(LLAMA), replace(LLAMA, window=(-1, 0)), replace(LLAMA, logits_soft_cap=0)}) == 1
    assert replace(LLAMA, window=[511, -1]).window == (511, 0)
    assert ad.AttentionSpec(num_heads=4, dtype="bf16") == ad.AttentionSpec(num_heads=4, dtype=ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 5, "num_kv_heads": 2}, "multiple"),
        ({"head_size": -1}, "head_size=-1"),
        ({"head_size": 1.5}, "head_size=1.5"),
        ({"block_size": True}, "block_size"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"dtype": "floaty"}, "floaty"),
        ({"kv_cache_dtype": "int3"}, "int3"),
        ({"scale": float("nan")}, "scale"),
        ({"window": 5}, "window=5"),
        ({"window": (-2, 0)}, "window"),
        ({"window": (4, 1)}, "causal"),
        ({"logits_soft_cap": -1.0}, "logits_soft_cap"),
        ({"alibi": 1}, "alibi=1"),
        ({"kind": "decoder-only"}, "kind"),
        ({"kind": "cross", "causal": True}, "cross"),
        ({"kind": "cross", "window": (3, -1)}, "cross"),
    ],
)
def test_a_senseless_spec_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words.replace("(", r"\(")):
        ad.AttentionSpec(**({"num_heads": 4} | fields))


def test_what_a_layer_owns_must_fit_its_spec() -> None:
    alibi = replace(LLAMA, alibi=True)
    with pytest.raises(SpecError, match="alibi"):
        ad.attention(alibi, "reference")
    with pytest.raises(SpecError, match="alibi"):
        ad.attention(LLAMA, "reference", alibi_slopes=np.ones(32, np.float32))
    with pytest.raises(SpecError, match=r"\(31,\)"):
        ad.attention(alibi, "reference", alibi_slopes=np.ones(31, np.float32))
    with pytest.raises(SpecError, match="k_scale"):
        ad.attention(LLAMA, "reference", k_scale=2.0)
    with pytest.raises(SpecError, match="k_scale"):
        ad.attention(replace(LLAMA, kv_cache_dtype="int8"), "reference", k_scale=0.0)


def test_build() -> None:
    batch = ad.AttentionMetadata.build([5, 1, 1], [5, 130, 1], [[7], [3, 9, 0, 4, 1], [2]], 32)
    assert batch.query_start_loc.tolist() == [0, 5, 6, 7]
    assert batch.slot_mapping.tolist() == [224, 225, 226, 227, 228, 33, 64]
    assert (batch.max_query_len, batch.max_seq_len, batch.num_decodes, batch.num_prefills) == (5, 130, 2, 1)
    assert (batch.highest_block, batch.context_lens.tolist()) == (9, [0, 129, 0])
    assert [a.dtype for a in (batch.query_start_loc, batch.seq_lens, batch.block_table)] == [np.int32] * 3
    assert batch.slot_mapping.dtype == np.int64


def test_unused_entries_of_a_table_are_harmless() -> None:
    table = np.array([[4, -1, 99999], [2, 3, -7]], dtype=np.int32)
    batch = ad.AttentionMetadata.build([1, 1], [3, 40], table, 32)
    assert batch.block_table.tolist() == [[4, 0, 0], [2, 3, 0]]
    assert batch.highest_block == 4


def test_arrays_by_hand_are_checked_too() -> None:
    good = ad.AttentionMetadata.build([2, 1], [2, 40], [[0], [1, 2]], 32)
    fields = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
    arrays = {name: getattr(good, name) for name in fields}
    ad.AttentionMetadata(**arrays)
    for name, bad in (
        ("query_start_loc", good.query_start_loc.astype(np.int64)),
        ("query_start_loc", np.array([1, 2, 3], np.int32)),
        ("query_start_loc", np.array([0, 3, 2], np.int32)),
        ("seq_lens", good.seq_lens.astype(np.float32)),
        ("seq_lens", good.seq_lens[:1]),
        ("block_table", good.block_table.astype(np.int64)),
        ("block_table", good.block_table[:, :1]),
        ("block_table", good.block_table.tolist()),
        ("slot_mapping", good.slot_mapping.astype(np.int32)),
        ("slot_mapping", good.slot_mapping[:2]),
    ):
        with pytest.raises(MetadataError, match=name):
            ad.AttentionMetadata(**(arrays | {name: bad}))


def test_padding_has_no_length_and_no_slots() -> None:
    batch = ad.AttentionMetadata.build([1, 4], [9, 0], [[1], []], 32)
    assert batch.slot_mapping.tolist() == [40, -1, -1, -1, -1]
    with pytest.raises(MetadataError, match="sequence 1"):
        ad.AttentionMetadata.build([1, 4], [9, 3], [[1], [2]], 32)


def test_cross_and_encoder_see_the_encoders_side() -> None:
    batch = ad.AttentionMetadata.build(
        [1, 2],
        [9, 2],
        [[1], [0]],
        32,
        encoder_seq_lens=[40, 3],
        encoder_query_lens=[0, 3],
        encoder_block_tables=[[5, 2], [7]],
    )
    cross = batch.view("cross")
    assert (cross.num_tokens, cross.num_new, cross.kv_lens.tolist()) == (3, 3, [40, 3])
    assert cross.side.slots.tolist() == [224, 225, 226]
    encoder = batch.view("encoder")
    assert (encoder.num_tokens, encoder.kv_lens.tolist()) == (3, [0, 3])
    with pytest.raises(MetadataError, match="encoder_seq_lens"):
        ad.AttentionMetadata.build([1], [9], [[1]], 32).view("cross")


@given(st.data())
def test_a_batch_is_either_refused_or_stays_inside_the_cache(data: st.DataObject) -> None:
    seqs = data.draw(st.integers(0, 4))
    ints = st.lists(st.integers(-1, 70), min_size=seqs, max_size=seqs)
    query, total = data.draw(ints), data.draw(ints)
    tables = data.draw(st.lists(st.lists(st.integers(-2, 6), max_size=4), min_size=seqs, max_size=seqs))
    try:
        batch = ad.AttentionMetadata.build(query, total, tables, 16, num_blocks=5)
    except ValueError:
        return
    assert batch.highest_block < 5
    assert (batch.block_table >= 0).all()
    written = batch.slot_mapping[batch.slot_mapping >= 0]
    assert len(set(written.tolist())) == len(written)
    assert (written < 5 * 16).all()


GEOMETRY = CacheGeometry(num_kv_heads=2, head_size=16, value_head_size=16, block_size=4, dtype="float32")
LAYOUTS = [
    ad.HND,
    ad.NHD,
    CacheLayout("rocm-like", (("key", "N K D/8 B D%8"), ("value", "N K D B"))),
    CacheLayout("tpu-like", (("pages", "N B K 2 D"),)),
    CacheLayout("heads first", (("key", "K N B D"), ("value", "K N B D"))),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_its_own_inverse(layout: CacheLayout) -> None:
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 3, 2, 4, 16)).astype(np.float32)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes(GEOMETRY, 3).items()}
    layout.put_logical(arrays, key, value)
    found = layout.to_logical(arrays)
    assert np.array_equal(found[0], key)
    assert np.array_equal(found[1], value)


def test_layouts_say_where_an_element_lies() -> None:
    key = np.arange(3 * 2 * 4 * 16, dtype=np.float32).reshape(3, 2, 4, 16)
    rocm = LAYOUTS[2]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in rocm.shapes(GEOMETRY, 3).items()}
    rocm.put_logical(arrays, key, key)
    assert arrays["key"].shape == (3, 2, 2, 4, 8)
    assert arrays["key"][2, 1, 1, 3, 5] == key[2, 1, 3, 13]
    assert arrays["value"][2, 1, 13, 3] == key[2, 1, 3, 13]
    with pytest.raises(CacheError, match="multiple"):
        rocm.shapes(GEOMETRY._replace(head_size=12), 3)
    with pytest.raises(CacheError, match="axes"):
        CacheLayout("broken", (("key", "N K B"), ("value", "N K B D")))
    with pytest.raises(CacheError, match="Did you mean NHD"):
        ad.attention(replace(LLAMA, dtype="float32"), "reference").allocate(1).to_layout("NHDD")


def test_quantisation_rounds_to_even_and_saturates() -> None:
    x = np.array([0.05, 0.15, -0.25, 100.0, -100.0], np.float32)
    assert quantise(x, "int8", 0.1).tolist() == [0, 2, -2, 127, -127]
    assert quantise(np.array([1e6], np.float32), "float8_e4m3fn", 1.0).astype(np.float32).tolist() == [448.0]


def test_types_have_one_name() -> None:
    names = {dtype_name(t) for t in ("bf16", "torch.bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16))}
    assert names == {"bfloat16"}
    with pytest.raises(SpecError, match="complex64"):
        dtype_name(np.complex64)


def test_arrays_know_whose_they_are() -> None:
    assert library_of(np.zeros(1)) == "numpy"
    with pytest.raises(ArrayError, match="list"):
        library_of([1.0])
    with pytest.raises(ArrayError, match="numpy, torch, jax"):
        as_library(np.zeros(1), "cupy")


def test_a_batch_that_only_reads_writes_nothing_and_sees_every_key() -> None:
    rng = np.random.default_rng(0)
    spec = ad.AttentionSpec(num_heads=2, head_size=16, dtype="float32", causal=False, writes_kv=False, block_size=8)
    attn = ad.attention(spec, "reference")
    cache = attn.allocate(4)
    cache.key[...], cache.value[...] = (rng.standard_normal(cache.key.shape) for _ in range(2))
    before = cache.key.copy()
    batch = ad.AttentionMetadata.read_only([5, 1], [3, 20], [[2], [0, 3, 1]], 8)
    assert (batch.num_tokens, batch.own.num_rows, batch.own.num_written) == (6, 0, 0)
    q = rng.standard_normal((6, 2, 16)).astype(np.float32)
    out = attn.run(attn.plan(batch), q, None, None, cache)
    np.testing.assert_array_equal(cache.key, before)
    for rows, blocks, length in ((slice(0, 5), [2], 3), (slice(5, 6), [0, 3, 1], 20)):
        key, value = (x[blocks].transpose(0, 2, 1, 3).reshape(-1, 2, 16)[:length] for x in (cache.key, cache.value))
        weights = np.exp(np.einsum("qhd,khd->hqk", q[rows], key) / 4)
        weights /= weights.sum(2, keepdims=True)
        np.testing.assert_allclose(out[rows], np.einsum("hqk,khd->qhd", weights, value), rtol=1e-5, atol=1e-6)


def test_a_batch_that_only_writes_has_no_queries() -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=16, dtype="float32", block_size=8)
    attn = ad.attention(spec, "reference")
    cache = attn.allocate(4)
    batch = ad.AttentionMetadata.build([3, 1], [3, 20], [[2], [0, 3, 1]], 8)
    write = ad.AttentionMetadata.write_only(batch.own)
    k = np.arange(4 * 2 * 16, dtype=np.float32).reshape(4, 2, 16) + 1
    out = attn.run(attn.plan(write), np.empty((0, 2, 16), np.float32), k, k + 1, cache)
    assert out.shape == (0, 2, 16)
    np.testing.assert_array_equal(cache.key[2, :, :3].transpose(1, 0, 2), k[:3])
    np.testing.assert_array_equal(cache.value[1, :, 3], k[3] + 1)


def test_a_block_that_another_sequence_reads_is_not_written() -> None:
    """An engine's forgotten copy-on-write: sequence 1 would read what sequence 0 writes over its tokens."""
    with pytest.raises(MetadataError, match=r"sequence 0 writes slot 60 .*sequence 1 reads as its token 4 .*copy"):
        ad.AttentionMetadata.build([1, 1], [5, 9], [[7], [7, 3]], 8)
    # The same block below both lengths, in whole: a shared prefix. Beyond the other's tokens: theirs alone.
    ad.AttentionMetadata.build([1, 1], [9, 9], [[7, 2], [7, 3]], 8)
    ad.AttentionMetadata.build([1, 0], [5, 4], [[7], [7]], 8)
    with pytest.raises(MetadataError, match="written twice"):
        ad.AttentionMetadata.build([1, 1], [5, 5], [[7], [7]], 8)
    with pytest.raises(MetadataError, match="sequence 0 reads as its token 4"):
        ad.AttentionMetadata.build([1], [13], [[7, 7]], 8)
    # An engine that hands out a prefix's blocks while they are computed says so.
    ad.AttentionMetadata.build([8, 1], [8, 9], [[7], [7, 3]], 8, shared_writes=True)
    with pytest.raises(MetadataError, match="shared_writes"):
        ad.AttentionMetadata.build([8, 1], [8, 9], [[7], [7, 3]], 8)
    with pytest.raises(MetadataError, match="written twice"):
        ad.AttentionMetadata.build([1, 1], [5, 5], [[7], [7]], 8, shared_writes=True)
    high = 1 << 30  # counted by sorting
    with pytest.raises(MetadataError, match="sequence 1 reads"):
        ad.AttentionMetadata.build([1, 1], [5, 9], [[high], [high, 3]], 8)
    ad.AttentionMetadata.build([1, 1], [9, 9], [[high, 2], [high, 3]], 8)


def test_what_was_checked_cannot_be_changed() -> None:
    lens = np.array([5, 130], np.int32)
    batch = ad.AttentionMetadata.build([5, 1], lens, [[7], [3, 9, 0, 4, 1]], 32)
    for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping", "query_lens"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(batch, name)[...] = 0
    lens[:] = 1  # the caller's own array is not locked, and no longer looked at
    assert batch.seq_lens.tolist() == [5, 130]
    with pytest.raises(MetadataError, match="plain numpy array"):
        ad.AttentionMetadata.build([5, 1], np.ma.masked_array([5, 130]), [[7], [3, 9, 0, 4, 1]], 32)
    with pytest.raises(MetadataError, match="generator"):
        ad.AttentionMetadata.build((n for n in (5, 1)), [5, 130], [[7], [3, 9, 0, 4, 1]], 32)  # type: ignore[arg-type]
    with pytest.raises(MetadataError, match="float"):
        ad.AttentionMetadata.build([1], [3], [[1]], 32, slot_mapping=[34.7])  # type: ignore[list-item]
    with pytest.raises(MetadataError, match="2147483648"):
        ad.AttentionMetadata.build([2**30, 2**30], [2**30, 2**30], None, 32)
    tables = np.array([[2**31 + 5, 0]], np.uint32)
    with pytest.raises(MetadataError, match="entry 0"):
        ad.AttentionMetadata.build([1], [3], tables, 32)


def test_a_batch_of_decodes_advances() -> None:
    """Every step is what `build` gives: across ends of blocks, with padding, with tables that grow."""
    lens, tables = [7, 8, 0, 15], [[3], [5], [], [0, 9]]
    free = iter(range(20, 99))
    batch = ad.AttentionMetadata.build([1] * 4, lens, tables, 8)
    for _ in range(40):
        new = {s: next(free) for s in range(4) if lens[s] and lens[s] % 8 == 0}
        for s, block in new.items():
            tables[s] = [*tables[s], block]
        lens = [n + (n > 0) for n in lens]
        batch = batch.advance(new)
        built = ad.AttentionMetadata.build([1] * 4, lens, tables, 8)
        for name in ("query_start_loc", "seq_lens", "slot_mapping"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(built, name))
        width = built.block_table.shape[1]
        np.testing.assert_array_equal(batch.block_table[:, :width], built.block_table)
        assert not batch.block_table[:, width:].any()
        np.testing.assert_array_equal(batch.own.used_blocks, built.own.used_blocks)
        assert (batch.highest_block, batch.own.num_written) == (built.highest_block, built.own.num_written)
        with pytest.raises(ValueError, match="read-only"):
            batch.seq_lens[0] = 0


def test_a_batch_does_not_advance_into_what_others_read() -> None:
    batch = ad.AttentionMetadata.build([1, 1], [8, 15], [[3], [5, 6]], 8)
    for new, words in (
        ({}, r"sequences \[0\] begin a new block"),
        ({0: 7, 1: 8}, r"new_blocks has one for \[0, 1\]"),
        ({0: -1}, "a block id is 0 or more"),
        ({0: 5}, "sequence 0 writes slot 40 .* sequence 1 reads"),
    ):
        with pytest.raises(MetadataError, match=words):
            batch.advance(new)
    # One behind the other in a shared block: fine now, not in the next step.
    behind = ad.AttentionMetadata.build([1, 0], [6, 5], [[3], [3]], 8)
    with pytest.raises(MetadataError, match="no new token"):
        behind.advance()
    with pytest.raises(MetadataError, match="batches of decodes"):
        ad.AttentionMetadata.build([2], [8], [[3]], 8).advance({0: 1})
    older = ad.AttentionMetadata.build([1], [8], [[3]], 8)
    newer = older.advance({0: 4})
    assert older.block_table.tolist() == [[3]]
    assert newer.block_table[0, :2].tolist() == [3, 4]


def test_an_axis_is_not_split_by_half() -> None:
    for axes in ("N K D/8 B", "N K B D%8"):
        with pytest.raises(ad.errors.CacheError, match="must occur once"):
            ad.CacheLayout("half", (("key", axes), ("value", "N K B D")))
