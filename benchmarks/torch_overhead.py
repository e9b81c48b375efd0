"""What `attn.run` costs on top of the backend's own function: `python benchmarks/torch_overhead.py`.

One decode step on torch/sdpa in four ways, interleaved in one process in a shuffled order:

    checked     attn.run(plan, q, k, v, cache): every check of the contract
    backend     the backend's `run`, as `Attention.run` calls it
    function    the backend's own function, attend(step, q, k, v, store): no checks, nothing to look up
    by hand     the same torch calls in a row, for this one shape: write twice, gather twice, attend

Medians and minima of each, and differences of both, in microseconds. The aim: what the checks cost over the function is
at most 15 us (status 1 if it is not), judged by minima, because whatever else the machine does only ever adds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import attn_dispatch as ad
from attn_dispatch.backend import Call

LIMIT_US = 15.0
SHAPES = {
    "SmolLM2 1 x 32": (9, 3, 64, 1, 32),
    "SmolLM2 8 x 256": (9, 3, 64, 8, 256),
    "32/8 heads 1 x 512": (32, 8, 128, 1, 512),
}


def clock(function: Callable[[], object]) -> float:
    """Return the microseconds of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def by_hand(step: Any, store: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a decode step of sequences of one length as one would write it for this shape alone."""
    (fold,) = step.folds
    heads, size, group = step.spec.num_kv_heads, step.spec.head_size, step.spec.group_size
    rows = fold.size * heads
    # Into the memory that the others gather into, so that all leave the CPU's caches alike.
    keys, values = (side.picked for side in fold.views[threading.get_ident()])
    k4, v4 = (x.view(rows, 1, -1, size)[:, :, : fold.end] for x in (keys, values))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def run() -> torch.Tensor:
        store.key.tokens.index_copy_(0, step.write_rows, k.view(-1, size))
        store.value.tokens.index_copy_(0, step.write_rows, v.view(-1, size))
        torch.index_select(store.key.blocks, 0, fold.index, out=keys)
        torch.index_select(store.value.blocks, 0, fold.index, out=values)
        return flash(q.view(rows, 1, group, size), k4, v4, scale=step.spec.scale)[0].view(q.shape)

    return run


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """Return the costs of one shape in microseconds."""
    heads, kv_heads, size, sequences, context = SHAPES[shape]
    spec = ad.AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=size, dtype="float32")
    attn = ad.attention(spec, "torch/sdpa")
    blocks = -(-context // spec.block_size)
    cache = attn.allocate(sequences * blocks)
    tables = np.random.default_rng(0).permutation(sequences * blocks).astype(np.int32).reshape(sequences, blocks)
    batch = ad.AttentionMetadata.build([1] * sequences, [context] * sequences, tables, spec.block_size)
    plan: Any = attn.plan(batch)
    q, k, v = (torch.randn(sequences, n, size) for n in (heads, kv_heads, kv_heads))
    expected = attn.run(plan, q, k, v, cache)
    package = importlib.import_module(f"{type(attn.backend).__module__.rpartition('.')[0]}.attend")
    step, store = plan.steps[q.device, False], cache.backend_state[attn.backend.name]
    hand = by_hand(step, store, q, k, v)
    ways: dict[str, Callable[[], Any]] = {
        "checked": lambda: attn.run(plan, q, k, v, cache),
        "backend": lambda: attn.backend.run(Call(plan, q, k, v, cache, attn.parameters)),
        "function": lambda: package.attend(step, q, k, v, store),
        "by hand": hand,
    }
    for function in ways.values():
        torch.testing.assert_close(function(), expected)
    times: dict[str, list[float]] = {way: [] for way in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    for i in range(rounds + 20):
        shuffle(order)  # who comes after whom decides what is in the CPU's caches
        for name in order:
            taken = clock(ways[name])
            if i >= 20:
                times[name].append(taken)

    def over(a: str, b: str) -> dict[str, float]:
        pairs = zip(times[a], times[b], strict=True)
        return {"minima": min(times[a]) - min(times[b]), "median": statistics.median(x - y for x, y in pairs)}

    return {
        "shape": shape,
        "median_us": {way: statistics.median(found) for way, found in times.items()},
        "minimum_us": {way: min(found) for way, found in times.items()},
        "checks_over_us": {way: over("checked", way) for way in ways if way != "checked"},
    }


def main() -> int:
    """Measure every shape and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = [measure(name, options.rounds) for name in SHAPES]
    kept = all(row["checks_over_us"]["function"]["minima"] <= LIMIT_US for row in rows)
    if options.json:
        print(json.dumps({"limit_us": LIMIT_US, "kept": kept, "rows": rows}, indent=2))
        return 0 if kept else 1
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds; us, minimum (median)")
    print(
        f"{'':20}"
        + "".join(f"{way:>18}" for way in rows[0]["median_us"])
        + f"{'checked - function':>18}{'- by hand':>18}"
    )
    for row in rows:
        cells = [(row["minimum_us"][way], row["median_us"][way]) for way in row["median_us"]]
        cells += [
            (row["checks_over_us"][way]["minima"], row["checks_over_us"][way]["median"])
            for way in ("function", "by hand")
        ]
        print(f"{row['shape']:20}" + "".join(f"{low:>9.1f} ({middle:>6.1f})" for low, middle in cells))
    print(f"checked - function is {'at most' if kept else 'MORE than'} {LIMIT_US:g} us")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
