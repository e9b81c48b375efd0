"""A padded batch in blocks: a table always says what a plain list of tokens says, whoever shares blocks with whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="not run: needs torch")

from attn_dispatch.cache import CacheManager
from attn_dispatch.errors import CacheError
from attn_dispatch.integrations.padded_batch import PaddedBatch

B = 4


def batch_of(rows: int, num_blocks: int, *, grows: bool = False) -> tuple[PaddedBatch, CacheManager]:
    manager = CacheManager(num_blocks, B)
    batch = PaddedBatch(manager, grows=grows)
    batch.begin(rows)
    return batch, manager


def counts(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


def test_a_growing_pool_keeps_the_blocks_that_are_used() -> None:
    batch, manager = batch_of(2, 2, grows=True)
    first = batch.extend(counts(8, 0)).block_table
    second = batch.extend(counts(0, 12)).block_table
    assert manager.num_blocks == 5
    assert sorted([*first[0].tolist(), *second[0].tolist()]) == [0, 1, 2, 3, 4]
    assert manager.pool.in_use == 5


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    batch, _ = batch_of(2, 2)
    batch.extend(counts(4, 3))
    with pytest.raises(CacheError, match=r"1 device blocks are needed, 0 are available.*num_blocks="):
        batch.extend(counts(1, 1))
    assert batch.lens.tolist() == [4, 3]
    assert batch.extend(counts(0, 1)).seq_lens.tolist() == [4]


def test_more_tokens_than_there_are_cannot_be_forgotten() -> None:
    batch, _ = batch_of(2, 4)
    batch.extend(counts(5, 3))
    with pytest.raises(CacheError, match="sequence 1: 4 tokens are to be removed, it has 3"):
        batch.truncate(4)
    assert batch.lens.tolist() == [5, 3]


def test_rows_that_do_not_exist_cannot_be_selected() -> None:
    batch, _ = batch_of(2, 2)
    with pytest.raises(CacheError, match=r"rows \[0, 2\] are to be kept of a batch of 2 sequences"):
        batch.select(np.array([0, 2]))
    assert batch.count == 2


def test_nothing_is_left_in_the_prefix_cache() -> None:
    batch, manager = batch_of(1, 4)
    batch.extend(counts(9))
    batch.begin(1)
    assert (manager.usage().cached_blocks, manager.usage().free_blocks) == (0, 4)


class Model:
    """The same as lists of tokens, each token a number of its own; `memory` is what a cache would store."""

    def __init__(self, rows: int) -> None:
        self.batch, self.manager = batch_of(rows, 1, grows=True)
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.memory: dict[int, int] = {}
        self.next = 0

    def extend(self, new: list[int]) -> None:
        step = self.batch.extend(counts(*new))
        old = dict(self.memory)
        for source, target in zip(step.copy_from, step.copy_to, strict=True):
            for offset in range(B):
                if source * B + offset in old:
                    self.memory[target * B + offset] = old[source * B + offset]
        tokens = list(range(self.next, self.next + sum(new)))
        self.next += sum(new)
        self.memory.update(zip(step.metadata.slot_mapping.tolist(), tokens, strict=True))
        for text, count in zip(self.texts, new, strict=True):
            text += tokens[:count]
            del tokens[:count]
        assert step.query_lens.tolist() == [count for count in new if count]
        for text, seq in zip(self.texts, self.batch.rows, strict=True):
            assert [self.memory[int(seq.blocks[i // B]) * B + i % B] for i in range(seq.computed)] == text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_say_what_lists_say(data: st.DataObject) -> None:
    model = Model(data.draw(st.integers(1, 4), label="rows"))
    for _ in range(data.draw(st.integers(1, 12), label="steps")):
        alive = len(model.texts)
        do = data.draw(st.sampled_from(["extend", "select", "truncate"]), label="do")
        if do == "extend":
            model.extend(data.draw(st.lists(st.integers(0, 9), min_size=alive, max_size=alive)))
        elif do == "select":
            order = data.draw(st.lists(st.integers(0, alive - 1), min_size=1, max_size=4))
            model.batch.select(np.array(order))
            model.texts = [list(model.texts[i]) for i in order]
        else:
            count = data.draw(st.integers(0, min(map(len, model.texts))))
            model.batch.truncate(count)
            model.texts = [text[: len(text) - count] for text in model.texts]
        assert model.batch.lens.tolist() == [len(text) for text in model.texts]
    model.batch.clear()
    assert model.manager.pool.num_free == model.manager.num_blocks
