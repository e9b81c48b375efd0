"""Decode on the CPU: `cpu/numba` against the roofline, vLLM's C++ kernel and torch's SDPA.

    python benchmarks/cpu_decode.py --threads 1 --vllm path/to/_C.abi3.so

Every cell interleaves its rivals, round after round, with the roofline's own measurements between them; a ratio is the
median and the minimum over rounds of times taken next to each other. Block tables are permuted. Between two calls
nothing is flushed: a cache that fits into L3 may lie there, for everybody alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

CELLS = [(b, c) for b in (1, 8, 32) for c in (512, 2048, 8192)]


def main() -> None:
    """Run the cells that were asked for and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell")
    parser.add_argument("--cells", default="", help="as 1x512,8x2048; default: all")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--sequential", action="store_true", help="block tables in order")
    parser.add_argument("--vllm", default="", help="path of vLLM's _C...so")
    parser.add_argument("--sdpa", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["ATTN_DISPATCH_NUM_THREADS"] = str(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    cells = [tuple(map(int, c.split("x"))) for c in arguments.cells.split(",") if c] or CELLS
    rows = []
    for batch, context in cells:
        row = measure(batch, context, arguments)
        rows.append(row)
        if not arguments.json:
            print(line(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif arguments.vllm:
        for name in ("vllm_kernel", "vllm"):
            print(f"geometric mean, {name} / ours: {statistics.geometric_mean(row[name] for row in rows):.2f}")


def measure(batch: int, context: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell."""
    import ml_dtypes
    import numpy as np
    from cpu_rivals import Shape, make_inputs, sdpa, vllm
    from cpu_roofline import Roofline

    import attn_dispatch as ad
    from attn_dispatch_cpu.numba_call import Launch

    shape = Shape(batch, 1, context)
    inputs = make_inputs(shape)
    spec = ad.AttentionSpec(
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_size=shape.head_size, block_size=arguments.block_size
    )
    attn = ad.attention(spec, backend="cpu/numba")
    per_sequence = -(-context // spec.block_size)
    blocks = batch * per_sequence
    order = np.random.default_rng(0).permutation(blocks) if not arguments.sequential else np.arange(blocks)
    table = order.reshape(batch, per_sequence).astype(np.int32)
    cache = attn.allocate(blocks)
    for name, source in (("key", inputs.keys), ("value", inputs.values)):
        padded = np.zeros((batch, per_sequence * spec.block_size, *source.shape[2:]), np.uint16)
        padded[:, :context] = source
        paged = padded.reshape(blocks, spec.block_size, shape.kv_heads, shape.head_size).transpose(0, 2, 1, 3)
        getattr(cache, name).view(np.uint16)[table.reshape(-1)] = paged
    metadata = ad.AttentionMetadata.build([1] * batch, [context] * batch, table, spec.block_size)
    q = inputs.q.view(ml_dtypes.bfloat16)
    k, v = (np.ascontiguousarray(x[:, -1]).view(ml_dtypes.bfloat16) for x in (inputs.keys, inputs.values))
    plan = attn.plan(metadata)
    out = np.empty_like(q)

    # The kernel alone, as vLLM's is called alone: planned, its new token already written.
    launch = Launch(plan, attn.parameters, cache)
    launch.put_queries(q, out, None)
    rivals: dict[str, Callable[[], Any]] = {
        "kernel": launch.attend_again,
        "ours": lambda: attn.run(plan, q, k, v, cache, out),
    }
    if arguments.vllm:
        import torch

        torch.set_num_threads(arguments.threads)
        rivals["vllm"] = vllm(shape, inputs, arguments.vllm)
        theirs = rivals["vllm"]().float().numpy()
        rivals["kernel"]()
        np.testing.assert_allclose(out.astype(np.float32), theirs, rtol=0.02, atol=0.02)  # both round to bf16
    if arguments.sdpa:
        import torch

        torch.set_num_threads(arguments.threads)
        rivals["sdpa"] = sdpa(shape, inputs)
    roofline = Roofline(arguments.threads)
    for run in rivals.values():
        run()
    once = timed(rivals["ours"])
    repeat = max(1, int(0.005 / once))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    ratios: list[float] = []
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        roofline.measure()
        for name, run in rivals.items():
            for _ in range(repeat):
                run()  # whatever the one before left in the cache is gone, and its threads have stopped spinning
            times[name].append(min(timed(run) for _ in range(repeat)))
    least = roofline.seconds(shape.cache_bytes, shape.operations)
    row: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "threads": arguments.threads,
        "rounds": len(times["ours"]),
    }
    row |= {f"{name}_ms": 1e3 * min(t) for name, t in times.items()}
    row["gb_per_s"] = shape.cache_bytes / min(times["kernel"]) / 1e9
    row["read_gb_per_s"] = roofline.bytes_per_second / 1e9
    row["gflops"] = roofline.operations_per_second / 1e9
    row["roofline"] = min(times["kernel"]) / least
    row["roofline_median"] = statistics.median(times["kernel"]) / least
    for name in ("vllm", "sdpa"):
        if name in times:
            ratios = [b / a for a, b in zip(times["ours"], times[name], strict=True)]
            row[name], row[f"{name}_min"] = statistics.median(ratios), min(times[name]) / min(times["ours"])
            ratios = [b / a for a, b in zip(times["kernel"], times[name], strict=True)]
            row[f"{name}_kernel"] = statistics.median(ratios)
            row[f"{name}_kernel_min"] = min(times[name]) / min(times["kernel"])
    return row


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    text = (
        f"{row['batch']:>2}x{row['context']:<5} {row['threads']} threads: kernel {row['kernel_ms']:8.3f} ms, run "
        f"{row['ours_ms']:8.3f} ms, {row['gb_per_s']:5.1f} of {row['read_gb_per_s']:.1f} GB/s, roofline x "
        f"{row['roofline']:.2f} (median {row['roofline_median']:.2f})"
    )
    for name in ("vllm", "sdpa"):
        if name in row:
            best = row[f"{name}_kernel_min"]
            text += f" | {name} {row[f'{name}_ms']:.3f} ms = {row[f'{name}_kernel']:.2f}x kernel (best {best:.2f}), "
            text += f"{row[name]:.2f}x run"
    return text


if __name__ == "__main__":
    main()
