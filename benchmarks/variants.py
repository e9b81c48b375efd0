"""Variants against their dense forms on the same backend: what a page table saves, and what it costs.

    python benchmarks/variants.py --backend cpu/numba --threads 1
    python benchmarks/variants.py --only differential --json

Rivals run in turns in one process; a figure is the median over rounds of the ratio of two times taken next to each
other. Planning is not part of a time (a plan serves all layers of a step), and is shown beside in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One comparison: how often `what` goes into the time of `against`."""

    what: str
    against: str
    case: str
    milliseconds: float
    against_milliseconds: float
    ratio: float
    plan_milliseconds: float
    target: float | None = None


class Bench:
    """A backend, a cache full of numbers, and a clock."""

    def __init__(self, backend: str, seconds: float, dtype: str, heads: tuple[int, int, int]) -> None:
        import attn_dispatch as ad
        from attn_dispatch.contract.arrays import as_library, as_numpy
        from attn_dispatch.contract.dtypes import numpy_dtype

        self.ad, self.as_library, self.as_numpy = ad, as_library, as_numpy
        self.backend, self.seconds, self.dtype = backend, seconds, dtype
        self.heads = heads
        self.kind = numpy_dtype(dtype)
        self.rng = np.random.default_rng(0)

    def spec(self, **fields: Any) -> Any:
        """Return a Llama-like layer's spec."""
        h, k, d = self.heads
        plain = {"num_heads": h, "num_kv_heads": k, "head_size": d, "dtype": self.dtype, "block_size": 32}
        return self.ad.AttentionSpec(**(plain | fields))

    def array(self, variant: Any, *shape: int) -> Any:
        """Return random numbers as an array of the backend's own library."""
        return self.as_library(
            self.rng.standard_normal(shape, np.float32).astype(self.kind), variant.backend.capabilities.libraries[0]
        )

    def fill(self, cache: Any) -> Any:
        """Fill a cache with random numbers, the same for every block: what they are does not change the time."""
        for one in getattr(cache, "caches", (cache,)):
            for array in one.arrays_as("numpy").values():
                array[...] = self.rng.standard_normal(array.shape[1:], np.float32).astype(array.dtype)
        return cache

    def rows(self, variant: Any, tokens: int, spec: Any) -> tuple[Any, Any, Any]:
        """Return q, k and v of a step."""
        return (
            self.array(variant, tokens, spec.num_heads, spec.head_size),
            self.array(variant, tokens, spec.num_kv_heads, spec.head_size),
            self.array(variant, tokens, spec.num_kv_heads, spec.value_head_size),
        )

    def batch(self, sequences: int, context: int, new: int) -> Any:
        """Return a step of sequences in permuted blocks."""
        blocks = -(-(context + new) // 32)
        table = self.rng.permutation(sequences * blocks).astype(np.int32).reshape(sequences, blocks)
        return self.ad.AttentionMetadata.build([new] * sequences, [context + new] * sequences, table, 32)

    def compare(
        self, what: str, mine: Call, against: str, other: Call, case: str, plan: Call, target: float | None
    ) -> Row:
        """Time two calls in turns."""
        times: list[tuple[float, float]] = []
        for call in (mine, other):
            call()
        stop = time.perf_counter() + self.seconds
        while len(times) < 5 or time.perf_counter() < stop:
            times.append((clock(mine), clock(other)))
        plans = [clock(plan) for _ in range(3)]
        return Row(
            what,
            against,
            case,
            1e3 * statistics.median(a for a, _ in times),
            1e3 * statistics.median(b for _, b in times),
            statistics.median(b / a for a, b in times),
            1e3 * statistics.median(plans),
            target,
        )


def clock(call: Call) -> float:
    """Return how many seconds a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def dense(bench: Bench, spec: Any, batch: Any) -> tuple[Call, Any]:
    """Return a call that runs the plain layer, and its cache."""
    attn = bench.ad.attention(spec, bench.backend)
    cache = bench.fill(attn.allocate(batch.highest_block + 1))
    plan, arrays = attn.plan(batch), bench.rows(attn, batch.num_tokens, spec)
    return lambda: attn.run(plan, *arrays, cache), cache


def block_sparse(bench: Bench) -> Iterator[Row]:
    """10 % of the blocks at a context of 16k."""
    from attn_dispatch.variants import BlockSparse, LocalStride

    spec, context = bench.spec(), 16384
    for sequences, new in ((1, 1), (4, 1), (1, 256)):
        batch = bench.batch(sequences, context - new, new)
        other, cache = dense(bench, spec, batch)
        for name, pattern in (
            ("one mask", LocalStride(4, 12)),
            ("a mask per kv head", LocalStride(4, 12, tuple(range(1, spec.num_kv_heads + 1)))),
            ("a mask per query head", LocalStride.per_head(4, 12, spec.num_heads)),
        ):
            variant = BlockSparse(spec, pattern, 64, bench.backend)
            plan, arrays = variant.plan(batch), bench.rows(variant, batch.num_tokens, spec)
            kept = plan.kept_blocks / plan.dense_blocks
            yield bench.compare(
                f"block-sparse, {name}",
                partial(variant.run, plan, *arrays, cache),
                "dense",
                other,
                f"{sequences}x{context}, {new} new, {kept:.1%} kept",
                partial(variant.plan, batch),
                5.0 if new == 1 else None,
            )


def longformer(bench: Bench) -> Iterator[Row]:
    """A window of 1024 and 64 global tokens at a context of 32k."""
    from attn_dispatch.variants import Longformer

    context = 32768
    for sequences, new in ((1, 1), (1, 128)):
        batch = bench.batch(sequences, context - new, new)
        other, cache = dense(bench, bench.spec(), batch)
        variant = Longformer(bench.spec(window=(1023, 0)), bench.backend)
        plan, arrays = variant.plan(batch, 64), bench.rows(variant, batch.num_tokens, variant.spec)
        yield bench.compare(
            "window and global tokens",
            partial(variant.run, plan, *arrays, cache),
            "dense",
            other,
            f"{sequences}x{context}, {new} new",
            partial(variant.plan, batch, 64),
            5.0,
        )


def differential(bench: Bench) -> Iterator[Row]:
    """Each form against two plain passes over the same keys and values, and against the four-pass form."""
    from attn_dispatch.variants import Differential

    spec = bench.spec()
    for sequences, context, new in ((1, 16384, 1), (4, 4096, 1), (1, 1024, 512)):
        batch = bench.batch(sequences, context, new)
        calls: dict[str, tuple[Call, Call]] = {}
        for form in ("one", "two", "four"):
            layer = Differential(spec, 0.6, 0.4, form=form, backend=bench.backend)
            cache = bench.fill(layer.allocate(batch.highest_block + 1))
            plan, arrays = layer.plan(batch), bench.rows(layer, batch.num_tokens, spec)
            calls[form] = (partial(layer.run, plan, *arrays, cache), partial(layer.plan, batch))
        case = f"{sequences}x{context}, {new} new"
        rivals = {"four passes": (calls["four"][0], 1.6)}
        for what, passes in (("Dv = 2D", "two"), ("Dv = D", "four")):
            rivals[f"two plain passes, {what}"] = (
                plain_passes(bench, Differential.passes(spec, passes)[0], batch),
                1 / 1.15,
            )
        for form in ("one", "two"):
            mine, again = calls[form]
            for against, (other, target) in rivals.items():
                yield bench.compare(f"differential, {form}", mine, against, other, case, again, target)


def plain_passes(bench: Bench, spec: Any, batch: Any) -> Call:
    """Return a call that runs a plain layer twice, each time over a cache of its own."""
    both = [dense(bench, spec, batch)[0] for _ in range(2)]

    def run() -> None:
        for one in both:
            one()

    return run


def shared(bench: Bench) -> Iterator[Row]:
    """Sequences with a common prefix, and one long context in parts."""
    from attn_dispatch.variants import Cascade, SplitKV

    spec, prefix, own, sequences = bench.spec(), 256, 4, 8
    tables = [[*range(prefix), *range(prefix + own * s, prefix + own * (s + 1))] for s in range(sequences)]
    length = (prefix + own) * 32 - 5
    batch = bench.ad.AttentionMetadata.build([1] * sequences, [length] * sequences, tables, 32)
    other, cache = dense(bench, spec, batch)
    variant = Cascade(spec, bench.backend)
    plan, arrays = variant.plan(batch), bench.rows(variant, sequences, spec)
    yield bench.compare(
        "cascade",
        lambda: variant.run(plan, *arrays, cache),
        "dense",
        other,
        f"{sequences} share {prefix * 32} tokens",
        lambda: variant.plan(batch),
        None,
    )
    batch = bench.batch(1, 16383, 1)
    other, one = dense(bench, spec, batch)
    split = SplitKV(spec, 64, bench.backend)
    parts, row = split.plan(batch), bench.rows(split, 1, spec)
    yield bench.compare(
        "split-KV", lambda: split.run(parts, *row, one), "dense", other, "1x16384", lambda: split.plan(batch), None
    )


BENCHES = {"block-sparse": block_sparse, "longformer": longformer, "differential": differential, "shared": shared}


def main() -> None:
    """Run what was asked for and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu/numba")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", default="32/8/128", help="query heads / key-value heads / head size")
    parser.add_argument("--only", choices=list(BENCHES))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "ATTN_DISPATCH_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    h, k, d = map(int, arguments.heads.split("/"))
    rows = []
    for name, rows_of in BENCHES.items():
        if arguments.only not in (None, name):
            continue
        for row in rows_of(Bench(arguments.backend, arguments.seconds, arguments.dtype, (h, k, d))):
            rows.append(row)
            if not arguments.json:
                wanted = "" if row.target is None else f" (wanted {row.target:.2f})"
                print(
                    f"{row.what:36} {row.case:32} {row.milliseconds:8.2f} ms, {row.against}: "
                    f"{row.against_milliseconds:8.2f} ms, {row.ratio:5.2f}x{wanted}, "
                    f"plan {row.plan_milliseconds:.2f} ms",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
