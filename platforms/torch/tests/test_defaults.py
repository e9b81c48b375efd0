"""Masked layers in float64, and under default types and devices that the user has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad

MASKED: dict[str, dict[str, Any]] = {
    "ragged decodes": {"query_lens": [1, 1, 1], "seq_lens": [40, 7, 90]},
    "a chunk": {"query_lens": [5, 20], "seq_lens": [40, 70]},
    "a prompt beyond a window": {"query_lens": [90], "seq_lens": [90], "window": (16, 0)},
    "a decode within a window": {"query_lens": [1, 1], "seq_lens": [90, 33], "window": (16, 0)},
    "ALiBi": {"query_lens": [1, 20], "seq_lens": [40, 20], "alibi": True},
    "drafts": {"query_lens": [3, 3], "seq_lens": [40, 33]},
}


def errors(case: dict[str, Any], dtype: str) -> tuple[float, float]:
    """Return the largest difference from the reference in output and LSE."""
    case = dict(case)
    query_lens, seq_lens = case.pop("query_lens"), case.pop("seq_lens")
    spec = ad.AttentionSpec(
        num_heads=4, num_kv_heads=2, head_size=32, dtype=dtype, block_size=16, returns_lse=True, **case
    )
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32) if spec.alibi else None
    ends = np.cumsum([-(-length // 16) for length in seq_lens])
    tables = [list(range(end - -(-length // 16), end)) for end, length in zip(ends, seq_lens, strict=True)]
    context = [length - new for new, length in zip(query_lens, seq_lens, strict=True)]
    rng = np.random.default_rng(0)
    rows = {n: rng.standard_normal((sum(lens), h, 32)) for n, lens, h in (("q", query_lens, 4), ("k", query_lens, 2))}
    rows["v"] = rng.standard_normal(rows["k"].shape)
    before = {n: rng.standard_normal((sum(context), 2, 32)) for n in "kv"}
    results = []
    for backend in ("torch/sdpa", "reference"):
        attn = ad.attention(spec, backend, alibi_slopes=slopes)
        cache = attn.allocate(int(ends[-1]))

        def of(x: Any, backend: str = backend) -> Any:
            tensor = torch.tensor(x, dtype=getattr(torch, dtype), device="cpu")
            return tensor if backend == "torch/sdpa" else tensor.numpy()

        if sum(context):
            batch = ad.AttentionMetadata.build(context, context, tables, 16)
            attn.run(attn.plan(batch), of(np.zeros((sum(context), 4, 32))), of(before["k"]), of(before["v"]), cache)
        batch = ad.AttentionMetadata.build(query_lens, seq_lens, tables, 16)
        out, lse = attn.run(attn.plan(batch), *(of(rows[n]) for n in "qkv"), cache, return_lse=True)
        results.append([np.asarray(x, np.float64) for x in (out, lse)])
    return tuple(float(np.abs(a - b).max()) for a, b in zip(*results, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("name", list(MASKED))
def test_masks_are_of_the_type_that_is_computed_in(name: str) -> None:
    out, lse = errors(MASKED[name], "float64")
    assert out < 1e-12
    assert lse < 1e-5  # given as float32


@contextmanager
def default(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    old = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(old)
        torch.set_default_device(None)


@pytest.mark.parametrize("name", list(MASKED))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("setting", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_defaults_of_the_user_change_nothing(name: str, dtype: str, setting: dict[str, Any]) -> None:
    with default(**setting):
        out, lse = errors(MASKED[name], dtype)
    assert out < (1e-12 if dtype == "float64" else 3e-6)
    assert lse < 1e-5
