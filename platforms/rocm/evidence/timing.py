"""What a layer takes on this machine, backend beside backend, in one process: part of an owner's report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import attn_dispatch as ad
from attn_dispatch.errors import AttentionDispatchError

__all__ = ["SHAPES", "Shape", "measure"]


@dataclass(frozen=True)
class Shape:
    """One step: so many sequences, with so many new tokens each, of that length in the end.

    Attributes:
        name: for people.
        sequences: in the batch.
        queries: new tokens of each.
        tokens: length of each after the step.
    """

    name: str
    sequences: int
    queries: int
    tokens: int


SHAPES = (
    Shape("decode, 1 of 8k", 1, 1, 8192),
    Shape("decode, 32 of 4k", 32, 1, 4096),
    Shape("decode, 128 of 1k", 128, 1, 1024),
    Shape("prefill, 1 of 4k", 1, 4096, 4096),
    Shape("chunk of 512 after 8k", 4, 512, 8704),
)
_PAGES = (16, 64, 128)


def measure(names: Iterable[str], shapes: Iterable[Shape] = SHAPES, *, device: str = "cuda") -> list[dict[str, Any]]:
    """Return the median milliseconds of one layer's run (32/8 heads of 128, bfloat16), by shape and backend.

    What a backend refuses, or fails in, is a row with its words. Block tables are permuted; a run writes its new keys.
    """
    rows = []
    for shape in shapes:
        for name in names:
            row: dict[str, Any] = {"shape": shape.name, "backend": name}
            try:
                row |= _measure(name, shape, device)
            except Exception as error:  # a vendor may raise anything; the report says so
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    return rows


def _measure(name: str, shape: Shape, device: str) -> dict[str, Any]:
    import torch

    refused = ""
    for page in _PAGES:
        spec = ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16", block_size=page)
        try:
            attn = ad.attention(spec, name)
        except AttentionDispatchError as error:
            refused = str(error)
            continue
        blocks = -(-shape.tokens // page)
        order = np.random.default_rng(0).permutation(shape.sequences * blocks).reshape(shape.sequences, blocks)
        batch = ad.AttentionMetadata.build(
            [shape.queries] * shape.sequences, [shape.tokens] * shape.sequences, order.astype(np.int32), page
        )
        cache = attn.allocate(shape.sequences * blocks, device)
        rows = shape.sequences * shape.queries
        q, k, v = (torch.randn(rows, n, 128, device=device, dtype=torch.bfloat16) for n in (32, 8, 8))
        plan = attn.plan(batch)
        times = _times(partial(attn.run, plan, q, k, v, cache), device)
        return {"block_size": page, "ms": round(statistics.median(times), 4), "runs": len(times)}
    return {"error": refused}


def _times(run: Callable[[], Any], device: str, repeats: int = 20) -> list[float]:
    import torch

    for _ in range(3):  # what is compiled at the first call is not measured
        run()
    if device == "cpu":
        milliseconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            milliseconds.append((time.perf_counter() - began) * 1e3)
        return milliseconds
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in events:
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return [float(first.elapsed_time(last)) for first, last in events]
