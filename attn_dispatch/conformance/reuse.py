"""What holds when things are used again: one plan for many layers and caches, plans renewed, results kept, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.conformance.adaptation import plain_spec
from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.checks import Judge
from attn_dispatch.conformance.compute import (
    any_array,
    compute,
    contents,
    fill,
    parts,
    poison,
    run_layer,
    to_backend,
    to_host,
)
from attn_dispatch.conformance.findings import ConformanceError, NotRun, Refused
from attn_dispatch.conformance.problem import Problem, make_problem
from attn_dispatch.conformance.stored import check_contents
from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import verdict_of

__all__ = ["REUSE_CHECKS"]


_LONGEST = 96  # tokens of a sequence in a fixed plan


def _problem(backend: Backend, name: str, **fields: Any) -> Problem:
    return make_problem(Case(name, "", plain_spec(backend, **fields), (40, 9, 0), (1, 3, 5)))


class _Layer:
    """One layer on a step that another layer may share: its own parameters and cache."""

    def __init__(self, backend: Backend, problem: Problem) -> None:
        self.problem = problem
        self.attn = attention(problem.spec, backend, **problem.parameters)
        self.cache = self.attn.allocate(problem.num_blocks)
        poison(backend, self.cache)
        like = any_array(backend, self.cache)
        fill(self.attn, problem, self.cache)
        self.inputs = [to_backend(x, like) for x in (problem.q, problem.k, problem.v) if x is not None]
        outcome = compute(backend, problem)
        Judge(backend, problem, outcome).check(problem.reading(*check_contents(problem, outcome)))
        self.alone = outcome.out

    def run(self, plan: Any) -> Any:
        return run_layer(self.attn, plan, self.inputs, self.cache)

    def expect(self, what: str, result: Any) -> None:
        if not np.array_equal(to_host(result), self.alone):
            off = np.abs(to_host(result).astype(np.float64) - self.alone.astype(np.float64)).max()
            raise ConformanceError(f"{what}: the result differs from that of a plan of its own by {off:.3g}")


def check_two_layers(backend: Backend) -> None:
    """Two layers of one spec with other sinks, slopes and scales, and caches of their own, run on one plan."""
    ran = 0
    for fields, names in (({"sinks": True}, ("sinks",)), ({"alibi": True}, ("alibi_slopes",)), ({}, ())):
        try:
            first = _problem(backend, "first of two layers", **fields)
        except Refused:
            continue
        second = make_problem(first.case, seed=1)
        _share_plan(backend, first, second, f"two layers with other {' and '.join(names) or 'caches'} on one plan")
        ran += 1
    for stored in ("int8", "float8_e4m3fn"):
        spec = plain_spec(backend)
        try:
            spec = plain_spec(backend, kv_cache_dtype=stored)
        except Refused:
            continue
        if verdict_of(backend, spec, scaled=True):
            case = Case("scaled layers", "", spec, (40, 9, 0), (1, 3, 5), scales=(0.03, 0.04))
            first = make_problem(case)
            second = make_problem(replace(case, scales=(0.02, 0.05)), seed=1)
            _share_plan(backend, first, second, "two layers with other scales on one plan")
    if not ran:
        raise NotRun("no plain layer is accepted")


def _share_plan(backend: Backend, first: Problem, second: Problem, what: str) -> None:
    # The same batch: block ids are drawn from the seed, so the second layer's cache takes the first one's.
    before = tuple(replace(mine, batch=its.batch) for mine, its in zip(second.before, first.before, strict=True))
    second = replace(second, batch=first.batch, before=before)
    layers = [_Layer(backend, first), _Layer(backend, second)]
    plan = layers[0].attn.plan(first.batch)
    results = [layer.run(plan) for layer in layers]
    kept = to_host(results[0])
    for layer, result in zip(layers, results, strict=True):
        layer.expect(what, result)
    again = layers[0].run(plan)
    layers[0].expect(f"{what}, the first once more", again)
    if not np.array_equal(to_host(results[0]), kept):
        raise ConformanceError(f"{what}: a result changed when the next step ran: it lies in memory that is used again")


def check_plan_again(backend: Backend) -> None:
    """One plan run several times gives the same each time, also after other plans were made and run."""
    problem = _problem(backend, "a plan used again")
    layer = _Layer(backend, problem)
    plan = layer.attn.plan(problem.batch)
    for number in range(3):
        layer.expect(f"run {number + 1} of one plan", layer.run(plan))
        other = make_problem(Case(f"in between {number}", "", problem.spec, (70 + number,), (2,)))
        compute(backend, other)


def check_metadata_is_not_kept(backend: Backend) -> None:
    """Plans of different batches do not disturb each other, whichever is run first."""
    problems = [
        make_problem(Case(f"batch {i}", "", plain_spec(backend), context, new))
        for i, (context, new) in enumerate((((40, 9), (1, 2)), ((3,), (7,)), ((0, 80, 33), (4, 1, 1))))
    ]
    layers = [_Layer(backend, problem) for problem in problems]
    plans = [layer.attn.plan(layer.problem.batch) for layer in layers]
    for i in (2, 0, 1):
        layers[i].expect("plans made together and run in another order", layers[i].run(plans[i]))


def check_lse_on_demand(backend: Backend) -> None:
    """A layer that does not ask for the LSE can be asked for it, and the output stays the same."""
    spec = replace(plain_spec(backend, returns_lse=True), returns_lse=False)
    problem = make_problem(Case("LSE on demand", "", spec, (40, 9, 0), (1, 3, 5)))
    layer = _Layer(backend, problem)
    plan = layer.attn.plan(problem.batch)
    result = run_layer(layer.attn, plan, layer.inputs, layer.cache, return_lse=True)
    out, lse = parts(result, returns_lse=True)
    outcome = replace(compute(backend, problem), out=to_host(out), lse=to_host(lse))
    Judge(backend, problem, outcome).check(problem.reading(*check_contents(problem, outcome)))


def check_threads(backend: Backend) -> None:
    """Four threads, each with a cache of its own, get what one alone gets."""
    spec = plain_spec(backend)
    problems = [make_problem(Case(f"thread {i}", "", spec, (40, 9), (1, 12))) for i in range(4)]
    alone = [compute(backend, problem).out for problem in problems]
    outs: dict[int, list[Any]] = {i: [] for i in range(4)}
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                outs[i].append(compute(backend, problems[i]).out)
        except BaseException as error:  # whatever it is, it belongs to this check
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for i, results in outs.items():
        if not all(np.array_equal(out, alone[i]) for out in results):
            raise ConformanceError(f"thread {i} of four got another result than one thread alone")


def check_fixed_plan(backend: Backend) -> None:
    """A fixed plan gives, for each batch that it is renewed with, what a plan of its own gives; a misfit is refused."""
    if not backend.capabilities.fixed_plans:
        raise NotRun("the backend declares no fixed plans (Capabilities.fixed_plans)")
    spec = plain_spec(backend)
    attn = attention(spec, backend)
    num_blocks = 4 * _blocks_apart(spec)
    caches = attn.allocate(num_blocks), attn.allocate(num_blocks)
    like = any_array(backend, caches[0])
    rng = np.random.default_rng(3)
    plan = backend.fixed_plan(spec, _decodes(spec, [40, 1, 64, 7]), _LONGEST)
    for lens in ([40, 1, 64, 7], [41, 2, 65, 8], [42, 0, 66, 0], [0, 0, 0, 0], [96, 3, 1, 33], [1, 96, 96, 2]):
        batch = _decodes(spec, lens)
        shapes = [(4, n, spec.head_size) for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
        host = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        inputs = [to_backend(_cast(x, spec), like) for x in host]
        plan.renew(batch)
        result = to_host(run_layer(attn, plan, inputs, caches[0]))
        expected = to_host(run_layer(attn, attn.plan(batch), inputs, caches[1]))
        if not np.allclose(result.astype(np.float64), expected.astype(np.float64), rtol=2e-2, atol=2e-2):
            raise ConformanceError(
                f"a fixed plan renewed for lengths {lens} gives another result than a plan of its own"
            )
        for side, other in zip(contents(caches[0]), contents(caches[1]), strict=True):
            if not np.array_equal(side.view(np.uint8), other.view(np.uint8)):
                raise ConformanceError(
                    f"a fixed plan renewed for lengths {lens} writes other slots than a plan of its own"
                )
    _refuse_misfits(plan, spec)


def _cast(array: Any, spec: AttentionSpec) -> Any:
    return array.astype(numpy_dtype(spec.dtype))


def _refuse_misfits(plan: Any, spec: AttentionSpec) -> None:
    for what, batch in (
        ("five sequences", _decodes(spec, [1, 1, 1, 1, 0])),
        ("a longer sequence", _decodes(spec, [_LONGEST + 1, 1, 1, 1])),
    ):
        try:
            plan.renew(batch)
        except ValueError:
            continue
        raise ConformanceError(f"a fixed plan for four sequences of at most {_LONGEST} tokens was renewed with {what}")


def _blocks_apart(spec: AttentionSpec) -> int:
    return -(-_LONGEST // spec.block_size) + 1


def _decodes(spec: AttentionSpec, lens: list[int]) -> AttentionMetadata:
    """Return a step of one token per sequence; a length of 0 is padding."""
    size = spec.block_size
    blocks = _blocks_apart(spec)
    tables = [[s % 4 * blocks + i for i in range(-(-n // size))] for s, n in enumerate(lens)]
    slots = [-1 if not n else t[(n - 1) // size] * size + (n - 1) % size for n, t in zip(lens, tables, strict=True)]
    return AttentionMetadata.build([1] * len(lens), lens, tables, size, slot_mapping=slots)


REUSE_CHECKS: Mapping[str, Callable[[Backend], None]] = {
    "two layers and two caches on one plan": check_two_layers,
    "one plan, run again": check_plan_again,
    "plans run in another order": check_metadata_is_not_kept,
    "the LSE on demand": check_lse_on_demand,
    "four threads": check_threads,
    "fixed plans": check_fixed_plan,
}
"""Each is called with a backend."""
