"""Attention on an NVIDIA GPU: decode against the measured copy bandwidth, prefill against the measured matrix rate.

    python benchmarks/cuda_attention.py [--backends cuda/flash-attention,cuda/flashinfer] [--quick] [--output FOLDER]

Llama-3-8B's layer: 32/8 heads of 128, bfloat16. Decode: 1 to 256 sequences of 1k to 32k tokens, block tables permuted;
GB/s are bytes of keys and values over the time of one layer, a share of what a device-to-device copy reaches here in
the same process. Prefill: one causal prompt of 1k to 16k tokens; TFLOP/s count the visible half of the scores, a share
of what a 8192^3 bfloat16 matrix product reaches here. Overhead: the time that `attn.run` takes the CPU beyond the
vendor's own call with arguments that are ready (nothing is written by either), and what it adds to a layer's time.

Times are medians of CUDA events over repetitions. Writes FOLDER/cuda_attention-DATE.json (and prints it with --json)
with every version that matters. Exit status: 0 measured, 1 nothing could be measured, 2 no NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

BACKENDS = "cuda/flash-attention,cuda/flashinfer,cuda/xformers,triton/paged,torch/sdpa"
DECODES = [(b, c << 10) for b in (1, 4, 16, 64, 256) for c in (1, 4, 8, 32)]
PREFILLS = [c << 10 for c in (1, 2, 4, 8, 16)]
QUICK = ([(1, 8 << 10), (16, 8 << 10), (64, 4 << 10)], [4 << 10, 16 << 10])
HEADS, KV_HEADS, SIZE = 32, 8, 128
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "fa3-fwd", "vllm", "flashinfer-python", "xformers")


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=BACKENDS, help="names, separated by commas")
    parser.add_argument(
        "--block-size", type=int, default=0, help="tokens (0: the first of 64, 256, 16 that is accepted)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--output", default="", help="folder for the dated report")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        print("cuda_attention: torch is not installed, and no GPU can be used without it", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        text = "finds no NVIDIA GPU here: nothing is measured, nothing is claimed"
        print(f"cuda_attention: torch {torch.__version__} {text}", file=sys.stderr)
        return 2
    report = measure(options, torch)
    if options.json:
        print(json.dumps(report, indent=1))
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"cuda_attention-{report['date']}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["rows"] else 1


def measure(options: argparse.Namespace, torch: Any) -> dict[str, Any]:
    """Return the report."""
    import attn_dispatch as ad

    limits = {"copy_gb_s": copy_bandwidth(torch), "matmul_tflop_s": matmul_rate(torch)}
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": ad.platform.facts.get("drivers", {}).get("nvidia", ""),
        "cuda": torch.version.cuda,
        "versions": dict(_versions()),
        **limits,
        "rows": [],
        "not_measured": [],
    }
    say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    say(f"{report['gpu']}: copy {limits['copy_gb_s']:.0f} GB/s, matmul {limits['matmul_tflop_s']:.0f} TFLOP/s")
    decodes, prefills = QUICK if options.quick else (DECODES, PREFILLS)
    for name in options.backends.split(","):
        try:
            attn = layer(name, options.block_size)
        except Exception as error:  # a backend that cannot run is part of the report
            report["not_measured"].append({"backend": name, "why": str(error).splitlines()[0][:300]})
            say(f"{name}: {report['not_measured'][-1]['why']}")
            continue
        for kind, shapes in (("decode", decodes), ("prefill", [(1, n) for n in prefills])):
            for batch, tokens in shapes:
                row = one(torch, attn, kind, batch, tokens, limits)
                (report["rows"] if "ms" in row else report["not_measured"]).append(row)
                say(line(row))
    return report


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("attn-dispatch", "attn-dispatch-cuda", *PACKAGES):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def layer(name: str, block_size: int) -> Any:
    """Return a layer on a backend, with the first block size that it accepts; it only reads its cache."""
    import attn_dispatch as ad
    from attn_dispatch.dispatch import registry, verdict_of

    backend = registry().load(name)
    available = backend.probe()
    if not available:
        raise RuntimeError(available.reason)
    for size in [block_size] if block_size else [64, 256, 16]:
        spec = ad.AttentionSpec(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=SIZE, dtype="bfloat16", block_size=size, writes_kv=False
        )
        verdict = verdict_of(backend, spec)
        if verdict:
            return ad.attention(spec, name)
    raise RuntimeError(str(verdict))


def one(torch: Any, attn: Any, kind: str, batch: int, tokens: int, limits: dict[str, float]) -> dict[str, Any]:
    """Measure one shape."""
    import attn_dispatch as ad

    row: dict[str, Any] = {"backend": attn.backend.name, "kind": kind, "batch": batch, "tokens": tokens,
                           "block_size": attn.spec.block_size}  # fmt: skip
    pages = -(-tokens // attn.spec.block_size)
    needed = 2 * batch * pages * attn.spec.block_size * KV_HEADS * SIZE * 2
    if needed > 0.8 * torch.cuda.mem_get_info()[0]:
        return row | {"why": f"its cache of {needed / 2**30:.0f} GiB does not fit"}
    cache = attn.allocate(batch * pages)
    cache.key.normal_()
    cache.value.normal_()
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    queries = 1 if kind == "decode" else tokens
    metadata = ad.AttentionMetadata.build(
        [queries] * batch, [tokens] * batch, order.reshape(batch, pages), attn.spec.block_size
    )
    q = torch.randn(batch * queries, HEADS, SIZE, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    plan = attn.plan(metadata)
    ours = lambda: attn.run(plan, q, cache=cache, out=out)  # noqa: E731
    seconds = gpu_seconds(torch, ours)
    row["ms"] = 1e3 * seconds
    if kind == "decode":
        row["gb_s"] = 2 * batch * tokens * KV_HEADS * SIZE * 2 / seconds / 1e9
        row["share"] = row["gb_s"] / limits["copy_gb_s"]
    else:
        row["tflop_s"] = 2 * tokens * (tokens + 1) * HEADS * SIZE / seconds / 1e12
        row["share"] = row["tflop_s"] / limits["matmul_tflop_s"]
    bare = bare_call(attn, plan, q, cache, out)
    if bare is not None:
        own, vendor = cpu_seconds(torch, ours), cpu_seconds(torch, bare)
        row["cpu_us"], row["bare_cpu_us"] = 1e6 * own, 1e6 * vendor
        row["bare_ms"] = 1e3 * gpu_seconds(torch, bare)
        row["overhead"] = row["ms"] / row["bare_ms"] - 1
    return row


def bare_call(attn: Any, plan: Any, q: Any, cache: Any, out: Any) -> Callable[[], object] | None:
    """Return the vendor's own call for a plan that has run once, with its arguments ready; None of other folders."""
    if not attn.backend.name.startswith("cuda/"):
        return None
    step, store = next(iter(plan.steps.values())), cache.backend_state[attn.backend.name]
    owned = attn.parameters.memoize((attn.backend.name, q.device), lambda: None)
    if hasattr(step, "calls") and hasattr(step.calls, "arguments"):  # FlashAttention
        name, given = step.calls.arguments(step, q, store.key, store.value, owned, lse=False)
        function = getattr(step.calls.module, name)
        if step.calls.version.kind == "vllm-fa3":
            values = tuple((given | {"out": out}).values())
            return lambda: function(*values)
        return lambda: function(**given)
    if hasattr(step, "_planned"):  # FlashInfer
        parts = [(wrapper, slice(*part.rows)) for part, wrapper in step._planned]
        pair = (store.key, store.value)
        return lambda: [wrapper.run(q[rows], pair, out=out[rows]) for wrapper, rows in parts]
    from xformers.ops import fmha

    calls = [step.arguments(q if rows is None else q.index_select(0, rows), store, mask) for rows, mask in step.calls]
    return lambda: [fmha.memory_efficient_attention_forward(**given) for given in calls]


