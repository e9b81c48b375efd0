"""The host's part for real: batches cut, lists of tokens, rows that attend to nothing, what is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch_rocm.batch import cut, token_list, writes_of


def spec(**fields: Any) -> ad.AttentionSpec:
    return ad.AttentionSpec(**({"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 16} | fields))


# A decode, a prompt, a chunk, padding, and a sequence that waits.
BATCH = ad.AttentionMetadata.build(
    query_lens=[1, 9, 20, 3, 0],
    seq_lens=[37, 9, 40, 0, 5],
    block_tables=[[3, 1, 8], [5], [0, 7, 2], [], [4]],
    block_size=16,
)


def test_a_batch_without_what_kernels_cannot_be_given() -> None:
    batch = cut(BATCH.view("decoder"), spec(), paged=True)
    assert batch.query_start.tolist() == [0, 1, 10, 30, 33]
    assert batch.lens.tolist() == [37, 9, 40, 3]
    assert batch.key_start.tolist() == [0, 37, 46, 86, 89]
    assert batch.tables.tolist() == [[3, 1, 8], [5, 0, 0], [0, 7, 2], [0, 0, 0]]
    assert batch.idle is not None
    assert np.flatnonzero(batch.idle).tolist() == [30, 31, 32]
    assert (batch.max_query, batch.min_query, batch.max_keys, batch.uniform) == (20, 1, 40, False)


def test_rows_of_the_table_cover_whole_tiles() -> None:
    """40 tokens are one tile of 64: four blocks are looked up, the last of them unused."""
    batch = cut(BATCH.view("decoder"), spec(), paged=True, tile=64)
    assert batch.tables.shape == (4, 4)
    assert (batch.tables[:, 3] == 0).all()
    assert batch.tables.flags.c_contiguous


@pytest.mark.parametrize(
    ("fields", "queries", "keys", "idle"),
    [
        ({"kind": "cross"}, 3, 5, []),
        ({"kind": "cross"}, 3, 2, []),
        ({"kind": "cross"}, 3, 0, [0, 1, 2]),
    ],
    ids=str,
)
def test_cross_rows(fields: dict[str, Any], queries: int, keys: int, idle: list[int]) -> None:
    metadata = ad.AttentionMetadata.build(
        query_lens=[queries],
        seq_lens=[queries],
        block_tables=[[1]],
        block_size=16,
        encoder_seq_lens=[keys],
        encoder_block_tables=[[2] if keys else []],
    )
    batch = cut(metadata.view("cross"), spec(**fields), paged=True)
    assert ([] if batch.idle is None else np.flatnonzero(batch.idle).tolist()) == idle
    assert batch.lens.tolist() == [keys or queries]


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (3, 0), (0, 2), (2, 2), (-1, 0), (5, -1)])
@pytest.mark.parametrize(("queries", "keys"), [(6, 2), (6, 5), (6, 6), (4, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_idle_rows_are_those_that_the_reference_finds(
    window: tuple[int, int], queries: int, keys: int, causal: bool
) -> None:
    """Sequences with fewer keys than queries occur in no decoder's batch; the rule is general all the same."""
    from attn_dispatch_rocm.batch import _idle

    if causal and window[1] not in (0, -1):
        pytest.skip("refused: a causal layer looks back only")
    layer = spec(causal=causal, window=window)
    found = _idle(np.array([queries], np.int32), np.array([keys], np.int32), layer)
    left, right = layer.window[0], 0 if causal else layer.window[1]
    expected = []
    for row in range(queries):
        at = keys - queries + row
        seen = [j for j in range(keys) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)]
        expected.append(not seen)
    assert (found is None) == (not any(expected))
    if found is not None:
        assert found.tolist() == expected


def test_a_list_of_tokens() -> None:
    """Slot of every key, in order; sequences that see nothing read block 0; zeros beyond the end."""
    batch = cut(BATCH.view("decoder"), spec(), paged=True)
    places = token_list(batch, spec(), paged=True, spare=4)
    assert places.dtype == np.int32
    expected = [3 * 16 + i for i in range(16)] + [16 + i for i in range(16)] + [8 * 16 + i for i in range(5)]
    expected += [5 * 16 + i for i in range(9)]
    expected += [*range(16), *range(7 * 16, 8 * 16), *range(32, 40)]
    expected += [0, 1, 2]
    assert places.tolist() == [*expected, 0, 0, 0, 0]


def test_a_list_of_an_encoders_rows() -> None:
    encoded = ad.AttentionMetadata.build([5, 0, 3], [5, 0, 3])
    batch = cut(encoded.view("encoder"), spec(kind="encoder"), paged=False)
    assert token_list(batch, spec(), paged=False, spare=2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert batch.tables.shape == (2, 0)


def test_no_sequence_at_all() -> None:
    empty = ad.AttentionMetadata.build([], [], [], 16)
    batch = cut(empty.view("decoder"), spec(), paged=True)
    assert (batch.num_seqs, batch.num_tokens, batch.max_keys) == (0, 0, 0)
    assert token_list(batch, spec(), paged=True, spare=1).tolist() == [0]


def test_what_is_written() -> None:
    all_rows = writes_of(np.array([17, 0, 33]), 16)
    assert all_rows is not None
    assert (all_rows.rows, all_rows.block.tolist(), all_rows.offset.tolist()) == (None, [1, 0, 2], [1, 0, 1])
    some = writes_of(np.array([-1, 5, -1, 40]), 16)
    assert some is not None
    assert some.rows is not None
    assert (some.rows.tolist(), some.block.tolist(), some.offset.tolist()) == ([1, 3], [0, 2], [5, 8])
    assert writes_of(np.array([-1, -1]), 16) is None
    assert writes_of(np.zeros(0, np.int64), 16) is None
