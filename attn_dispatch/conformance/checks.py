"""A case run and judged: what the cache holds, what came out, and that no mistake would have passed as well.

Everything raises `ConformanceError`, which says the clause, where, what was found and what was expected. A backend that
refuses the spec is not checked: `run_case` returns the verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from attn_dispatch import reference
from attn_dispatch.backend import Backend, Verdict
from attn_dispatch.conformance import tolerance
from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.compute import Outcome, compute
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.mutations import MUTATIONS, must_notice
from attn_dispatch.conformance.problem import Arrays, Problem, Reading, make_problem
from attn_dispatch.conformance.stored import check_contents
from attn_dispatch.conformance.tolerance import LSE_FLOOR, OUTPUT_FLOOR, Comparison
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import verdict_of

__all__ = ["CaseResult", "Judge", "check_mutations", "run_case"]


@dataclass(frozen=True)
class CaseResult:
    """A case that passed, or the reason why it was not run.

    Attributes:
        case: that was run.
        verdict: of the backend.
        error: the output's largest.
        allowed: what is allowed there.
        mutations: mistakes that the case was shown to notice.
    """

    case: Case
    verdict: Verdict
    error: float = 0.0
    allowed: float = 0.0
    mutations: tuple[str, ...] = ()


def run_case(
    backend: Backend,
    case: Case,
    seed: int = 0,
    *,
    mutations: bool = True,
    lifted: bool = False,
    run: Callable[[Backend, Problem], Outcome] = compute,
) -> CaseResult:
    """Run one case, check everything that the contract says of its result, and that mistakes would be noticed.

    Args:
        backend: under test.
        case: of the kit.
        seed: of its numbers.
        mutations: also check that the result does not fit a wrong computation as well.
        lifted: the case was made for a finer dtype: mistakes that are smaller than this one's error are left out.
        run: how the backend computes a problem.

    Raises:
        ConformanceError: the backend accepted the spec and broke a clause.
    """
    verdict = verdict_of(backend, case.spec, case.scales != (1.0, 1.0))
    if not verdict:
        return CaseResult(case, verdict)
    problem = make_problem(case, seed)
    outcome = run(backend, problem)
    reading = problem.reading(*check_contents(problem, outcome))
    judge = Judge(backend, problem, outcome)
    comparison = judge.check(reading)
    noticed = judge.check_mutations(reading, lifted=lifted) if mutations else ()
    return CaseResult(case, verdict, comparison.error, comparison.allowed, noticed)


def check_mutations(backend: Backend, case: Case, seed: int = 0) -> int:
    """Run one case and return how many mistakes it was shown to notice (0, if it is refused); see `run_case`."""
    return len(run_case(backend, case, seed).mutations)


class Judge:
    """Compares one outcome with what different readings of the problem would give, sequence by sequence."""

    def __init__(self, backend: Backend, problem: Problem, outcome: Outcome) -> None:
        self.backend = backend
        self.problem = problem
        self.outcome = outcome
        # Large scores lose digits in float32 whoever adds them up, in whatever order.
        share = max(1.0, abs(problem.case.shift) / 10, problem.case.magnitude / 4)
        self._floors = share * OUTPUT_FLOOR[problem.spec.dtype], share * LSE_FLOOR[problem.spec.dtype]
        # What each sequence's (output, LSE) may be off by: from the right reading.
        self._granted: dict[int, tuple[float, ...]] = {}
        work = problem.view.query_lens.astype(np.int64) * problem.view.kv_lens
        self._sequences = [int(s) for s in np.argsort(work, kind="stable") if problem.view.query_lens[s]]

    def check(self, reading: Reading) -> Comparison:
        """Return how the output compares with the right reading, where it is furthest off.

        Raises:
            ConformanceError: it is too far off, or the LSE is, or their shapes or types are wrong.
        """
        self._check_shapes()
        rounded_reading = self._rounded_by_runtime(reading)
        worst = Comparison(True, 0.0, 0.0)
        for s in self._sequences:
            exact = rounded_reading.solve(self.problem.view, s, reference.attend)
            self._granted[s] = self._grant(rounded_reading, s, exact)
            comparisons = [
                self._compare(result, s, right, granted)
                for result, right, granted in zip(self._results, exact, self._granted[s], strict=True)
            ]
            for which, comparison in enumerate(comparisons):
                if not comparison.near:
                    self._refuse(which, comparison, s, exact[which], reading)
            if comparisons[0].error >= worst.error:
                worst = comparisons[0]
        return worst

    def check_mutations(self, reading: Reading, *, lifted: bool = False) -> tuple[str, ...]:
        """Check that no mistake which the case must notice fits the outcome; return their names.

        Args:
            reading: the right one.
            lifted: see `run_case`.

        Raises:
            ConformanceError: one does, so that the case proves nothing.
        """
        noticed = []
        for mutation in must_notice(self.problem.case):
            wrong = mutation.change(self.problem, reading)
            if wrong is None:
                raise ConformanceError(f"{self.problem.case.name}: it cannot be computed as if {mutation.name}")
            if self.fits(wrong):
                if lifted:
                    continue
                raise ConformanceError(
                    f"{self.problem.case.name}: the result also passes as right if computed as if {mutation.name}"
                )
            noticed.append(mutation.name)
        return tuple(noticed)

    def fits(self, reading: Reading) -> bool:
        """Tell whether the outcome is what this reading gives, within twice what the right one is granted."""
        reading = self._rounded_by_runtime(reading)
        for s in self._sequences:
            exact = reading.solve(self.problem.view, s, reference.attend)
            for result, right, granted in zip(self._results, exact, self._granted[s], strict=True):
                if not self._compare(result, s, right, 2 * granted).near:
                    return False
        return True

    @property
    def _results(self) -> tuple[Arrays | None, Arrays | None]:
        return self.outcome.out, self.outcome.lse

    def _grant(self, reading: Reading, s: int, exact: tuple[Arrays, Arrays]) -> tuple[float, ...]:
        """Return what the sequence's (output, LSE) may be off by; the kit's own two computations must agree."""
        rounded = reading.solve(self.problem.view, s, tolerance.attend_rounded)
        bounds = reading.solve(self.problem.view, s, tolerance.rounding_bound)
        for what, right, plain, bound in zip(("output", "LSE"), exact, rounded, bounds, strict=True):
            comparison = tolerance.compare(plain, right, bound)
            if not comparison.near:
                raise ConformanceError(
                    f"{self.problem.case.name}: the kit's own oracle and yardstick differ by {comparison.error:.3g} in "
                    f"the {what} of sequence {s}, where rounding explains {comparison.allowed:.3g}: one of them is "
                    "wrong, and nothing can be judged by it"
                )
        return tuple(map(tolerance.granted, exact, rounded, self._floors))

    def _compare(self, result: Arrays | None, s: int, exact: Arrays, granted: float) -> Comparison:
        if result is None:
            return Comparison(True, 0.0, 0.0)
        rows = result[slice(*self.problem.view.query_start_loc[s : s + 2])]
        return tolerance.compare(rows, exact, np.asarray(granted))

    def _rounded_by_runtime(self, reading: Reading) -> Reading:
        dtype = self.backend.capabilities.rounds_kv_to
        if dtype is None:
            return reading
        keys, values = (
            [x.astype(numpy_dtype(dtype)).astype(np.float64) for x in side] for side in (reading.keys, reading.values)
        )
        return replace(reading, keys=keys, values=values)

    def _check_shapes(self) -> None:
        name, spec, out, lse = self.problem.case.name, self.problem.spec, self.outcome.out, self.outcome.lse
        shape = (self.problem.view.num_tokens, spec.num_heads, spec.value_head_size)
        if out.shape != shape or out.dtype != numpy_dtype(spec.dtype):
            raise ConformanceError(
                f"{name}: the output is {out.dtype} {out.shape}, the contract says {spec.dtype} {shape}"
            )
        if lse is not None and (lse.dtype != np.float32 or lse.shape != shape[:2]):
            raise ConformanceError(f"{name}: clause 5: the LSE is {lse.dtype} {lse.shape}, not float32 {shape[:2]}")

    def _refuse(self, which: int, comparison: Comparison, s: int, right: Arrays, reading: Reading) -> None:
        """Raise what is wrong: where, by how much, and which mistake it looks like."""
        view = self.problem.view
        for other in self._sequences:
            if other not in self._granted:
                exact = self._rounded_by_runtime(reading).solve(view, other, reference.attend)
                self._granted[other] = self._grant(self._rounded_by_runtime(reading), other, exact)
        what, clause = (("output", 11), ("LSE", 5))[which]
        token, head, *element = comparison.where
        result = self._results[which]
        assert result is not None
        here = float(result[(int(view.query_start_loc[s]) + token, head, *element)])
        names = " or ".join(self._likenesses(reading))
        raise ConformanceError(
            f"{self.problem.case.name}: clause {clause}: the {what} is off by {comparison.error:.3g}, allowed are "
            f"{comparison.allowed:.3g}, at sequence {s} ({int(view.query_lens[s])} new tokens, {int(view.kv_lens[s])} "
            f"keys), token {token}, head {head}{f', element {element[0]}' if element else ''}: {here:.6g} instead of "
            f"{float(right[comparison.where]):.6g}{f'. It is as if {names}' if names else ''}"
        )

    def _likenesses(self, reading: Reading) -> list[str]:
        """Return the mistakes that give the very outcome (none, if it is nearly right: they would all be small)."""
        if self.fits(reading):
            return []
        names = []
        for mutation in MUTATIONS:
            try:
                wrong = mutation.change(self.problem, reading)
                if wrong is not None and self.fits(wrong):
                    names.append(mutation.name)
            except (ValueError, IndexError):
                continue
        return names
