"""Blocks and block tables: a table always says what a plain list of tokens says, whoever shares blocks with whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dispatch.cache import BlockPool
from attn_dispatch.errors import CacheError
from attn_dispatch.integrations.sequences import Sequences

B = 4


def test_a_growing_pool_keeps_the_blocks_that_are_held() -> None:
    sequences = Sequences(B, BlockPool(2), grows=True)
    rows = sequences.add(2)
    first = sequences.extend(rows[:1], np.array([8], np.int32)).metadata.block_table
    second = sequences.extend(rows[1:], np.array([12], np.int32)).metadata.block_table
    assert sequences.pool.num_blocks == 5
    assert sorted([*first[0].tolist(), *second[0].tolist()]) == [0, 1, 2, 3, 4]
    assert sequences.pool.in_use == 5


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    sequences = Sequences(B, BlockPool(2))
    rows = sequences.add(2)
    sequences.extend(rows, np.array([4, 3], np.int32))
    with pytest.raises(CacheError, match="1 blocks are needed and 0 of 2 are free"):
        sequences.extend(rows, np.array([1, 1], np.int32))
    assert sequences.lens.tolist() == [4, 3]
    assert sequences.extend(rows[1:], np.array([1], np.int32)).metadata.seq_lens.tolist() == [4]


def test_more_tokens_than_there_are_cannot_be_forgotten() -> None:
    sequences = Sequences(B, BlockPool(2))
    rows = sequences.add(1)
    sequences.extend(rows, np.array([3], np.int32))
    with pytest.raises(CacheError, match="4 tokens are to be removed, it has 3"):
        sequences.truncate(rows, 4)


def test_a_row_of_an_ended_sequence_is_used_again() -> None:
    sequences = Sequences(B, BlockPool(4))
    rows = sequences.add(3)
    sequences.extend(rows, np.array([5, 1, 2], np.int32))
    sequences.remove(rows[:1])
    assert (sequences.count, sequences.pool.in_use, sequences.num_tokens) == (2, 2, 3)
    assert sequences.add(1).tolist() == [0]
    assert sequences.lens[0] == 0


class Model:
    """The same as lists of tokens, each token a number of its own; `memory` is what a cache would hold."""

    def __init__(self) -> None:
        self.sequences = Sequences(B, BlockPool(1), grows=True)
        self.texts: list[list[int]] = []
        self.memory: dict[int, int] = {}
        self.next = 0

    def extend(self, new: list[int]) -> None:
        step = self.sequences.extend(np.arange(len(self.texts)), np.array(new, np.int32))
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
        for text, row, length in zip(self.texts, step.metadata.block_table, step.metadata.seq_lens, strict=True):
            assert [self.memory[int(row[i // B]) * B + i % B] for i in range(length)] == text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_say_what_lists_say(data: st.DataObject) -> None:
    model = Model()
    for _ in range(data.draw(st.integers(1, 12), label="steps")):
        alive = len(model.texts)
        do = data.draw(st.sampled_from(["add", "extend", "select", "truncate", "clear"]), label="do")
        if do == "add" and alive < 4:
            model.sequences.add(1)
            model.texts.append([])
        elif do == "extend":
            model.extend(data.draw(st.lists(st.integers(0, 9), min_size=alive, max_size=alive)))
        elif do == "select" and alive:
            order = data.draw(st.lists(st.integers(0, alive - 1), min_size=1, max_size=4))
            model.sequences.select(np.array(order))
            model.texts = [list(model.texts[i]) for i in order]
        elif do == "truncate" and alive:
            count = data.draw(st.integers(0, min(map(len, model.texts))))
            model.sequences.truncate(np.arange(alive), count)
            model.texts = [text[: len(text) - count] for text in model.texts]
        elif do == "clear":
            model.sequences.clear()
            model.texts = []
            assert model.sequences.pool.in_use == 0
        assert model.sequences.lens.tolist() == [len(text) for text in model.texts]
    model.sequences.clear()
    assert model.sequences.pool.in_use == 0
