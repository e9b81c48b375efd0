"""Attention on an NVIDIA GPU: decode against the measured copy bandwidth, prefill against the measured matrix rate.

    python benchmarks/cuda_attention.py [--backends cuda/flash-attention,cuda/flashinfer] [--quick] [--output FILE]

Llama-3-8B's layer: 32/8 heads of 128, bfloat16, new keys and values written. A model's layers have a cache each, and as
many are run in turn as together do not fit the GPU's L2. Decode: 1 to 256 sequences of 1k to 32k tokens, block tables
permuted, replayed from a CUDA graph where the backend has fixed plans (else called; the row says which): neither the
host's time nor the L2 is measured. GB/s are bytes of keys and values over the time of one layer, a share of what a
device-to-device copy reaches here in the same process. Prefill: one causal prompt of 1k to 16k tokens; TFLOP/s count
the visible half of the scores, a share of what a 8192^3 bfloat16 matrix product reaches here. `host_us`: how long
`attn.run` keeps the CPU.

Times are medians of CUDA events over repetitions. Every row is appended to FILE (JSON lines) when it is measured, the
machine and the versions first: what was measured before an error, or a kill, stays. A shape that fails is a row that
says why. Exit status: 0 measured, 1 nothing could be measured, 2 no NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

BACKENDS = "triton/paged,torch/sdpa,cuda/flash-attention,cuda/flashinfer,cuda/xformers"
DECODES = [(b, c << 10) for b in (1, 4, 16, 64, 256) for c in (1, 4, 8, 32)]
PREFILLS = [c << 10 for c in (1, 2, 4, 8, 16)]
QUICK = ([(1, 8 << 10), (16, 8 << 10), (64, 4 << 10)], [4 << 10, 16 << 10])
HEADS, KV_HEADS, SIZE = 32, 8, 128
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "fa3-fwd", "vllm", "flashinfer-python", "xformers")

Row = dict[str, Any]


class Report:
    """Rows, written when they are there.

    Attributes:
        rows: those of this run.
    """

    def __init__(self, file: Path | None, *, as_json: bool) -> None:
        self._file, self._as_json = file, as_json
        self.rows: list[Row] = []
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Append a row to the file, and show it."""
        self.rows.append(row)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(json.dumps(row) if self._as_json else line(row), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=BACKENDS, help="names, separated by commas")
    parser.add_argument(
        "--block-size", type=int, default=0, help="tokens (0: the first of 64, 256, 16 that is accepted)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--output", type=Path, help="file to append rows to (JSON lines)")
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
    report = Report(options.output, as_json=options.json)
    gpu = Gpu(torch)
    report.add(gpu.describe())
    shapes = QUICK if options.quick else (DECODES, PREFILLS)
    measure(report, options.backends.split(","), shapes, lambda name: Layers(gpu, name, options.block_size))
    return 0 if any("ms" in row for row in report.rows) else 1


def measure(
    report: Report,
    backends: list[str],
    shapes: tuple[list[tuple[int, int]], list[int]],
    layers: Callable[[str], Any],
) -> None:
    """Measure every shape on every backend; whatever one of them dies of is a row.

    Args:
        report: where rows go.
        backends: names.
        shapes: (sequences, tokens) of decodes, and tokens of prefills.
        layers: makes what `Layers` is, of a backend's name.
    """
    decodes, prefills = shapes
    steps = [("decode", *shape) for shape in decodes] + [("prefill", 1, tokens) for tokens in prefills]
    for name in backends:
        try:
            subject = layers(name)
        except Exception as error:  # a backend that cannot run is part of the report
            report.add({"backend": name, "why": _brief(error)})
            continue
        for kind, batch, tokens in steps:
            row: Row = {"backend": name, "kind": kind, "batch": batch, "tokens": tokens}
            try:
                report.add(row | subject.measure(kind, batch, tokens))
            except Exception as error:  # likewise, and the next shape may fit
                report.add(row | {"why": _brief(error)})


