"""What the op is told of a batch: `max_context_len` exactly, blocks inside the cache, lists that agree."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dispatch import AttentionMetadata
from attn_dispatch_openvino.device_batch import DeviceBatch, paged_batch

NAME = "openvino/paged"
BLOCK = 32


def check(batch: DeviceBatch, num_blocks: int) -> None:
    """The lists are what keeps the op inside its memory: every relation between them, spelled out."""
    lens, used = np.diff(batch.begins), np.diff(batch.block_begins)
    keys = batch.past_lens + lens
    assert batch.max_context_len == keys.max()
    assert (batch.past_lens >= 0).all()
    assert (lens > 0).all()
    assert batch.begins[0] == batch.block_begins[0] == 0
    assert batch.begins[-1] == batch.num_rows
    np.testing.assert_array_equal(used, -(-keys // BLOCK))
    assert batch.block_begins[-1] <= len(batch.blocks)
    assert batch.blocks.min() >= 0
    assert batch.blocks.max() < num_blocks
    for array in (batch.past_lens, batch.begins, batch.blocks, batch.block_begins):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 70), st.booleans()), min_size=1, max_size=6),
    rows_at_once=st.sampled_from([None, 1]),
    causal=st.booleans(),
    clears=st.booleans(),
    shared=st.booleans(),
)
def test_any_batch(
    sequences: list[tuple[int, int, bool]], rows_at_once: int | None, causal: bool, clears: bool, shared: bool
) -> None:
    new = [n for _, n, _ in sequences]
    lens = [0 if padding else before + n for before, n, padding in sequences]
    ids = iter(np.random.default_rng(0).permutation(60).tolist())
    tables = [[next(ids) for _ in range(-(-n // BLOCK))] for n in lens]
    if shared and len(lens) > 1 and lens[0] and lens[1]:
        tables[1][0] = tables[0][0]  # a prefix in common, up to the middle of a block or to its end
    slots = [-1] * sum(new)  # nobody writes: two may share any block
    view = AttentionMetadata.build(new, lens, tables, BLOCK, slot_mapping=slots).view("decoder")
    batch = paged_batch(view, causal=causal, rows_at_once=rows_at_once, clears_tails=clears)
    seen = [m for n, m in zip(new, lens, strict=True) if n and m]
    if not seen:
        assert batch is None
        return
    assert batch is not None
    check(batch, 60)
    assert batch.max_context_len == max(seen)
    assert batch.num_rows == sum(n for n, m in zip(new, lens, strict=True) if m)


def test_the_op_is_told_the_exact_length(layer: Callable[..., Any]) -> None:
    """Steps of one size share their tensors: each of them is told its own length, every time that it runs."""
    it = layer()
    attn, reference = it.on(), it.on("reference")
    cache, checked = attn.allocate(20), reference.allocate(20)
    fill = AttentionMetadata.build([600], [600], [list(range(20))])
    rows = it.arrays(600)
    attn.run(attn.plan(fill), *rows, cache)
    reference.run(reference.plan(fill), *rows, checked)
    plans = {n: attn.plan(AttentionMetadata.build([1], [n], [list(range(20))])) for n in (600, 599, 590, 577)}
    q, k, v = rows
    sizes = set()
    for n in (600, 577, 600, 590, 599, 577):
        last = slice(n - 1, n)
        found = attn.run(plans[n], q[last], k[last], v[last], cache)
        expected = reference.run(reference.plan(AttentionMetadata.build([1], [n], [list(range(20))])),
                                 q[last], k[last], v[last], checked)  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=1e-5)
        tensors = plans[n].tensors[1]
        assert int(tensors.tensors["max_context_len"].data) == n
        sizes.add(id(tensors))
    assert len(sizes) == 1


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads_on_one_cache(layer: Callable[..., Any], tokens: int, still_computes: None) -> None:
    """Four callers, a plan each, one cache, blocks of their own: no caller sees another's numbers."""
    it = layer()
    attn = it.on()
    cache = attn.allocate(16)
    work, expected = [], []
    for s in range(4):
        table = [[4 * s + i for i in range(4)]]
        rows = it.arrays(100)
        attn.run(attn.plan(AttentionMetadata.build([100], [100], table)), *rows, cache)
        step = tuple(x[100 - tokens :] for x in rows)
        plan = attn.plan(AttentionMetadata.build([tokens], [100], table))
        work.append((plan, step))
        expected.append(attn.run(plan, *step, cache))
    before = cache.key.copy()
    wrong: list[int] = []
    start = threading.Barrier(4)

    def call(s: int) -> None:
        plan, step = work[s]
        start.wait()
        wrong.extend(s for _ in range(100) if not np.array_equal(attn.run(plan, *step, cache), expected[s]))

    threads = [threading.Thread(target=call, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    np.testing.assert_array_equal(cache.key, before)


def test_new_tokens_that_are_not_the_queries(layer: Callable[..., Any]) -> None:
    """As many rows of k as of q, but other sequences': the op, which takes them for each other's, must not write."""
    it = layer()
    attn, reference = it.on(), it.on("reference")
    batch = AttentionMetadata(
        query_start_loc=np.array([0, 2, 3], np.int32),
        seq_lens=np.array([40, 7], np.int32),
        block_table=np.array([[3, 1], [2, 0]], np.int32),
        slot_mapping=np.array([32 + 7, 2 * 32 + 5, 2 * 32 + 6], np.int64),
        new_start_loc=np.array([0, 1, 3], np.int32),
    )
    context = AttentionMetadata.build([39, 5], [39, 5], [[3, 1], [2]])
    fill, (q, k, v) = it.arrays(44), it.arrays(3)
    caches = []
    outs = []
    for layer_on in (attn, reference):
        cache = layer_on.allocate(4)
        layer_on.run(layer_on.plan(context), *fill, cache)
        outs.append(layer_on.run(layer_on.plan(batch), q, k, v, cache))
        caches.append(cache.gather([0, 1, 2, 3]))
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)
    for stored, expected in zip(*caches, strict=True):
        np.testing.assert_array_equal(stored, expected)
