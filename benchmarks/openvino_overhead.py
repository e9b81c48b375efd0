"""What `openvino/paged` costs per call over OpenVINO's own `infer()` with every tensor bound already.

Paired in one process: short rounds of the bare request, of the adapter (`backend.run`) and of the public API
(`Attention.run`, which checks the arrays first) alternate; shown is the median over the rounds of the difference
between neighbours.

Also shown: the public call with the request's `infer()` taken out, which is what is spent in Python and on copying
small arrays while the processor's caches are warm. (After a real `infer()` they are not: the same lines cost more.)

    python benchmarks/openvino_overhead.py [--json] [--library torch]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

import attn_dispatch as ad
from attn_dispatch.backend import Call
from attn_dispatch.contract.arrays import as_library
from attn_dispatch.contract.dtypes import numpy_dtype

BACKEND = "openvino/paged"
Timed = Callable[[], Any]

CASES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    # name: (spec, new tokens, tokens after the step)
    "decode, 1 sequence of 512, 32/8 heads of 128, f32": (
        {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": "float32"}, [1], [512]),
    "decode, 1 sequence of 64, 9/3 heads of 64, f32": (
        {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "dtype": "float32"}, [1], [64]),
    "decode, 4 sequences of 128, 32/8 heads of 128, f32": (
        {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": "float32"}, [1] * 4, [128] * 4),
    "decode, 4 sequences of 128, 32/8 heads of 128, bf16": (
        {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": "bfloat16"}, [1] * 4, [128] * 4),
    "decode, 16 sequences of 64, 9/3 heads of 64, f32": (
        {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "dtype": "float32"}, [1] * 16, [64] * 16),
    "prefill of 7, 9/3 heads of 64, f32": (
        {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "dtype": "float32"}, [7], [7]),
    "prefill of 64, 32/8 heads of 128, f32 (in place)": (
        {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": "float32"}, [64], [64]),
}  # fmt: skip


def _setup(
    fields: dict[str, Any], new: list[int], lens: list[int], library: str
) -> tuple[Timed, Timed, Timed, AbstractContextManager[None]]:
    """Return the bare request's call, the adapter's, the public one's, and a context in which `infer()` is empty."""
    spec = ad.AttentionSpec(**fields)
    if not (verdict := ad.explain(spec, BACKEND).verdicts[0]):
        raise SystemExit(f"{BACKEND}: {verdict}")
    attn = ad.attention(spec, BACKEND)
    used = [-(-n // spec.block_size) for n in lens]
    ids = iter(np.random.default_rng(0).permutation(sum(used)).tolist())
    tables = [[next(ids) for _ in range(n)] for n in used]
    cache = attn.allocate(sum(used))
    plan = attn.plan(ad.AttentionMetadata.build(new, lens, tables, spec.block_size))
    rng = np.random.default_rng(1)
    q, k, v = (
        as_library(rng.standard_normal((sum(new), heads, size)).astype(numpy_dtype(spec.dtype)), library)
        for heads, size in (
            (spec.num_heads, spec.head_size),
            (spec.num_kv_heads, spec.head_size),
            (spec.num_kv_heads, spec.value_head_size),
        )
    )
    attn.run(plan, q, k, v, cache)

    # The bare request: a second one of the same compiled model on the same cache, all tensors bound for good.
    import openvino as ov

    from attn_dispatch_openvino.layer_request import cache_tensors
    from attn_dispatch_openvino.step_tensors import StepTensors, array_tensor

    batch, program = plan.batch, plan.program  # type: ignore[attr-defined]
    request = program.new_request()
    step = StepTensors(program.key, len(batch.past_lens), len(batch.blocks), batch.num_rows, None)
    step.load(batch)
    key, value = cache_tensors(cache)
    tensors = dict(step.tensors) | {"key_cache": key, "value_cache": value}
    tensors["scale"] = ov.Tensor(np.array(spec.scale, np.float32))
    tensors["sliding_window"] = ov.Tensor(np.array(0, np.int32))
    shapes = [buffer.tensor.shape for buffer in step.rows]
    host = [np.ascontiguousarray(as_library(x, "numpy")) for x in (q, k, v)]
    out = np.empty((sum(new), spec.num_heads, spec.value_head_size), host[0].dtype)
    for name, array, shape in zip("qkv", host, shapes, strict=False):
        tensors[name] = array_tensor(array, shape, spec.dtype)
    for name, tensor in tensors.items():
        request.set_input_tensor(program.inputs[name], tensor)
    request.set_output_tensor(0, array_tensor(out, shapes[3], spec.dtype))
    assert isinstance(tensors["q"], ov.Tensor)
    keep = (tensors, host, out)

    def bare() -> Any:
        return request.infer() if keep else None

    # A large result would be timed as the page faults of its memory: there the caller gives `out`.
    given = as_library(np.empty_like(out), library) if out.nbytes > 1 << 18 else None
    bound = cache.backend_state[BACKEND].request(program)  # type: ignore[attr-defined]

    @contextmanager
    def empty() -> Iterator[None]:
        infer, bound.infer = bound.infer, lambda *_: None
        try:
            yield
        finally:
            bound.infer = infer

    def adapter() -> Any:
        return attn.backend.run(Call(plan, q, k, v, cache, attn.parameters, given))

    return bare, adapter, lambda: attn.run(plan, q, k, v, cache, out=given), empty()


def measure(calls: list[Callable[[], Any]], rounds: int, repeats: int) -> list[list[float]]:
    """Return the microseconds per call of each, round by round, alternating."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, found, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times.append((time.perf_counter() - start) / repeats * 1e6)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--library", choices=("numpy", "torch"), default="numpy")
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.library == "torch":
        import torch  # noqa: F401  # arrays of a library that has been imported
    rows = []
    for name, (fields, new, lens) in CASES.items():
        bare, adapter, public, empty = _setup(fields, new, lens, arguments.library)
        bare_us, adapter_us, public_us = measure([bare, adapter, public], arguments.rounds, 10)
        with empty:
            (hollow_us,) = measure([public], arguments.rounds, 10)
        rows.append(
            {
                "case": name,
                "infer_us": round(statistics.median(bare_us), 1),
                "adapter_over_us": _over(adapter_us, bare_us),
                "public_over_us": _over(public_us, bare_us),
                "without_infer_us": round(statistics.median(hollow_us), 1),
            }
        )
    if arguments.json:
        print(json.dumps({"library": arguments.library, "rows": rows}, indent=2))
        return
    columns = list(rows[0])[1:]
    print(f"{arguments.library:<52}" + "".join(f"{column.removesuffix('_us'):>19}" for column in columns))
    for row in rows:
        print(f"{row['case']:<52}" + "".join(f"{row[column]:>16} us" for column in columns))


def _over(times: list[float], bare: list[float]) -> float:
    return round(statistics.median(mine - theirs for mine, theirs in zip(times, bare, strict=True)), 1)


if __name__ == "__main__":
    main()
