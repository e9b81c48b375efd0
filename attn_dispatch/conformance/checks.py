"""What is checked of a backend, as plain functions: the pytest suite and `attn-dispatch verify` both call these.

Each raises `ConformanceError`, which says the clause, what was found and what was expected. A backend that refuses the
spec is not checked: `run_case` returns the verdict.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Verdict
from attn_dispatch.conformance.cases import Case, mutations
from attn_dispatch.conformance.problem import Arrays, Problem, make_problem
from attn_dispatch.conformance.tolerance import LSE_FLOOR, OUTPUT_FLOOR, attend_rounded, within
from attn_dispatch.contract import Array, AttentionSpec, KVCache, LayerParameters
from attn_dispatch.contract.arrays import as_library, as_numpy, library_of
from attn_dispatch.contract.dtypes import is_quantised, numpy_dtype, quantise
from attn_dispatch.dispatch import verdict_of
from attn_dispatch.reference import attend

__all__ = ["CaseResult", "ConformanceError", "Outcome", "check_mutations", "compute", "run_case"]

# What one stored element may be off by, as a share of its row's largest magnitude (or range), where a layout has finer
# scales than the contract's per-tensor ones: half a step of the type, and some for the scale's own rounding.
_STEP = {"int8": 0.55 / 127, "uint8": 0.6 / 255, "uint4": 0.6 / 15, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}


class ConformanceError(AssertionError):
    """A backend said yes to a spec and did not do what the contract says."""


@dataclass(frozen=True)
class Outcome:
    """What a backend computed for a problem: host copies.

    Attributes:
        out: [T, H, Dv].
        lse: f32[T, H], or None when the spec does not ask for it.
        before: the cache's logical (key, value) before the step, as stored; None without a cache.
        after: likewise after it.
        exact: the cache stores what clause 12 says, bit for bit; else it has scales of its own and is held to its step.
    """

    out: Arrays
    lse: Arrays | None
    before: tuple[Arrays, Arrays] | None
    after: tuple[Arrays, Arrays] | None
    exact: bool


@dataclass(frozen=True)
class CaseResult:
    """A case that passed, or the reason why it was not run."""

    case: Case
    verdict: Verdict
    error: float = 0.0
    allowed: float = 0.0


def run_case(backend: Backend, case: Case, seed: int = 0) -> CaseResult:
    """Run one case and check everything that the contract says of its result.

    Raises:
        ConformanceError: the backend accepted the spec and broke a clause.
    """
    verdict = verdict_of(backend, case.spec, case.scales != (1.0, 1.0))
    if not verdict:
        return CaseResult(case, verdict)
    problem = make_problem(case, seed)
    layer = LayerParameters(case.spec, **problem.parameters)
    outcome = compute(backend, problem)
    keys, values = _check_contents(problem, layer, outcome)
    error, allowed = _check_result(backend, problem, layer, outcome, keys, values, case.spec)
    return CaseResult(case, verdict, error, allowed)


def check_mutations(backend: Backend, case: Case, seed: int = 0) -> int:
    """Check that a case would notice each mistake of `mutations` (and swapped keys and values); return how many.

    Raises:
        ConformanceError: the backend's result also fits a wrong computation, so the case proves nothing.
    """
    if not verdict_of(backend, case.spec, case.scales != (1.0, 1.0)):
        return 0
    problem = make_problem(case, seed)
    layer = LayerParameters(case.spec, **problem.parameters)
    outcome = compute(backend, problem)
    keys, values = _check_contents(problem, layer, outcome)
    wrong = [(name, spec, layer, keys, values) for name, spec in mutations(case)]
    if case.spec.head_size == case.spec.value_head_size and sum(map(len, keys)) > 0:
        wrong.append(("keys and values swapped", case.spec, layer, values, keys))
    for name in ("alibi_slopes", "sinks"):
        if name in problem.parameters and problem.batch.num_tokens:
            other = LayerParameters(case.spec, **{**problem.parameters, name: problem.parameters[name] * 1.5 + 0.1})
            wrong.append((f"other {name}", case.spec, other, keys, values))
    for name, spec, parameters, wrong_keys, wrong_values in wrong:
        try:
            _check_result(backend, problem, parameters, outcome, wrong_keys, wrong_values, spec)
        except ConformanceError:
            continue
        raise ConformanceError(f"{case.name}: the result also passes as right with this mistake: {name}")
    if outcome.lse is not None and problem.batch.num_tokens:
        base2 = replace(outcome, lse=outcome.lse / np.float32(np.log(2)))
        try:
            _check_result(backend, problem, layer, base2, keys, values, case.spec)
        except ConformanceError:
            return len(wrong) + 1
        raise ConformanceError(f"{case.name}: an LSE in base 2 would pass as natural")
    return len(wrong)


def compute(backend: Backend, problem: Problem) -> Outcome:
    """Fill a cache as the problem says, poison what is unused, run the step, and bring everything to the host."""
    spec = problem.spec
    attn = attention(spec, backend, **problem.parameters)
    if attn.backend is not backend:
        raise ConformanceError(f"{backend} was asked for, {attn.backend} was given")
    side = problem.batch.view(spec.kind).side
    cache = attn.allocate(problem.num_blocks) if side.has_blocks or spec.kind != "encoder" else None
    before = None
    if cache is not None:
        _check_zeroed(cache)
        poison(backend, cache)
        if problem.context is not None:
            _fill(attn, problem, cache)
        before = contents(cache)
    like = any_array(backend, cache)
    q, k, v = (None if x is None else to_backend(x, like) for x in (problem.q, problem.k, problem.v))
    result = attn.run(attn.plan(problem.batch), q, k, v, cache, return_lse=spec.returns_lse)
    out, lse = result if spec.returns_lse else (result, None)
    for name, array in (("output", out), ("LSE", lse)):
        if array is not None and library_of(array) != library_of(q):
            raise ConformanceError(f"the {name} is an array of {library_of(array)}, q was of {library_of(q)}")
    after = contents(cache) if cache is not None else None
    return Outcome(
        out=to_host(out),
        lse=None if lse is None else to_host(lse),
        before=before,
        after=after,
        exact=cache is None or not (cache.layout.per_token_scales or spec.kv_cache_dtype in ("uint8", "uint4")),
    )


def to_backend(array: Arrays, like: Array) -> Array:
    """Return a host array as one of the library and on the device of `like`."""
    moved = as_library(array, library_of(like))
    return moved.to(like.device) if library_of(like) == "torch" else moved


def any_array(backend: Backend, cache: KVCache | None) -> Array:
    """Return an array of the backend's library on the device that it computes on (which imports the library)."""
    return next(iter(cache.arrays.values())) if cache is not None else backend.zeros((0,), "float32", None)


