"""Batches and calls that must be rejected, each with an error that names what is wrong, before anything is written.

`BAD_BATCHES` never reach a backend. `BAD_CALLS` reach `Attention.run`, which refuses them whatever the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.conformance.checks import ConformanceError, any_array, contents, to_backend
from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import verdict_of
from attn_dispatch.errors import AttentionDispatchError

__all__ = ["BAD_BATCHES", "BAD_CALLS", "check_bad_batch", "check_bad_call"]


@dataclass(frozen=True)
class BadBatch:
    """Arguments of `AttentionMetadata.build` that contradict themselves, and words that the error must have."""

    arguments: Mapping[str, Any]
    words: tuple[str, ...]


BAD_BATCHES: Mapping[str, BadBatch] = {
    "a negative block": BadBatch(
        {"query_lens": [1], "seq_lens": [40], "block_tables": [[3, -1]]}, ("sequence 0", "-1")
    ),
    "too few blocks": BadBatch(
        {"query_lens": [1, 1], "seq_lens": [9, 70], "block_tables": [[1], [2, 3]]}, ("sequence 1", "3", "2")
    ),
    "fewer tokens than new ones": BadBatch(
        {"query_lens": [5], "seq_lens": [3], "block_tables": [[0]]}, ("sequence 0", "5", "3")
    ),
    "a negative length": BadBatch({"query_lens": [-1], "seq_lens": [3], "block_tables": [[0]]}, ("sequence 0", "-1")),
    "lengths that are not whole": BadBatch(
        {"query_lens": [1.5], "seq_lens": [3], "block_tables": [[0]]}, ("query_lens", "float")
    ),
    "tables for other sequences": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[0], [1]]}, ("2", "1")
    ),
    "a slot written twice": BadBatch(
        {"query_lens": [1, 1], "seq_lens": [3, 3], "block_tables": [[1], [1]]}, ("slot 34", "0", "1")
    ),
    "a slot that is not the table's": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[1]], "slot_mapping": [35]}, ("sequence 0", "35", "34")
    ),
    "slots for other tokens": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[1]], "slot_mapping": [34, 35]},
        ("slot_mapping", "2", "1"),
    ),
    "a block outside the cache": BadBatch(
        {"query_lens": [1], "seq_lens": [40], "block_tables": [[1, 9]], "num_blocks": 9}, ("sequence 0", "9")
    ),
    "a block id beyond int32": BadBatch(
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[2**33]]}, ("sequence 0",)
    ),
}


def check_bad_batch(name: str) -> None:
    """Check that a contradictory batch is refused with the words that help.

    Raises:
        ConformanceError: it is not.
    """
    bad = BAD_BATCHES[name]
    try:
        AttentionMetadata.build(**bad.arguments)
    except ValueError as error:
        missing = [word for word in bad.words if word not in str(error)]
        if missing or not isinstance(error, AttentionDispatchError):
            raise ConformanceError(
                f"{name}: the error does not say {missing}: {type(error).__name__}: {error}"
            ) from error
        return
    raise ConformanceError(f"clause 10: {name} was not refused")


_SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
_BATCH: Mapping[str, Any] = {"query_lens": [1, 2], "seq_lens": [40, 2], "block_tables": [[2, 0], [3]]}


@dataclass
class Call:
    """The arguments of one call of `run`, correct until a bad one is put in their place."""

    batch: dict[str, Any]
    arrays: dict[str, Any]
    cache_spec: AttentionSpec
    plan_spec: AttentionSpec


def _blocks(ids: list[list[int]]) -> Callable[[Call], None]:
    return lambda call: call.batch.update(block_tables=ids)


def _array(name: str, change: Callable[[Any], Any]) -> Callable[[Call], None]:
    return lambda call: call.arrays.update({name: change(call.arrays[name])})


def _cache(**fields: Any) -> Callable[[Call], None]:
    return lambda call: setattr(call, "cache_spec", replace(_SPEC, **fields))


BAD_CALLS: Mapping[str, tuple[Callable[[Call], None], tuple[str, ...]]] = {
    "a block one past the end": (_blocks([[2, 4], [3]]), ("sequence 0", "block 4", "4 blocks")),
    "a block far outside": (_blocks([[2, 0], [1_000_000]]), ("sequence 1", "1000000", "4 blocks")),
    "q of another head count": (_array("q", lambda q: q[:, :3]), ("q", "(3, 3, 64)", "(3, 4, 64)")),
    "q of too few tokens": (_array("q", lambda q: q[:2]), ("q", "(2, 4, 64)")),
    "k of another head size": (_array("k", lambda k: k[..., :32]), ("k", "32")),
    "v of too many tokens": (_array("v", lambda v: np.concatenate([v, v])), ("v", "6")),
    "q of another type": (_array("q", lambda q: q.astype(np.float16)), ("q", "float16", "float32")),
    "k missing": (_array("k", lambda k: None), ("k and v",)),
    "k and v missing": (lambda call: call.arrays.update(k=None, v=None), ("writes 3 tokens",)),
    "a cache of other heads": (_cache(num_kv_heads=4), ("cache", "num_kv_heads=2")),
    "a cache of other blocks": (_cache(block_size=64), ("cache", "block_size=32")),
    "a plan of another layer": (
        lambda call: setattr(call, "plan_spec", replace(_SPEC, scale=0.5)),
        ("plan", "scale=0.5"),
    ),
    "no cache": (lambda call: call.arrays.update(cache=None), ("cache",)),
}


def check_bad_call(backend: Backend, name: str) -> bool:
    """Check that a bad call is refused with the words that help, and that the cache is as it was.

    Returns:
        Whether the backend runs the plain spec of these cases at all.

    Raises:
        ConformanceError: it is not refused, or something was written.
    """
    spoil, words = BAD_CALLS[name]
    rng = np.random.default_rng(0)
    rows = {"q": (3, 4, 64), "k": (3, 2, 64), "v": (3, 2, 64)}
    arrays: dict[str, Any] = {n: rng.standard_normal(s).astype(numpy_dtype("float32")) for n, s in rows.items()}
    call = Call(dict(_BATCH), arrays, _SPEC, _SPEC)
    spoil(call)
    if not all(verdict_of(backend, spec) for spec in (call.cache_spec, call.plan_spec, _SPEC)):
        return False
    attn = attention(_SPEC, backend)
    cache = attention(call.cache_spec, backend).allocate(4)
    before = contents(cache)
    plan = attention(call.plan_spec, backend).plan(AttentionMetadata.build(**call.batch))
    like = any_array(backend, cache)
    given = {n: None if a is None else to_backend(a, like) for n, a in call.arrays.items() if n != "cache"}
    try:
        attn.run(plan, given["q"], given["k"], given["v"], call.arrays.get("cache", cache))
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        if missing or not isinstance(error, AttentionDispatchError):
            raise ConformanceError(
                f"{name}: the error does not say {missing}: {type(error).__name__}: {error}"
            ) from error
    else:
        raise ConformanceError(f"clause 10: {name} was not refused")
    if any(not np.array_equal(a, b) for a, b in zip(before, contents(cache), strict=True)):
        raise ConformanceError(f"clause 10: {name} was refused, but the cache was written to before")
    return True
