"""Cutting batches up, against what each query should see; without a vendor."""

from __future__ import annotations

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch_ipex.steps import Route, cut, direct_pages, route

BOTH, ONLY_ONE, ONLY_MANY = Route(True, True), Route(True, False), Route(False, True)


def spec(**fields: object) -> ad.AttentionSpec:
    return ad.AttentionSpec(**({"num_heads": 2, "dtype": "float32", "block_size": 4} | fields))  # type: ignore[arg-type]


def rows(which: slice | np.ndarray | None) -> list[int]:
    if which is None:
        return []
    return list(range(which.start, which.stop)) if isinstance(which, slice) else which.tolist()


# Sequence 1 is a prompt, 2 is padding, 3 has nothing new.
BATCH = ad.AttentionMetadata.build(
    query_lens=[1, 3, 2, 0, 1],
    seq_lens=[9, 7, 0, 5, 4],
    block_tables=[[5, 2, 8], [1, 7], [], [9, 3], [6]],
    block_size=4,
)


def test_decodes_and_prefills_are_told_apart() -> None:
    view = BATCH.view("decoder")
    steps = cut(spec(), view, view.side.table, 4, BOTH)
    assert steps.one_token is not None
    assert steps.varlen is not None
    assert rows(steps.one_token.rows) == [0, 6]
    assert steps.one_token.lens.tolist() == [9, 4]
    assert steps.one_token.tables.tolist() == [[5, 2, 8], [6, 0, 0]]
    assert rows(steps.varlen.rows) == [1, 2, 3]
    assert steps.varlen.query_start.tolist() == [0, 3]
    assert steps.varlen.kv_start.tolist() == [0, 7]
    assert steps.varlen.tables.tolist() == [[1, 7]]
    assert rows(steps.idle) == [4, 5]


def test_without_the_decode_op() -> None:
    view = BATCH.view("decoder")
    steps = cut(spec(), view, view.side.table, 4, ONLY_MANY)
    assert steps.one_token is None
    assert steps.varlen is not None
    assert rows(steps.varlen.rows) == [0, 1, 2, 3, 6]
    assert steps.varlen.query_start.tolist() == [0, 1, 4, 5]
    assert steps.varlen.lens.tolist() == [9, 7, 4]


def test_without_the_prefill_op_each_token_sees_what_is_before_it() -> None:
    view = BATCH.view("decoder")
    steps = cut(spec(alibi=True), view, view.side.table, 4, ONLY_ONE)
    assert steps.varlen is None
    assert steps.one_token is not None
    assert rows(steps.one_token.rows) == [0, 1, 2, 3, 6]
    assert steps.one_token.lens.tolist() == [9, 5, 6, 7, 4]
    assert steps.one_token.tables[:, 0].tolist() == [5, 1, 1, 1, 6]


@pytest.mark.parametrize("window", [1, 2, 4, 5, 8, 9])
def test_windows_leave_blocks_out_and_never_a_partition(window: int) -> None:
    table = np.arange(60, dtype=np.int32)[None, ::-1].copy()
    for length in range(1, 200, 3):
        batch = ad.AttentionMetadata.build([1], [length], table, 4)
        view = batch.view("decoder")
        step = cut(spec(window=(window - 1, 0)), view, view.side.table, 4, BOTH).one_token
        assert step is not None
        seen = [table[0, t // 4] * 4 + t % 4 for t in range(max(0, length - window), length)]
        kept = [b * 4 + i for b in step.tables[0] for i in range(4)][: step.longest]
        assert kept[-len(seen) :] == seen
        assert step.longest - window < 4  # under a block, let alone a partition, is left to the op to leave out


def test_no_tokens() -> None:
    batch = ad.AttentionMetadata.build([], [], [], 4)
    view = batch.view("decoder")
    steps = cut(spec(), view, view.side.table, 4, BOTH)
    assert (steps.one_token, steps.varlen, steps.idle) == (None, None, None)


def test_what_the_kernels_get_is_int32_and_contiguous() -> None:
    wide = np.asfortranarray(np.arange(40, dtype=np.int64).reshape(4, 10))[:, ::2]
    batch = ad.AttentionMetadata.build([1, 3, 1, 4], [9, 9, 20, 12], wide, 4)
    view = batch.view("decoder")
    steps = cut(spec(), view, view.side.table, 4, BOTH)
    for step in (steps.one_token, steps.varlen):
        assert step is not None
        for array in (step.tables, step.lens):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous


def test_pages_of_what_is_in_no_cache() -> None:
    batch = ad.AttentionMetadata.build([5, 0, 3], [5, 0, 3])
    tables, slots, num_blocks = direct_pages(batch.view("encoder"), 4)
    assert num_blocks == 3
    assert tables.tolist() == [[0, 1], [0, 0], [2, 0]]
    assert slots.tolist() == [0, 1, 2, 3, 4, 8, 9, 10]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, BOTH),
        ({"block_size": 128}, BOTH),
        ({"block_size": 17}, ONLY_MANY),
        ({"block_size": 256}, ONLY_MANY),
        ({"window": (5, 0)}, BOTH),
        ({"window": (0, 0)}, ONLY_ONE),
        ({"window": (5, 0), "logits_soft_cap": 2.0}, ONLY_MANY),
        ({"logits_soft_cap": 2.0}, BOTH),
        ({"alibi": True}, ONLY_ONE),
        ({"kv_cache_dtype": "float8_e5m2"}, ONLY_MANY),
        ({"kv_cache_dtype": "float8_e5m2", "dtype": "bfloat16"}, BOTH),
        ({"alibi": True, "block_size": 17}, Route(False, False)),
    ],
)
def test_routes(fields: dict[str, object], expected: Route) -> None:
    asked = spec(**fields)
    assert route(asked, asked.block_size, asked.kv_cache_dtype) == expected