def to_host(array: Array) -> Arrays:
    """Return a copy on the host, as NumPy."""
    return np.array(as_numpy(array.cpu() if library_of(array) == "torch" else array))


def contents(cache: KVCache) -> tuple[Arrays, Arrays]:
    """Return the whole cache in logical order, on the host."""
    key, value = cache.gather(range(cache.num_blocks))
    return to_host(key), to_host(value)


def poison(backend: Backend, cache: KVCache) -> None:
    """Fill a new cache with what must not be read: NaN if the backend survives that, else large numbers."""
    for name, array in cache.arrays.items():
        dtype = cache.geometry.dtype if not name.endswith("_scale") else "float32"
        if dtype in ("uint8", "uint4"):
            continue  # scales lie among the elements: no bit pattern is harmless poison in all of them
        bad = 100.0 if dtype == "int8" else float("nan") if backend.capabilities.nan_safe else 240.0
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


def _fill(attn: Attention, problem: Problem, cache: KVCache) -> None:
    assert problem.context is not None
    batch, k, v = problem.context
    # A layer that never writes reads what its neighbour, alike but for that, has written: a causal one, if what it
    # computes is of no consequence and the backend may not have any other.
    causal = attn.spec.causal or (attn.spec.kind == "decoder" and attn.spec.sees_every_key)
    spec = replace(attn.spec, writes_kv=True, returns_lse=False, causal=causal)
    writer = attn if spec == attn.spec else attention(spec, attn.backend, **problem.parameters)
    rows = batch.view(spec.kind).num_tokens
    like = any_array(attn.backend, cache)
    q = np.zeros((rows, spec.num_heads, spec.head_size), k.dtype)
    q, k, v = (to_backend(x, like) for x in (q, k, v))
    writer.run(writer.plan(batch), q, k, v, cache)


def _check_zeroed(cache: KVCache) -> None:
    for array in contents(cache):
        if not np.isfinite(array.astype(np.float32)).all():
            raise ConformanceError("clause 2: a cache must be finite after allocate")


