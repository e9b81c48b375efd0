"""Prefill on the CPU: `cpu/numba` against torch's SDPA, OpenVINO's PagedAttention and vLLM's C++ kernel.

    python benchmarks/cpu_prefill.py --threads 2 --sdpa --openvino --vllm path/to/_C.abi3.so

Cells are sequences x new tokens, causal, nothing computed before. Rivals are interleaved round after round; a ratio is
the median and the minimum of their times next to each other. torch gets keys and values that lie together, repeated for
every query head beforehand: neither gathering pages nor repeating heads is counted against it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

CELLS = [(1, 512), (1, 2048), (4, 1024)]


def main() -> None:
    """Run the cells that were asked for and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each cell")
    parser.add_argument("--cells", default="", help="as 1x512,4x1024; default: all")
    parser.add_argument("--vllm", default="", help="path of vLLM's _C...so")
    parser.add_argument("--sdpa", action="store_true")
    parser.add_argument("--openvino", action="store_true", help="through `openvino/paged`, over a cache of its own")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["ATTN_DISPATCH_NUM_THREADS"] = str(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    cells = [tuple(map(int, c.split("x"))) for c in arguments.cells.split(",") if c] or CELLS
    rows = [measure(*cell, arguments) for cell in cells]
    if arguments.json:
        print(json.dumps(rows, indent=1))


def measure(batch: int, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell."""
    import ml_dtypes
    import numpy as np
    from cpu_rivals import Shape, make_inputs, sdpa, vllm
    from cpu_roofline import Roofline

    import attn_dispatch as ad

    shape = Shape(batch, tokens, tokens)
    inputs = make_inputs(shape)
    spec = ad.AttentionSpec(num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_size=shape.head_size)
    attn = ad.attention(spec, backend="cpu/numba")
    per_sequence = -(-tokens // spec.block_size)
    table = np.random.default_rng(0).permutation(batch * per_sequence).reshape(batch, per_sequence).astype(np.int32)
    cache = attn.allocate(table.size)
    metadata = ad.AttentionMetadata.build([tokens] * batch, [tokens] * batch, table, spec.block_size)
    plan = attn.plan(metadata)
    q = inputs.q.view(ml_dtypes.bfloat16)
    k, v = (x.reshape(-1, *x.shape[2:]).view(ml_dtypes.bfloat16) for x in (inputs.keys, inputs.values))
    out = np.empty_like(q)
    rivals: dict[str, Callable[[], Any]] = {"ours": lambda: attn.run(plan, q, k, v, cache, out)}
    if arguments.openvino:
        other = ad.attention(spec, backend="openvino/paged")
        own, planned, result = other.allocate(table.size), other.plan(metadata), np.empty_like(q)
        rivals["openvino"] = lambda: other.run(planned, q, k, v, own, result)
        for run in rivals.values():
            run()
        np.testing.assert_allclose(out.astype(np.float32), result.astype(np.float32), rtol=0.02, atol=0.05)
    if arguments.vllm or arguments.sdpa:
        import torch

        torch.set_num_threads(arguments.threads)
    if arguments.vllm:
        rivals["vllm"] = vllm(shape, inputs, arguments.vllm)
        theirs = rivals["vllm"]().float().numpy()
        rivals["ours"]()
        assert np.abs(out.astype(np.float32) - theirs).max() < 0.05
    if arguments.sdpa:
        rivals["sdpa"] = sdpa(shape, inputs)
    roofline = Roofline(arguments.threads)
    for run in rivals.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        roofline.measure()
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "threads": arguments.threads, "rounds": len(times["ours"])}
    row |= {f"{name}_ms": 1e3 * min(t) for name, t in times.items()}
    row["gflops"] = shape.operations / min(times["ours"]) / 1e9
    row["f32_gflops"] = roofline.operations_per_second / 1e9
    text = f"{batch}x{tokens:<5} {arguments.threads} threads: {row['ours_ms']:9.2f} ms, {row['gflops']:.0f} GFLOP/s"
    text += f" (f32 peak {row['f32_gflops']:.0f})"
    for name in ("vllm", "openvino", "sdpa"):
        if name in times:
            row[name] = statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True))
            row[f"{name}_min"] = min(times[name]) / min(times["ours"])
            text += f" | {name} {row[f'{name}_ms']:.2f} ms = {row[name]:.2f}x (best {row[f'{name}_min']:.2f})"
    if not arguments.json:
        print(text, flush=True)
    return row


if __name__ == "__main__":
    main()
