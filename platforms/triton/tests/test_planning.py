"""What is decided before a kernel runs: tiles by kind of GPU, rows into tiles, keys into parts. No GPU, no Triton."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_dispatch as ad
from attn_dispatch.contract import BatchView
from attn_dispatch_triton.constants import attend_constants, compute_type, tile_sizes
from attn_dispatch_triton.planning import DECODE_TOKENS, decodes_and_prefills, longest_span, num_splits, tile_rows
from attn_dispatch_triton.targets import LARGEST_EXACT_HEAD, LARGEST_HEAD, TARGETS, Target, target_of
from attn_dispatch_triton.tiles import Tiles, decode_tiles, padded, prefill_tiles

KIB = 1024
BY_NAME = {target.name: target for target in TARGETS}
SIZES = [
    (8, 8),
    (64, 64),
    (72, 72),
    (128, 128),
    (192, 128),
    (128, 256),
    (256, 256),
    (512, 512),
    (LARGEST_HEAD, LARGEST_HEAD),
]


def view_of(query_lens: list[int], seq_lens: list[int], block_size: int = 16) -> BatchView:
    pages = -(-max(seq_lens) // block_size)
    tables = [list(range(s * pages, s * pages + -(-n // block_size))) for s, n in enumerate(seq_lens)]
    return ad.AttentionMetadata.build(query_lens, seq_lens, tables, block_size).view("decoder")


@pytest.mark.parametrize(
    ("name", "warp", "shared", "family"),
    [
        ("sm_80", 32, 163 * KIB, "ampere"),
        ("sm_86", 32, 99 * KIB, "ampere"),
        ("sm_90", 32, 227 * KIB, "hopper"),
        ("sm_100", 32, 227 * KIB, "hopper"),
        ("sm_120", 32, 99 * KIB, "ampere"),
        ("gfx90a", 64, 64 * KIB, "cdna"),
        ("gfx942", 64, 64 * KIB, "cdna"),
        ("gfx950", 64, 160 * KIB, "cdna4"),
        ("gfx1100", 32, 64 * KIB, "rdna"),
        ("gfx1201", 32, 64 * KIB, "rdna"),
    ],
)
def test_what_a_gpu_has(name: str, warp: int, shared: int, family: str) -> None:
    target = BY_NAME[name]
    assert (target.warp_size, target.shared_bytes, target.family) == (warp, shared, family)


@pytest.mark.parametrize(
    ("backend", "arch", "warp", "family", "shared"),
    [
        ("hip", "gfx90a:sramecc+:xnack-", 64, "cdna", 64 * KIB),
        ("hip", "gfx942:sramecc+", 64, "cdna", 64 * KIB),
        ("hip", "gfx908", 64, "cdna", 64 * KIB),
        ("hip", "gfx1036", 32, "rdna", 64 * KIB),
        ("cuda", 75, 32, "ampere", 99 * KIB),
        ("cuda", 90, 32, "hopper", 227 * KIB),
        ("xpu", "pvc", 32, "rdna", 64 * KIB),
    ],
)
def test_a_gpu_that_is_in_no_table_gets_the_least(
    backend: str, arch: int | str, warp: int, family: str, shared: int
) -> None:
    target = target_of(backend, arch, warp)
    assert (target.family, target.shared_bytes) == (family, shared)


def needed(tiles: Tiles, head_size: int, value_size: int, element: int) -> int:
    """Bytes that cannot be done without: what a step in flight holds of keys, or of values."""
    return tiles.keys * max(padded(head_size), padded(value_size)) * element


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize(("head_size", "value_size"), SIZES)
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("converted", [False, True])
def test_tiles_are_what_a_kernel_can_take(
    target: Target, head_size: int, value_size: int, element: int, converted: bool
) -> None:
    if element == 4 and head_size > LARGEST_EXACT_HEAD:
        with pytest.raises(ValueError, match="empty"):
            prefill_tiles(target, head_size, value_size, element, converted)
        return
    sizes = (head_size, value_size, element, converted)
    for tiles in (prefill_tiles(target, *sizes), *(decode_tiles(target, *sizes, rows) for rows in (1, 4, 16, 256))):
        for size in (tiles.rows, tiles.keys):
            assert size >= 16, "a matrix product takes 16 at least"
            assert size & (size - 1) == 0
        assert tiles.warps * target.warp_size <= 1024
        assert needed(tiles, *sizes[:3]) <= target.shared_bytes
        assert tiles.stages == 1 or target.shared_bytes > 64 * KIB, "64 KiB hold one step's keys beside the queries"


def test_tiles_differ_where_gpus_do() -> None:
    wide = {name: prefill_tiles(BY_NAME[name], 128, 128, 2, False) for name in ("sm_80", "sm_90", "gfx942", "gfx1100")}
    assert wide["sm_90"].keys > wide["sm_80"].keys, "more shared memory takes more keys"
    assert wide["gfx942"].rows > wide["gfx1100"].rows, "512 registers hold more rows than 256"
    assert wide["sm_90"].stages > wide["gfx942"].stages == 1
    assert prefill_tiles(BY_NAME["gfx950"], 128, 128, 2, False).stages == 2, "160 KiB of LDS hold two steps"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_decode_takes_no_more_rows_than_there_are(target: Target) -> None:
    assert decode_tiles(target, 128, 128, 2, False, 1).rows == 16
    assert decode_tiles(target, 128, 128, 2, False, 20).rows == 32
    most = decode_tiles(target, 128, 128, 2, False, 1000).rows
    assert most == decode_tiles(target, 128, 128, 2, False, 2000).rows


def test_a_head_beyond_the_largest_is_in_no_table() -> None:
    for target in TARGETS:
        with pytest.raises(ValueError, match="empty"):
            prefill_tiles(target, LARGEST_HEAD + 1, 64, 2, False)


def test_operands_of_products() -> None:
    def spec(dtype: str, stored: str) -> ad.AttentionSpec:
        return ad.AttentionSpec(num_heads=8, num_kv_heads=2, dtype=dtype, kv_cache_dtype=stored)

    assert compute_type(spec("bfloat16", "bfloat16"), True) == "bfloat16"
    assert compute_type(spec("bfloat16", "float8_e4m3fn"), True) == "bfloat16"
    assert compute_type(spec("bfloat16", "float16"), True) == "float32", "neither type holds the other"
    assert compute_type(spec("bfloat16", "float16"), False) == "bfloat16", "an encoder's own rows"
    assert tile_sizes(spec("float16", "int8"), True) == (128, 128, 2, True)
    assert attend_constants(spec("float16", "int8"), False, False)["STORED"] == 0


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_every_row_is_in_one_tile(data: st.DataObject) -> None:
    query_lens = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=9))
    group, block_rows = data.draw(st.sampled_from([1, 3, 4, 8])), data.draw(st.sampled_from([16, 32, 128]))
    view = view_of(query_lens, [n + data.draw(st.integers(0, 40)) for n in query_lens])
    decoded, prefilled = decodes_and_prefills(view)
    assert sorted([*decoded, *prefilled]) == [s for s, n in enumerate(query_lens) if n]
    assert all(query_lens[s] <= DECODE_TOKENS for s in decoded)
    assert all(query_lens[s] > DECODE_TOKENS for s in prefilled)
    seen: list[tuple[int, int]] = []
    for sequences in (decoded, prefilled):
        work = tile_rows(sequences, view, group, block_rows)
        assert len(work) == len(work.row)
        for s, first in zip(work.sequence.tolist(), work.row.tolist(), strict=True):
            seen += [(s, row) for row in range(first, min(first + block_rows, query_lens[s] * group))]
    assert sorted(seen) == [(s, row) for s, n in enumerate(query_lens) for row in range(n * group)]


def test_splits_fill_the_processors_and_no_more() -> None:
    assert num_splits(span=32768, block_keys=64, programs=8, processors=132) == 33, "two programs for each processor"
    assert num_splits(span=32768, block_keys=64, programs=256 * 8, processors=132) == 1, "there are enough"
    assert num_splits(span=256, block_keys=64, programs=1, processors=132) == 2, "a part has two steps at least"
    assert num_splits(span=100, block_keys=64, programs=1, processors=132) == 1
    assert num_splits(span=0, block_keys=64, programs=0, processors=132) == 1
    assert num_splits(span=1 << 20, block_keys=16, programs=1, processors=400) == 128


@given(
    span=st.integers(0, 100_000),
    block_keys=st.sampled_from([16, 32, 64]),
    programs=st.integers(0, 5000),
    processors=st.integers(1, 400),
)
@settings(deadline=None, derandomize=True, database=None)
def test_parts_cover_every_key(span: int, block_keys: int, programs: int, processors: int) -> None:
    splits = num_splits(span, block_keys, programs, processors)
    assert 1 <= splits <= 128
    # What the kernel makes of it: whole steps, dealt out from the first part on.
    steps = -(-span // block_keys)
    length = -(-steps // splits) * block_keys
    covered = sum(max(0, min(span, (i + 1) * length) - i * length) for i in range(splits))
    assert covered == span
    assert splits == 1 or length >= 2 * block_keys


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 900),
        ({"window": (99, 0)}, 99 + 2),
        ({"window": (99, 0), "causal": False}, 99 + 2),
        ({"window": (99, 9), "causal": False}, 99 + 9 + 2),
        ({"window": (99, -1), "causal": False}, 900),
        ({"window": (2000, 0)}, 900),
    ],
)
def test_a_window_leaves_less_to_split(fields: dict[str, object], expected: int) -> None:
    spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, block_size=16, **fields)  # type: ignore[arg-type]
    view = view_of([1, 2], [900, 500])
    assert longest_span(np.array([0, 1]), view, spec) == expected
