"""Batches that contradict themselves: none reaches a backend, and each error names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.contract import AttentionMetadata
from attn_dispatch.errors import AttentionDispatchError

__all__ = ["BAD_BATCHES", "check_bad_batch", "check_integers", "check_locked_arrays", "expect_error"]


@dataclass(frozen=True)
class BadBatch:
    """Arguments of `AttentionMetadata.build` that contradict themselves, and words that the error must have."""

    arguments: Mapping[str, Any]
    words: tuple[str, ...]


class Masked(np.ndarray):
    """A subclass of NumPy's array: it may hide or compute elements, so that a check proves nothing."""


_MASKED = np.ma.masked_array([3], mask=[True], dtype=np.int32)
_ONE_TABLE = [[0]]

BAD_BATCHES: Mapping[str, BadBatch] = {
    "a negative block": BadBatch(
        {"query_lens": [1], "seq_lens": [40], "block_tables": [[3, -1]]}, ("sequence 0", "-1")
    ),
    "too few blocks": BadBatch(
        {"query_lens": [1, 1], "seq_lens": [9, 70], "block_tables": [[1], [2, 3]]}, ("sequence 1", "3", "2")
    ),
    "fewer tokens than new ones": BadBatch(
        {"query_lens": [5], "seq_lens": [3], "block_tables": _ONE_TABLE}, ("sequence 0", "5", "3")
    ),
    "a negative length": BadBatch(
        {"query_lens": [-1], "seq_lens": [3], "block_tables": _ONE_TABLE}, ("sequence 0", "-1")
    ),
    "lengths that are not whole": BadBatch(
        {"query_lens": [1.5], "seq_lens": [3], "block_tables": _ONE_TABLE}, ("query_lens", "float")
    ),
    "tables for other sequences": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[0], [1]]}, ("2", "1")
    ),
    "a slot written twice": BadBatch(
        {"query_lens": [1, 1], "seq_lens": [3, 3], "block_tables": [[1], [1]]}, ("slot 34", "0", "1")
    ),
    "a slot that another sequence has filled": BadBatch(
        {"query_lens": [1, 1], "seq_lens": [3, 10], "block_tables": [[1], [1]]}, ("sequence", "block 1", "0", "1")
    ),
    "a slot that an idle sequence has filled": BadBatch(
        {"query_lens": [2, 0], "seq_lens": [34, 40], "block_tables": [[1, 2], [4, 2]]},
        ("sequence", "block 2", "0", "1"),
    ),
    "a slot that is not the table's": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[1]], "slot_mapping": [35]}, ("sequence 0", "35", "34")
    ),
    "slots for other tokens": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[1]], "slot_mapping": [34, 35]},
        ("slot_mapping", "2", "1"),
    ),
    "slots that are not whole": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[1]], "slot_mapping": [34.5]}, ("slot_mapping", "float")
    ),
    "slots from a generator": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[1]], "slot_mapping": (s for s in [34])},
        ("slot_mapping",),
    ),
    "lengths from a generator": BadBatch(
        {"query_lens": (n for n in [1]), "seq_lens": [3], "block_tables": [[1]]}, ("query_lens",)
    ),
    "masked lengths": BadBatch({"query_lens": [1], "seq_lens": _MASKED, "block_tables": [[1]]}, ("seq_lens", "Masked")),
    "lengths of a subclass of NumPy's array": BadBatch(
        {"query_lens": [1], "seq_lens": np.array([3], np.int32).view(Masked), "block_tables": [[1]]},
        ("seq_lens", "Masked"),
    ),
    "more new tokens than int32 counts": BadBatch(
        {"query_lens": [2**30] * 3, "seq_lens": [2**30] * 3, "block_tables": None}, ("2147483647",)
    ),
    "a block outside the cache": BadBatch(
        {"query_lens": [1], "seq_lens": [40], "block_tables": [[1, 9]], "num_blocks": 9}, ("sequence 0", "9")
    ),
    "a block id beyond int32": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[2**33]]}, ("sequence 0",)
    ),
    "an encoder block outside the cache": BadBatch(
        {
            "query_lens": [1], "seq_lens": [3], "block_tables": [[0]], "num_blocks": 9,
            "encoder_seq_lens": [40], "encoder_block_tables": [[1, 9]],
        },
        ("sequence 0", "9"),
    ),
}  # fmt: skip


def check_bad_batch(name: str) -> None:
    """Check that a contradictory batch is refused with the words that help.

    Raises:
        ConformanceError: it is not.
    """
    bad = BAD_BATCHES[name]
    expect_error(name, bad.words, lambda: _build(bad.arguments))


def _build(arguments: Mapping[str, Any]) -> AttentionMetadata:
    return AttentionMetadata.build(**arguments)


def check_locked_arrays() -> None:
    """Check that what a batch was checked with can no longer be changed: kernels trust it."""
    batch = AttentionMetadata.build(
        [1, 2], [40, 2], [[2, 0], [3]], encoder_seq_lens=[5, 9], encoder_block_tables=[[1], [4]]
    )
    for name in sorted(set(AttentionMetadata.__dataclass_fields__) | {"context_lens"}):
        array = getattr(batch, name, None)
        if isinstance(array, np.ndarray) and array.size and array.base is None and name != "context_lens":
            with suppress(ValueError):
                array[...] = 0
                raise ConformanceError(f"clause 10: batch.{name} can be changed after it was checked")


def check_integers() -> None:
    """Check that lengths, tables and slots of any integer type make the batch that int32 makes."""
    lists: dict[str, Any] = {"query_lens": [1, 5], "seq_lens": [40, 100], "block_tables": [[2, 0, 0, 0], [3, 6, 5, 1]]}
    plain = _build(lists)
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int64, np.uint64):
        try:
            batch = _build({name: np.array(numbers, dtype) for name, numbers in lists.items()})
        except Exception as error:
            raise ConformanceError(f"clause 10: a batch of {dtype.__name__} is refused: {error!r}") from error
        for name in ("query_start_loc", "seq_lens", "slot_mapping", "query_lens"):
            if not np.array_equal(getattr(batch, name), getattr(plain, name)):
                raise ConformanceError(f"clause 10: {name} of a batch of {dtype.__name__} is not that of one of int32")


def expect_error(name: str, words: tuple[str, ...], attempt: Callable[[], object]) -> None:
    """Check that an attempt raises an error of this library that has these words.

    Raises:
        ConformanceError: it does not.
    """
    try:
        attempt()
    except AttentionDispatchError as error:
        missing = [word for word in words if word not in str(error)]
        if missing:
            text = f"{type(error).__name__}: {error}"
            raise ConformanceError(f"{name}: the error does not say {missing}: {text}") from error
        return
    except Exception as error:
        raise ConformanceError(f"{name}: must raise an AttentionDispatchError, raised {error!r}") from error
    raise ConformanceError(f"clause 10: {name} was not refused")