def gpu_seconds(torch: Any, call: Callable[[], object], budget_s: float = 0.4) -> float:
    """Return the median time of a call on the device; calls are queued, so that the CPU's part is not in it."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(5, min(200, int(budget_s / max(time.perf_counter() - started, 1e-6))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def cpu_seconds(torch: Any, call: Callable[[], object], count: int = 100) -> float:
    """Return the median time that a call keeps the CPU."""
    times = []
    for i in range(count):
        if i % 10 == 0:
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(times)


def copy_bandwidth(torch: Any) -> float:
    """Return GB/s of a device-to-device copy of 2 GiB, read and written bytes counted."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_seconds(torch, lambda: target.copy_(source)) / 1e9


def matmul_rate(torch: Any) -> float:
    """Return TFLOP/s of a bfloat16 matrix product of 8192^3."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    c = torch.empty_like(a)
    return 2 * 8192**3 / gpu_seconds(torch, lambda: torch.matmul(a, b, out=c)) / 1e12


def line(row: dict[str, Any]) -> str:
    """Return a row for people."""
    head = f"{row['backend']:<22} {row['kind']:<8} {row['batch']:>4} x {row['tokens']:<6}"
    if "ms" not in row:
        return f"{head} {row['why']}"
    rate = f"{row['gb_s']:7.0f} GB/s" if row["kind"] == "decode" else f"{row['tflop_s']:5.0f} TFLOP/s"
    text = f"{head} {row['ms']:9.3f} ms  {rate}  {row['share']:6.1%}"
    if "overhead" in row:
        text += f"  bare {row['bare_ms']:9.3f} ms ({row['overhead']:+.1%}), CPU {row['cpu_us']:.0f}"
        text += f" against {row['bare_cpu_us']:.0f} us"
    return text


if __name__ == "__main__":
    sys.exit(main())