def _brief(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


class Gpu:
    """A GPU, and what it reaches: copies, matrix products."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.properties = torch.cuda.get_device_properties(0)
        self.l2_bytes: int = getattr(self.properties, "L2_cache_size", 0) or 64 << 20
        self.copy_gb_s, self.matmul_tflop_s = self._copy_bandwidth(), self._matmul_rate()

    def describe(self) -> Row:
        """Return the report's first row."""
        import attn_dispatch as ad

        return {
            "gpu": self.properties.name,
            "memory_gib": round(self.properties.total_memory / 2**30, 1),
            "driver": ad.platform.facts.get("drivers", {}).get("nvidia", ""),
            "cuda": self.torch.version.cuda,
            "versions": dict(_versions()),
            "copy_gb_s": self.copy_gb_s,
            "matmul_tflop_s": self.matmul_tflop_s,
        }

    def seconds(self, call: Callable[[], object], budget_s: float = 0.4) -> float:
        """Return the median time of a call on the device; calls are queued one behind the other."""
        torch = self.torch
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

    def host_seconds(self, call: Callable[[], object], count: int = 50) -> float:
        """Return the median time that a call keeps the CPU."""
        times = []
        for i in range(count):
            if i % 10 == 0:
                self.torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        self.torch.cuda.synchronize()
        return statistics.median(times)

    def _copy_bandwidth(self) -> float:
        """Return GB/s of a device-to-device copy of 2 GiB, read and written bytes counted."""
        source = self.torch.empty(1 << 31, dtype=self.torch.uint8, device="cuda").zero_()
        target = self.torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source)) / 1e9

    def _matmul_rate(self) -> float:
        """Return TFLOP/s of a bfloat16 matrix product of 8192^3."""
        torch = self.torch
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        c = torch.empty_like(a)
        return 2 * 8192**3 / self.seconds(lambda: torch.matmul(a, b, out=c)) / 1e12


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("attn-dispatch", "attn-dispatch-cuda", *PACKAGES):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def num_layers(cache_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """Return how many layers are run in turn: as many as together are twice the L2, 2 at least, 128 at most.

    Raises:
        MemoryError: their caches do not fit.
    """
    wanted = min(max(-(-2 * l2_bytes // max(cache_bytes, 1)), 2), 128)
    fit = min(wanted, int(0.8 * free_bytes) // max(cache_bytes, 1))
    if fit < 1:
        raise MemoryError(f"a cache of {cache_bytes / 2**30:.1f} GiB does not fit")
    return fit


class Layers:
    """Layers of one backend, each with a cache of its own."""

    def __init__(self, gpu: Gpu, name: str, block_size: int) -> None:
        import attn_dispatch as ad
        from attn_dispatch.dispatch import registry, verdict_of

        self._gpu = gpu
        backend = registry().load(name)
        if not (available := backend.probe()):
            raise RuntimeError(available.reason)
        for size in [block_size] if block_size else [64, 256, 16]:
            spec = ad.AttentionSpec(
                num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=SIZE, dtype="bfloat16", block_size=size
            )
            if verdict := verdict_of(backend, spec):
                self._attn = ad.attention(spec, name)
                return
        raise RuntimeError(str(verdict))

    def measure(self, kind: str, batch: int, tokens: int) -> Row:
        """Return a row: the time of one layer, and what that is of what the GPU reaches."""
        import attn_dispatch as ad

        attn, gpu, torch = self._attn, self._gpu, self._gpu.torch
        size = attn.spec.block_size
        pages = -(-tokens // size)
        cache_bytes = 2 * batch * pages * size * KV_HEADS * SIZE * 2
        count = num_layers(cache_bytes, gpu.l2_bytes, torch.cuda.mem_get_info()[0])
        caches = [attn.allocate(batch * pages) for _ in range(count)]
        for cache in caches:
            cache.key.normal_()
            cache.value.normal_()
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
        new = 1 if kind == "decode" else tokens
        metadata = ad.AttentionMetadata.build([new] * batch, [tokens] * batch, order.reshape(batch, pages), size)
        q, k, v = (
            torch.randn(batch * new, heads, SIZE, dtype=torch.bfloat16, device="cuda")
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        out = torch.empty_like(q)
        row: Row = {"block_size": size, "layers": count, "graph": False}
        plan = attn.plan(metadata)
        row["host_us"] = 1e6 * gpu.host_seconds(lambda: attn.run(plan, q, k, v, caches[0], out))
        if kind == "decode" and attn.backend.capabilities.fixed_plans:
            plan, row["graph"] = attn.backend.fixed_plan(attn.spec, metadata, tokens), True

        def step() -> None:
            for cache in caches:
                attn.run(plan, q, k, v, cache, out)

        seconds = gpu.seconds(captured(torch, step).replay if row["graph"] else step) / count
        row["ms"] = 1e3 * seconds
        if kind == "decode":
            row["gb_s"] = 2 * batch * tokens * KV_HEADS * SIZE * 2 / seconds / 1e9
            row["share"] = row["gb_s"] / gpu.copy_gb_s
        else:
            row["tflop_s"] = 2 * tokens * (tokens + 1) * HEADS * SIZE / seconds / 1e12
            row["share"] = row["tflop_s"] / gpu.matmul_tflop_s
        return row


def captured(torch: Any, step: Callable[[], None]) -> Any:
    """Return a CUDA graph of a step, which was run before on the stream that torch captures on."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def line(row: Row) -> str:
    """Return a row for people."""
    if "gpu" in row:
        return f"{row['gpu']}: copy {row['copy_gb_s']:.0f} GB/s, matmul {row['matmul_tflop_s']:.0f} TFLOP/s"
    if "kind" not in row:
        return f"{row['backend']}: {row['why']}"
    head = f"{row['backend']:<22} {row['kind']:<8} {row['batch']:>4} x {row['tokens']:<6}"
    if "ms" not in row:
        return f"{head} {row['why']}"
    rate = f"{row['gb_s']:7.0f} GB/s" if row["kind"] == "decode" else f"{row['tflop_s']:5.0f} TFLOP/s"
    how = f"{row['layers']} layers, {'graph' if row['graph'] else 'called'}"
    return f"{head} {row['ms']:9.3f} ms  {rate}  {row['share']:6.1%}  host {row['host_us']:.0f} us  ({how})"


if __name__ == "__main__":
    sys.exit(main())
