"""What `attn.run` costs on top of the backend's own function: `python benchmarks/torch_overhead.py`.

One decode step on torch/sdpa, through the door and straight through the backend, interleaved in one process. Medians
and minima of each and of the paired difference, in microseconds. Aim: a difference of at most 15 us.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import attn_dispatch as ad


def clock(function: Callable[[], object]) -> float:
    """Return the microseconds of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def measure(sequences: int, context: int, rounds: int) -> dict[str, float]:
    """Return the costs of one shape in microseconds."""
    spec = ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="float32")
    attn = ad.attention(spec, "torch/sdpa")
    blocks = -(-context // spec.block_size)
    cache = attn.allocate(sequences * blocks)
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
    batch = ad.AttentionMetadata.build([1] * sequences, [context] * sequences, tables, spec.block_size)
    plan = attn.plan(batch)
    q, k, v = (torch.randn(sequences, heads, 128) for heads in (32, 8, 8))
    direct, door = [], []
    for i in range(rounds + 10):
        pair = {
            "direct": lambda: attn.backend.run(plan, q, k, v, cache, attn.parameters),
            "door": lambda: attn.run(plan, q, k, v, cache),
        }
        # Alternately first, so that neither always finds the caches warm.
        order = ("direct", "door") if i % 2 else ("door", "direct")
        times = {name: clock(pair[name]) for name in order}
        if i >= 10:
            direct.append(times["direct"])
            door.append(times["door"])
    return {
        "sequences": sequences,
        "context": context,
        "direct_median_us": statistics.median(direct),
        "door_median_us": statistics.median(door),
        "difference_median_us": statistics.median(b - a for a, b in zip(direct, door, strict=True)),
        "difference_of_minima_us": min(door) - min(direct),
    }


def main() -> None:
    """Measure a few shapes and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(sequences, context, options.rounds) for sequences, context in ((1, 32), (1, 512), (8, 512))]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} pairs; microseconds")
    for row in rows:
        print("  ".join(f"{name}={value:.1f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
