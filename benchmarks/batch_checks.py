"""What checking a batch costs beside the step that it protects: `python benchmarks/batch_checks.py [--backend B]`.

Building and checking the metadata of 32 sequences x 2048 tokens against one decode step of one layer on the same
backend, interleaved in one process. Aim: below 5 % of the step (a step is checked once for all of its layers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

import attn_dispatch as ad
from attn_dispatch.contract.arrays import as_library, library_of


def clock(function: Callable[[], object]) -> float:
    """Return the microseconds of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spec = ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="float32")
    attn = ad.attention(spec, options.backend)
    blocks = -(-options.context // spec.block_size)
    tables = np.random.default_rng(0).permutation(options.sequences * blocks).astype(np.int32)
    tables = tables.reshape(options.sequences, blocks)
    as_lists = tables.tolist()
    cache = attn.allocate(options.sequences * blocks)
    like = next(iter(cache.arrays.values()))
    q, k, v = (
        as_library(np.ones((options.sequences, heads, 128), np.float32), library_of(like)) for heads in (32, 8, 8)
    )
    lens = [1] * options.sequences, [options.context] * options.sequences
    plan = attn.plan(ad.AttentionMetadata.build(*lens, tables, spec.block_size))
    attn.run(plan, q, k, v, cache)
    columns: dict[str, list[float]] = {"step": [], "from arrays": [], "from lists": []}
    for _ in range(options.rounds):
        columns["step"].append(clock(lambda: attn.run(plan, q, k, v, cache)))
        columns["from arrays"].append(clock(lambda: ad.AttentionMetadata.build(*lens, tables, spec.block_size)))
        columns["from lists"].append(clock(lambda: ad.AttentionMetadata.build(*lens, as_lists, spec.block_size)))
    medians = {name: statistics.median(values) for name, values in columns.items()}
    shares = {f"{name}, share of the step": medians[name] / medians["step"] for name in ("from arrays", "from lists")}
    if options.json:
        print(json.dumps({"backend": attn.backend.name, "median_us": medians, **shares}, indent=2))
        return
    print(
        f"{attn.backend}: {options.sequences} sequences x {options.context} tokens, medians of {options.rounds} rounds"
    )
    for name, value in medians.items():
        print(f"  {name:<12} {value:10.0f} us  {100 * value / medians['step']:6.2f} %")


if __name__ == "__main__":
    main()
