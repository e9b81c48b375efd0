"""Edges of the contract that one broken operator moves: first slots, last ids, split and joint layouts, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attn_dispatch import AttentionMetadata, AttentionSpec, attention
from attn_dispatch.contract import CacheLayout
from attn_dispatch.contract.spec import CacheGeometry
from attn_dispatch.errors import ArrayError, CacheError, MetadataError
from attn_dispatch.merge import merge_states
from attn_dispatch.reference import ReferenceBackend

SPEC = AttentionSpec(num_heads=2, num_kv_heads=2, head_size=16, dtype="float32", block_size=4)
LAYOUTS = {
    "joint": CacheLayout("test joint", (("pages", "N B K 2 D"),)),
    "split": CacheLayout("test split", (("key", "N K D/8 B D%8"), ("value", "N K D B"))),
}


class Laid(ReferenceBackend):
    """The reference, with its caches in another order."""

    def __init__(self, layout: CacheLayout) -> None:
        super().__init__("laid")
        self.order = layout

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        return self.order


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_joint_and_split_layouts_hold_what_is_put_into_them(name: str) -> None:
    layout, geometry = LAYOUTS[name], SPEC.geometry
    shapes = layout.shapes(geometry, 3)
    assert dict(shapes) == (
        {"pages": (3, 4, 2, 2, 16)} if name == "joint" else {"key": (3, 2, 2, 4, 8), "value": (3, 2, 16, 4)}
    )
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((3, 2, 4, 16)).astype(np.float32) for _ in range(2))
    arrays = {part: np.zeros(shape, np.float32) for part, shape in shapes.items()}
    layout.put_logical(arrays, key, value)
    for got, put in zip(layout.to_logical(arrays), (key, value), strict=True):
        assert np.array_equal(got, put)
    if name == "joint":
        assert np.array_equal(arrays["pages"][1, 2, 0], np.stack([key[1, 0, 2], value[1, 0, 2]]))
    else:
        assert arrays["key"][1, 0, 1, 2, 3] == key[1, 0, 2, 11]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_caches_convert_between_them_and_back(name: str) -> None:
    cache = attention(SPEC, "reference").allocate(3)
    rng = np.random.default_rng(1)
    for array in cache.arrays.values():
        array[...] = rng.standard_normal(array.shape)
    other = Laid(LAYOUTS[name]).to_layout(cache, LAYOUTS[name])
    assert all(np.array_equal(a, b) for a, b in zip(other.gather([2, 0]), cache.gather([2, 0]), strict=True))
    back = other.to_layout("NHD")
    assert all(np.array_equal(a, b) for a, b in zip(back.gather([0, 1, 2]), cache.gather([0, 1, 2]), strict=True))


def test_layouts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(CacheError, match="each of N K B D must occur once"):
        CacheLayout("bad", (("key", "N K B B D"), ("value", "N K B D")))
    with pytest.raises(CacheError):
        LAYOUTS["split"].shapes(CacheGeometry(2, 12, 12, 4, "float32"), 1)


def test_ids_at_the_ends_of_a_cache() -> None:
    cache = attention(SPEC, "reference").allocate(3)
    for array in cache.arrays.values():
        array[...] = np.arange(array.size, dtype=np.float32).reshape(array.shape)
    cache.copy_slots([0], [11])
    key, _ = cache.gather([0, 2])
    assert np.array_equal(key[1, :, 3], key[0, :, 0])
    for ids, words in (([0, 3], "block 3 is outside"), ([0, -1], "block -1 is outside")):
        with pytest.raises(CacheError, match=words):
            cache.gather(ids)
    for ids in (np.array([0.0]), np.array([[0]])):
        with pytest.raises(CacheError, match="whole numbers in one row"):
            cache.gather(ids)
    with pytest.raises(CacheError, match="2 source blocks, 1 target"):
        cache.copy_blocks([0, 1], [2])
    assert cache.arrays_as("numpy")["key"] is cache.arrays["key"]


def test_slot_0_is_a_slot_like_any_other() -> None:
    batch = AttentionMetadata.build([1, 2], [1, 2], [[0], [1]], 4)
    assert batch.slot_mapping.tolist() == [0, 4, 5]
    assert batch.view("decoder").side.num_written == 3
    with pytest.raises(MetadataError, match="sequences 0 and 1"):
        AttentionMetadata.build([1, 1], [1, 1], [[0], [0]], 4)
    padded = AttentionMetadata.build([2, 1], [2, 0], [[0], []], 4)
    assert padded.slot_mapping.tolist() == [0, 1, -1]
    assert padded.view("decoder").side.num_written == 2
    # As many rows as sequences, and not one each.
    uneven = AttentionMetadata.build([2, 0], [6, 3], [[0, 2], [1]], 4)
    assert uneven.slot_mapping.tolist() == [8, 9]


def test_errors_name_the_sequence_that_is_wrong_and_no_other() -> None:
    with pytest.raises(MetadataError, match="sequence 1: query_lens=-1"):
        AttentionMetadata.build([0, -1], [0, 3], [[0], [0]], 4)
    with pytest.raises(MetadataError, match="whole number"):
        AttentionMetadata.build(np.zeros((0, 2), np.int32), [], [], 4)
    assert AttentionMetadata.build([], [], [], 4).num_tokens == 0
    assert AttentionMetadata.build([0, 1], [0, 3], [[], [0]], 4).num_tokens == 1


def test_an_encoder_is_given_whole_or_not_at_all() -> None:
    whole = AttentionMetadata.build([1], [3], [[0]], 4, encoder_seq_lens=[5], encoder_block_tables=[[1, 2]])
    arrays: dict[str, Any] = {
        name: getattr(whole, name)
        for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping", "block_size")
    }
    encoder = {
        name: getattr(whole, name)
        for name in ("encoder_start_loc", "encoder_seq_lens", "encoder_block_table", "encoder_slot_mapping")
    }
    again = AttentionMetadata(**arrays, **encoder)
    assert again.encoder_slot_mapping.tolist() == whole.encoder_slot_mapping.tolist()
    with pytest.raises(MetadataError, match="together or not at all"):
        AttentionMetadata(**arrays, encoder_start_loc=encoder["encoder_start_loc"])
    with pytest.raises(MetadataError, match="encoder_start_loc"):
        AttentionMetadata(**arrays, **(encoder | {"encoder_start_loc": np.array([0, 5, 5], np.int32)}))
    assert "encoder" in repr(whole)
    assert "encoder" not in repr(AttentionMetadata(**arrays))


def test_which_layers_see_every_key() -> None:
    fields: dict[str, Any] = {"num_heads": 2, "head_size": 16, "dtype": "float32"}
    assert AttentionSpec(kind="cross", **fields).sees_every_key
    assert AttentionSpec(causal=False, writes_kv=False, **fields).sees_every_key
    for other in ({}, {"causal": False}, {"kind": "encoder"}, {"causal": False, "writes_kv": False, "window": (3, 3)}):
        assert not AttentionSpec(**fields, **other).sees_every_key
    assert "causal" not in str(AttentionSpec(**fields))
    assert "causal=True" in str(AttentionSpec(kind="encoder", causal=True, **fields))


def test_a_backend_equals_its_name() -> None:
    backend = ReferenceBackend("mine/own")
    assert backend == "mine/own"
    assert backend != "mine/other"
    assert backend != ReferenceBackend("mine/own")


class Foreign:
    """What a tensor of another library looks like to `library_of`."""

    __module__ = "torch"
    dtype = "float32"


def test_states_of_two_libraries_are_refused_whichever_part_it_is() -> None:
    out, lse = np.zeros((1, 2, 3), np.float32), np.zeros((1, 2), np.float32)
    for second in ((out, Foreign()), (Foreign(), lse)):
        with pytest.raises(ArrayError, match="state 1 is of"):
            merge_states([(out, lse), second])
