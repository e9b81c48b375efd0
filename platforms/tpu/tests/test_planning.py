"""Batches as the kernels get them."""

from __future__ import annotations

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.errors import PlanError
from attn_dispatch_tpu.kernels import Fused, Fused64, Ragged
from attn_dispatch_tpu.planning import NOWHERE, PackedBatch, pack
from attn_dispatch_tpu.tiles import SMEM_BYTES, VMEM_BYTES, Tiles, bucket, choose_tiles, table_bytes

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, block_size=16)


def parts(batch: PackedBatch) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for name, size in batch.shape.parts:
        found[name] = batch.integers[at : at + size]
        at += size
    assert at == len(batch.integers)
    return found


def packed(query_lens: list[int], seq_lens: list[int], *, fused: bool = False, **more: object) -> PackedBatch:
    counts = [-(-n // 16) for n in seq_lens]
    tables = [[sum(counts[:s]) + i for i in range(n)] for s, n in enumerate(counts)]
    batch = ad.AttentionMetadata.build(query_lens, seq_lens, tables, 16, **more)  # type: ignore[arg-type]
    return pack(SPEC, batch.view("decoder"), fused=fused, token_floor=16)


def test_a_kernel_is_given_no_sequence_without_queries_or_keys() -> None:
    batch = packed([2, 3, 0, 1], [18, 0, 7, 5])
    found = parts(batch)
    assert batch.shape.masks_rows
    assert not batch.shape.permutes
    assert found["counts"].tolist() == [3, 0]
    assert found["lengths"][:4].tolist() == [18, 3, 5, 0]  # padding reads block 0, and its rows are cleared afterwards
    assert found["table"].reshape(8, -1)[1].tolist() == [0] * 8
    assert found["starts"][:5].tolist() == [0, 2, 5, 6, 6]
    assert found["valid"][:7].tolist() == [1, 1, 0, 0, 0, 1, 0]
    assert (found["slots"][2:5] == NOWHERE).all()


def test_rows_come_back_from_where_they_went() -> None:
    found = parts(packed([3, 1, 2, 1], [18, 40, 2, 7], fused=True))
    assert (found["order"][found["back"]] == np.arange(16)).all()


def test_a_batch_that_only_writes_has_room_for_its_rows() -> None:
    side = ad.AttentionMetadata.build([20], [20], [[0, 1]], 16).view("decoder").side
    batch = pack(SPEC, ad.AttentionMetadata.write_only(side).view("decoder"), fused=False, token_floor=16)
    assert batch.shape.tokens == 32
    assert parts(batch)["slots"][:21].tolist() == [*range(20), NOWHERE]
    assert parts(batch)["counts"].tolist() == [0, 0]


def test_a_fused_kernel_gets_its_decodes_first() -> None:
    batch = packed([3, 1, 2, 1], [18, 40, 2, 7], fused=True)
    found = parts(batch)
    assert found["counts"].tolist() == [4, 2]
    assert found["lengths"][:4].tolist() == [40, 7, 18, 2]
    assert found["order"][:7].tolist() == [3, 6, 0, 1, 2, 4, 5]
    assert found["table"].reshape(8, -1)[0, :3].tolist() == [2, 3, 4]
    assert not packed([1, 1, 2], [40, 7, 2], fused=True).shape.permutes


def test_rows_that_are_not_written_are_read_from_where_they_are() -> None:
    batch = packed([3], [18], fused=True, slot_mapping=[15, -1, 17])
    assert not batch.shape.writes_last
    assert parts(batch)["own"][:4].tolist() == [15, 16, 17, NOWHERE]
    assert packed([3], [18], fused=True).shape.writes_last


def test_a_block_table_beyond_scalar_memory_is_refused() -> None:
    with pytest.raises(PlanError, match="scalar"):
        packed([1] * 1100, [130 * 16] * 1100)


def test_sizes_are_rounded_up_to_few() -> None:
    assert [bucket(n, 16, 512) for n in (1, 16, 17, 500, 512, 513, 1200)] == [16, 16, 32, 512, 512, 1024, 1536]
    assert len({bucket(n, 8, 256) for n in range(1, 1025)}) == 9


@pytest.mark.parametrize("kernel", [Ragged(), Fused(), Fused64()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (32, 8), (128, 8), (96, 1), (64, 64)])
@pytest.mark.parametrize("block_size", [1, 16, 32, 512])
def test_tiles_fit(kernel: Ragged | Fused, heads: tuple[int, int], block_size: int) -> None:
    spec = ad.AttentionSpec(num_heads=heads[0], num_kv_heads=heads[1], head_size=64, block_size=block_size)
    step = kernel.grid_step(spec)
    for pages_per_seq, tokens in ((8, 16), (128, 2048)):
        tiles = choose_tiles(step, pages_per_seq, tokens)
        assert 1 <= tiles.pages <= pages_per_seq
        assert 1 <= tiles.queries <= tokens
        if step.fits:
            assert step.vmem_bytes(tiles) <= VMEM_BYTES
    assert step.vmem_bytes(Tiles(1, 1)) <= step.vmem_bytes(Tiles(2, 1))


def test_padding_is_the_least_that_the_kernel_can_address() -> None:
    def padded(heads: int, kv_heads: int, **fields: str) -> tuple[int, int]:
        spec = ad.AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, **fields)  # type: ignore[arg-type]
        return Ragged().kv_heads(spec), Ragged().group(spec)

    assert padded(32, 8) == (8, 4)
    assert padded(9, 3) == (4, 3)
    assert padded(40, 10) == (16, 4)
    assert padded(4, 1, kv_cache_dtype="float8_e4m3fn") == (2, 4)
    assert padded(16, 16, dtype="float32") == (16, 2)
    assert padded(24, 8, dtype="float32") == (8, 3)


def test_the_estimate_of_scalar_memory_counts_whole_rows() -> None:
    assert table_bytes(1920, 128) <= SMEM_BYTES < table_bytes(2048, 128)
    assert table_bytes(8, 1) == table_bytes(8, 128)