def _check_contents(problem: Problem, layer: LayerParameters, outcome: Outcome) -> tuple[list[Arrays], list[Arrays]]:
    """Check clause 6 (each new token written once, nothing else touched); return what is read, per sequence, f64."""
    spec = problem.spec
    if outcome.before is None or outcome.after is None:
        exact = [[x.astype(np.float64) for x in side] for side in (problem.keys, problem.values)]
        return exact[0], exact[1]
    view = problem.batch.view(spec.kind)
    slots = view.side.slots
    block, offset = np.divmod(slots[slots >= 0], spec.block_size)
    sides = []
    for name, new, scale, before, after, wanted in (
        ("keys", problem.k, layer.k_scale, outcome.before[0], outcome.after[0], problem.keys),
        ("values", problem.v, layer.v_scale, outcome.before[1], outcome.after[1], problem.values),
    ):
        expected = before.copy()
        written = np.zeros(before.shape[:3], dtype=bool)
        if new is not None:
            written[block, :, offset] = True
            if outcome.exact:
                expected[block, :, offset] = quantise(new[slots >= 0], spec.kv_cache_dtype, scale)
            else:
                _check_steps(problem, name, new[slots >= 0], after[block, :, offset] * scale)
                expected[block, :, offset] = after[block, :, offset]
        _check_identical(problem, name, after, expected, written)
        # What a sequence reads: its own tokens as the cache holds them.
        factor = scale if is_quantised(spec.kv_cache_dtype) else 1.0
        reads = []
        for s, tokens in enumerate(wanted):
            table = view.side.table[s, : -(-len(tokens) // spec.block_size)]
            stored = after[table].transpose(0, 2, 1, 3).reshape(-1, *after.shape[1:2], after.shape[3])[: len(tokens)]
            if outcome.exact:
                # By the contract's own arithmetic, not by what came back: the two were just compared for new tokens.
                stored_by_contract = quantise(tokens, spec.kv_cache_dtype, scale)
                if not np.array_equal(_bits(stored), _bits(stored_by_contract)):
                    raise ConformanceError(
                        f"{problem.case.name}: clause 6: {name} of sequence {s} are not what was written"
                    )
            reads.append(stored.astype(np.float64) * factor)
        sides.append(reads)
    return sides[0], sides[1]


def _bits(array: Arrays) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def _check_steps(problem: Problem, name: str, new: Arrays, stored: Arrays) -> None:
    if not len(new):
        return
    wide = new.astype(np.float32)
    dtype = problem.spec.kv_cache_dtype
    reach = np.abs(wide).max(axis=-1, keepdims=True)
    if dtype in ("uint8", "uint4"):
        # Asymmetric: a group may be a whole block of one channel, so the range is taken over all that is there.
        reach = np.full_like(reach, wide.max() - wide.min())
    error = np.abs(stored - wide)
    if (error > _STEP[dtype] * reach + 1e-6).any():
        worst = float((error / reach).max())
        raise ConformanceError(
            f"{problem.case.name}: clause 12: stored {name} are off by {worst:.3g} of a row's reach, "
            f"{dtype} may lose {_STEP[dtype]:.3g}"
        )


def _check_identical(
    problem: Problem, name: str, after: Arrays, expected: Arrays, written: npt.NDArray[np.bool_]
) -> None:
    differs = (_bits(after) != _bits(expected)).reshape(*after.shape[:3], -1).any(axis=3)
    if problem.spec.kv_cache_dtype in ("uint8", "uint4"):
        # A runtime may keep one scale for all tokens of a block: what a neighbour stands for may then move.
        differs[written.any(axis=(1, 2))] = False
    if not differs.any():
        return
    n, head, b = (int(i) for i in np.argwhere(differs)[0])
    what = "was not stored as the contract says" if written[n, head, b] else "was overwritten, and is not the step's"
    slot = n * problem.spec.block_size + b
    raise ConformanceError(f"{problem.case.name}: clause 6: {name} in slot {slot} (block {n}), head {head}, {what}")


def _check_result(
    backend: Backend,
    problem: Problem,
    layer: LayerParameters,
    outcome: Outcome,
    keys: list[Arrays],
    values: list[Arrays],
    spec: AttentionSpec,
) -> tuple[float, float]:
    name, dtype = problem.case.name, problem.spec.dtype
    shape = (problem.batch.view(spec.kind).num_tokens, spec.num_heads, spec.value_head_size)
    if outcome.out.shape != shape or outcome.out.dtype != numpy_dtype(dtype):
        raise ConformanceError(
            f"{name}: the output is {outcome.out.dtype} {outcome.out.shape}, the contract says {dtype} {shape}"
        )
    rounds_to = backend.capabilities.rounds_kv_to
    if rounds_to is not None:
        keys, values = ([x.astype(numpy_dtype(rounds_to)).astype(np.float64) for x in side] for side in (keys, values))
    exact, exact_lse = problem.solve(attend, spec, layer, keys, values)
    rounded, rounded_lse = problem.solve(attend_rounded, spec, layer, keys, values)
    near, error, allowed = within(outcome.out, exact, rounded, OUTPUT_FLOOR[dtype])
    if not near:
        raise ConformanceError(f"{name}: clause 11: the output is off by {error:.3g}, allowed are {allowed:.3g}")
    if outcome.lse is not None:
        if outcome.lse.dtype != np.float32 or outcome.lse.shape != shape[:2]:
            raise ConformanceError(
                f"{name}: clause 5: the LSE is {outcome.lse.dtype} {outcome.lse.shape}, not f32[T, H]"
            )
        near, lse_error, lse_allowed = within(outcome.lse, exact_lse, rounded_lse, LSE_FLOOR[dtype])
        if not near:
            raise ConformanceError(
                f"{name}: clause 5: the LSE is off by {lse_error:.3g}, allowed are {lse_allowed:.3g}"
            )
    return error, allowed
