"""One problem computed by a backend: a cache filled and poisoned, the step run, everything brought to the host."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.problem import Arrays, Problem
from attn_dispatch.contract import Array, KVCache
from attn_dispatch.contract.arrays import as_library, as_numpy, library_of
from attn_dispatch.contract.dtypes import numpy_dtype

__all__ = [
    "Outcome",
    "any_array",
    "compute",
    "contents",
    "fill",
    "parts",
    "poison",
    "run_layer",
    "to_backend",
    "to_host",
]

_ORDINARY = 1.5  # what an unused slot holds when it is not NaN: a number like any other
_TOO_MANY = 100_000  # blocks of a cache that is left as it was allocated: memory that is not touched costs nothing
_OUTSIDE = 77.0  # what lies around a strided output


@dataclass(frozen=True)
class Outcome:
    """What a backend computed for a problem: host copies.

    Attributes:
        out: [T, H, Dv].
        lse: f32[T, H], or None when the spec does not ask for it.
        before: the watched blocks' logical (key, value) before the step, as stored; None without a cache.
        after: likewise after it.
        exact: the cache stores what clause 12 says, bit for bit; else it has scales of its own and may lose a step.
    """

    out: Arrays
    lse: Arrays | None
    before: tuple[Arrays, Arrays] | None
    after: tuple[Arrays, Arrays] | None
    exact: bool


def compute(backend: Backend, problem: Problem, device: str | None = None) -> Outcome:
    """Fill a cache as the problem says, poison what is unused, run the step, and bring everything to the host.

    Args:
        backend: under test.
        problem: to compute.
        device: where the cache is allocated (None: the backend's default).

    Raises:
        ConformanceError: the step changed its inputs, returned other arrays than it was asked for, or wrote elsewhere.
    """
    spec = problem.spec
    attn = attention(spec, backend, **problem.parameters)
    if attn.backend is not backend:
        raise ConformanceError(f"{backend} was asked for, {attn.backend} was given")
    has_blocks = problem.view.side.has_blocks
    cache = attn.allocate(problem.num_blocks, device) if has_blocks or spec.kind != "encoder" else None
    before = None
    if cache is not None:
        _check_zeroed(problem, cache)
        if problem.num_blocks < _TOO_MANY:
            poison(backend, cache, ordinary=problem.case.unused == "ordinary")
        fill(attn, problem, cache)
        before = contents(cache, problem.watched)
    like = _given_array(backend, cache, problem)
    place = strided if problem.case.arrays == "strided" else to_backend
    # (Copies: a backend that changes them must not change what they are compared with.)
    inputs = [None if x is None else place(x.copy(), like) for x in (problem.q, problem.k, problem.v)]
    shape = (problem.view.num_tokens, spec.num_heads, spec.value_head_size)
    given, around = _output(shape, spec.dtype, like, problem) if problem.case.out == "given" else (None, None)
    plan = attn.plan(problem.batch)
    result = run_layer(attn, plan, inputs, cache, out=given, return_lse=spec.returns_lse)
    out, lse = parts(result, returns_lse=spec.returns_lse)
    for name, array in (("output", out), ("LSE", lse)):
        if array is not None and library_of(array) != library_of(inputs[0]):
            raise ConformanceError(f"the {name} is an array of {library_of(array)}, q was of {library_of(inputs[0])}")
    if given is not None and out is not given:
        raise ConformanceError("out= was given, and another array was returned")
    if around is not None and not (to_host(around).astype(np.float64) == _OUTSIDE).all():
        raise ConformanceError("memory beside the given output was overwritten")
    for name, array, original in zip("qkv", inputs, (problem.q, problem.k, problem.v), strict=True):
        if original is not None and not np.array_equal(_bits(to_host(array)), _bits(original)):
            raise ConformanceError(f"{name} was changed by the step: inputs are only read")
    after = contents(cache, problem.watched) if cache is not None else None
    return Outcome(
        out=to_host(out),
        lse=None if lse is None else to_host(lse),
        before=before,
        after=after,
        exact=cache is None or not (cache.layout.per_token_scales or spec.kv_cache_dtype in ("uint8", "uint4")),
    )


def run_layer(attn: Attention, plan: Plan, inputs: Sequence[Array], cache: KVCache | None, **keywords: Any) -> Any:
    """Return what a layer's run on (q, k, v) returns."""
    q, k, v = inputs
    return attn.run(plan, q, k, v, cache, **keywords)


def parts(result: Any, *, returns_lse: bool) -> tuple[Any, Any]:
    """Return (out, lse or None) of what `run` returned."""
    if not returns_lse:
        if isinstance(result, tuple):
            raise ConformanceError("run returned a tuple, but no LSE was asked for: return the output alone")
        return result, None
    if not isinstance(result, tuple) or len(result) != 2:
        raise ConformanceError(
            f"run was asked for the LSE and returned {type(result).__name__}: with return_lse=True return (out, lse), "
            "lse f32[T, H], natural logarithm"
        )
    return result


def _given_array(backend: Backend, cache: KVCache | None, problem: Problem) -> Array:
    """Return an array of the library that inputs are given in: the backend's own, where that has views and outputs."""
    like = any_array(backend, cache)
    special = problem.case.arrays == "strided" or problem.case.out == "given"
    return np.zeros(0) if special and library_of(like) == "jax" else like


def to_backend(array: Arrays, like: Array) -> Array:
    """Return a host array as one of the library and on the device of `like`."""
    moved = as_library(array, library_of(like))
    return moved.to(like.device) if library_of(like) == "torch" else moved


def strided(array: Arrays, like: Array) -> Array:
    """Return the numbers of [rows, heads, size] as a view: some heads of a fused projection, larger elements around."""
    rows, heads, size = array.shape
    whole = np.full((rows, heads + 3, size), 9.0).astype(array.dtype)
    whole[:, 1 : heads + 1] = array
    return to_backend(whole, like)[:, 1 : heads + 1]


def _output(shape: tuple[int, int, int], dtype: str, like: Array, problem: Problem) -> tuple[Array, Array | None]:
    """Return an output full of NaN, and what lies around it if it is a view."""
    rows, heads, size = shape
    if problem.case.arrays != "strided":
        return to_backend(np.full(shape, np.nan).astype(numpy_dtype(dtype)), like), None
    host = np.full((rows, heads + 2, size), np.nan)
    host[:, heads:] = _OUTSIDE
    whole = to_backend(host.astype(numpy_dtype(dtype)), like)
    return whole[:, :heads], whole[:, heads:]


def any_array(backend: Backend, cache: KVCache | None) -> Array:
    """Return an array of the backend's library on the device that it computes on (which imports the library)."""
    return next(iter(cache.arrays.values())) if cache is not None else backend.zeros((0,), "float32", None)


def to_host(array: Array) -> Arrays:
    """Return a copy on the host, as NumPy."""
    return np.array(as_numpy(array.cpu() if library_of(array) == "torch" else array))


def contents(cache: KVCache, blocks: Any = None) -> tuple[Arrays, Arrays]:
    """Return blocks of a cache in logical order, on the host (None: all)."""
    key, value = cache.gather(range(cache.num_blocks) if blocks is None else blocks)
    return to_host(key), to_host(value)


def poison(backend: Backend, cache: KVCache, *, ordinary: bool = False) -> None:
    """Fill a new cache with what must not be read: NaN if the backend survives that, else numbers."""
    for name, array in cache.arrays.items():
        dtype = cache.geometry.dtype if not name.endswith("_scale") else "float32"
        if dtype in ("uint8", "uint4"):
            continue  # scales lie among the elements: no bit pattern is harmless poison in all of them
        nan_safe = backend.capabilities.nan_safe
        bad = _ORDINARY if ordinary else 100.0 if dtype == "int8" else float("nan") if nan_safe else 240.0
        pattern = np.full((), bad).astype(numpy_dtype(dtype))
        if library_of(array) == "jax":
            cache.arrays[name] = array.at[...].set(pattern)
        elif library_of(array) == "torch":
            # Through the bytes: not every device fills fp8.
            width = pattern.dtype.itemsize
            whole = np.frombuffer(pattern.tobytes(), dtype={1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[width])
            torch = sys.modules["torch"]
            array.view(getattr(torch, str(whole.dtype))).fill_(int(whole[0]))
        else:
            array[...] = pattern


def fill(attn: Attention, problem: Problem, cache: KVCache) -> None:
    """Write what the cache holds before the step."""
    # A layer that never writes reads what its neighbour, alike but for that, has written: a causal one, if what it
    # computes is of no consequence and the backend may not have any other.
    causal = attn.spec.causal or (attn.spec.kind == "decoder" and attn.spec.sees_every_key)
    spec = replace(attn.spec, writes_kv=True, returns_lse=False, causal=causal)
    writer = attn if spec == attn.spec else attention(spec, attn.backend, **problem.parameters)
    like = any_array(attn.backend, cache)
    for step in problem.before:
        rows = step.batch.view(spec.kind).num_tokens
        q = np.zeros((rows, spec.num_heads, spec.head_size), step.k.dtype)
        inputs = [to_backend(x, like) for x in (q, step.k, step.v)]
        run_layer(writer, writer.plan(step.batch), inputs, cache)


def _check_zeroed(problem: Problem, cache: KVCache) -> None:
    for array in contents(cache, problem.watched):
        if not np.isfinite(array.astype(np.float32)).all():
            raise ConformanceError("clause 2: a cache must be finite after allocate")


def _bits(array: Arrays) -> Any:
    return np.ascontiguousarray(array).view(np.uint8)
