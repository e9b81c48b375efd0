"""Cutting batches up, checked by what each query should see; without a vendor."""

from __future__ import annotations

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch_ipex.paged_cpu_batch import DecodeGroup, PrefillGroup, UsableOps, cacheless_tables, cut, usable_ops

BOTH, ONLY_DECODE, ONLY_PREFILL = UsableOps(True, True), UsableOps(True, False), UsableOps(False, True)


def spec(**fields: object) -> ad.AttentionSpec:
    return ad.AttentionSpec(**({"num_heads": 2, "dtype": "float32", "block_size": 4} | fields))  # type: ignore[arg-type]


def rows(which: slice | np.ndarray) -> list[int]:
    return list(range(which.start, which.stop)) if isinstance(which, slice) else which.tolist()


def groups(
    layer: ad.AttentionSpec, metadata: ad.AttentionMetadata, ops: UsableOps
) -> tuple[DecodeGroup | None, PrefillGroup | None]:
    batch = HostBatch.of(metadata.view("decoder"), layer, paged=True)
    return cut(layer, batch, batch.tables, 4, ops)


# Sequence 1 is a prompt, 2 is padding (which is computed and cleared afterwards), 3 has nothing new.
BATCH = ad.AttentionMetadata.build(
    query_lens=[1, 3, 2, 0, 1],
    seq_lens=[9, 7, 0, 5, 4],
    block_tables=[[5, 2, 8], [1, 7], [], [9, 3], [6]],
    block_size=4,
)


def test_decodes_and_prefills_are_told_apart() -> None:
    decode, prefill = groups(spec(), BATCH, BOTH)
    assert decode is not None
    assert prefill is not None
    assert rows(decode.rows) == [0, 6]
    assert decode.lens.tolist() == [9, 4]
    assert decode.tables.tolist() == [[5, 2, 8], [6, 0, 0]]
    assert rows(prefill.rows) == [1, 2, 3, 4, 5]
    assert prefill.query_start.tolist() == [0, 3, 5]
    assert prefill.key_start.tolist() == [0, 7, 9]
    assert prefill.tables.tolist() == [[1, 7], [0, 0]]
    assert (prefill.max_query, prefill.max_keys) == (3, 7)


def test_without_the_decode_op() -> None:
    decode, prefill = groups(spec(), BATCH, ONLY_PREFILL)
    assert decode is None
    assert prefill is not None
    assert rows(prefill.rows) == [0, 1, 2, 3, 4, 5, 6]
    assert prefill.query_start.tolist() == [0, 1, 4, 6, 7]
    assert np.diff(prefill.key_start).tolist() == [9, 7, 2, 4]


def test_without_the_prefill_op_each_token_sees_what_is_before_it() -> None:
    decode, prefill = groups(spec(alibi=True), BATCH, ONLY_DECODE)
    assert prefill is None
    assert decode is not None
    assert rows(decode.rows) == [0, 1, 2, 3, 4, 5, 6]
    assert decode.lens.tolist() == [9, 5, 6, 7, 1, 2, 4]
    assert decode.tables[:, 0].tolist() == [5, 1, 1, 1, 0, 0, 6]


@pytest.mark.parametrize("ops", [BOTH, ONLY_DECODE, ONLY_PREFILL], ids=str)
def test_queries_before_the_first_key_reach_no_op(ops: UsableOps) -> None:
    """More queries than keys: both ops give NaN for such a sequence. What its first queries see is nothing."""
    read = ad.AttentionMetadata.read_only([5, 1, 3], [2, 6, 3], [[4], [1, 2], [3]], 4)
    decode, prefill = groups(spec(writes_kv=False), read, ops)
    given = sorted(row for group in (decode, prefill) if group is not None for row in rows(group.rows))
    assert given == [3, 4, 5, 6, 7, 8]
    if decode is not None:
        assert decode.lens.min() > 0
    if prefill is not None:
        assert (np.diff(prefill.query_start) <= np.diff(prefill.key_start)).all()


@pytest.mark.parametrize("window", [1, 2, 4, 5, 8, 9])
def test_windows_leave_blocks_out_and_never_a_partition(window: int) -> None:
    table = np.arange(60, dtype=np.int32)[None, ::-1].copy()
    for length in range(1, 200, 3):
        batch = ad.AttentionMetadata.build([1], [length], table, 4)
        decode, _ = groups(spec(window=(window - 1, 0)), batch, BOTH)
        assert decode is not None
        seen = [table[0, t // 4] * 4 + t % 4 for t in range(max(0, length - window), length)]
        slots = [b * 4 + i for b in decode.tables[0] for i in range(4)][: decode.max_keys]
        assert slots[-len(seen) :] == seen
        assert decode.max_keys - window < 4  # under a block, let alone a partition, is left to the op to leave out


def test_no_tokens() -> None:
    assert groups(spec(), ad.AttentionMetadata.build([], [], [], 4), BOTH) == (None, None)


def test_what_the_kernels_get_is_int32_and_contiguous() -> None:
    wide = np.asfortranarray(np.arange(40, dtype=np.int64).reshape(4, 10))[:, ::2]
    for group in groups(spec(), ad.AttentionMetadata.build([1, 3, 1, 4], [9, 9, 20, 12], wide, 4), BOTH):
        assert group is not None
        arrays = [array for name, array in vars(group).items() if isinstance(array, np.ndarray) and name != "rows"]
        assert len(arrays) >= 2
        for array in arrays:
            assert array.dtype == np.int32
            assert array.flags.c_contiguous


def test_pages_of_what_is_in_no_cache() -> None:
    view = ad.AttentionMetadata.build([5, 0, 3], [5, 0, 3]).view("encoder")
    batch = HostBatch.of(view, spec(kind="encoder"), paged=False)
    tables, slots, num_blocks = cacheless_tables(batch, 4)
    assert num_blocks == 3
    assert tables.tolist() == [[0, 1], [2, 0]]
    assert slots.tolist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert slots.dtype == np.int32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, BOTH),
        ({"block_size": 128}, BOTH),
        ({"block_size": 17}, ONLY_PREFILL),
        ({"block_size": 256}, ONLY_PREFILL),
        ({"window": (5, 0)}, BOTH),
        ({"window": (0, 0)}, ONLY_DECODE),
        ({"window": (5, 0), "logits_soft_cap": 2.0}, ONLY_PREFILL),
        ({"logits_soft_cap": 2.0}, BOTH),
        ({"alibi": True}, ONLY_DECODE),
        ({"kv_cache_dtype": "float8_e5m2"}, ONLY_PREFILL),
        ({"kv_cache_dtype": "float8_e5m2", "dtype": "bfloat16"}, BOTH),
        ({"alibi": True, "block_size": 17}, UsableOps(False, False)),
    ],
)
def test_usable_ops(fields: dict[str, object], expected: UsableOps) -> None:
    layer = spec(**fields)
    assert usable_ops(layer, layer.block_size, layer.kv_cache_dtype) == expected
