"""Every check of the kit, in one list: pytest runs it, and so does `attn-dispatch verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from attn_dispatch.backend import Backend, Capabilities, Plan
from attn_dispatch.conformance.adaptation import adapt_case, plain_spec
from attn_dispatch.conformance.bad_batches import BAD_BATCHES, check_bad_batch, check_integers, check_locked_arrays
from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.cases import CASES
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.findings import ConformanceError, NotRun, Refused
from attn_dispatch.conformance.literals import check_literals, check_stored
from attn_dispatch.conformance.loading import check_loading, check_selection
from attn_dispatch.conformance.merging import check_merging
from attn_dispatch.conformance.random_cases import check_random_cases
from attn_dispatch.conformance.rejections import REJECTIONS, check_rejection
from attn_dispatch.conformance.reuse import REUSE_CHECKS
from attn_dispatch.conformance.storage import STORAGE_CHECKS
from attn_dispatch.conformance.surroundings import SURROUNDINGS, check_far_blocks
from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch.contract.dtypes import CACHE_DTYPES
from attn_dispatch.dispatch import verdict_of

__all__ = [
    "CHECKS",
    "FEATURES",
    "NO_LIMITS",
    "SIMULATED",
    "Check",
    "Finding",
    "Limits",
    "case_check",
    "limits_of",
    "perform",
]


@dataclass(frozen=True)
class Limits:
    """How much of the kit is run.

    Attributes:
        tokens: of the longest sequence of a case.
        scores: that a case computes, of all heads.
        examples: random problems.
    """

    tokens: int = 1 << 30
    scores: int = 1 << 40
    examples: int = 60

    def reason(self, case: Case) -> str:
        """Return why a case is not run (empty: it is)."""
        if case.tokens > self.tokens:
            return f"{case.tokens} tokens; limited to {self.tokens} here"
        if case.scores > self.scores:
            return f"{case.scores} scores; limited to {self.scores} here"
        return ""


NO_LIMITS = Limits()
SIMULATED = Limits(tokens=701, scores=60_000, examples=16)
"""For interpreters and simulators, which take a second for what a device does in a millisecond."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: unique.
        feature: its row of the support table.
        run: is given the backend and the limits; returns the mistakes that it was shown to notice, or raises
            `ConformanceError`, `Refused`, `NotRun`.
        case: the case that it runs, if it is one of them.
    """

    name: str
    feature: str
    run: Callable[[Backend, Limits], Sequence[str] | None]
    case: Case | None = None


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        feature: its row of the support table.
        state: "passed", "refused", "not run", "FAILED".
        detail: the refusal, the reason, or what is wrong.
        mutations: mistakes that it was shown to notice.
        error: what was raised, of a check that failed.
    """

    check: str
    feature: str
    state: str
    detail: str = ""
    mutations: tuple[str, ...] = ()
    error: Exception | None = field(default=None, compare=False, repr=False)


def limits_of(backend: Backend) -> Limits:
    """Return the limits for what a run of this backend is: a simulated one gets a subset."""
    return SIMULATED if backend.probe().evidence.startswith("simulated") else NO_LIMITS


def perform(check: Check, backend: Backend, limits: Limits = NO_LIMITS) -> Finding:
    """Run a check and return what it found; whatever is raised is a finding."""
    finding = partial(Finding, check.name, check.feature)
    try:
        _check_protocol(backend)
        return finding("passed", mutations=tuple(check.run(backend, limits) or ()))
    except Refused as refused:
        return finding("refused", str(refused.verdict))
    except NotRun as reason:
        return finding("not run", str(reason))
    except ConformanceError as error:
        return finding("FAILED", str(error), error=error)
    except Exception as error:  # a vendor may raise anything, and that is a finding
        slip = _slip(backend)
        return finding("FAILED", f"{check.name}: {slip or f'{type(error).__name__}: {error}'}", error=error)


def _check_protocol(backend: Backend) -> None:
    """Say in a sentence what an author forgot, before it is an AttributeError somewhere."""
    if not isinstance(backend, Backend):
        raise ConformanceError(f"{backend!r} is not a Backend: derive it from attn_dispatch.backend.Backend")
    if not isinstance(getattr(backend, "name", None), str):
        raise ConformanceError(f"{type(backend).__name__} has no name: call super().__init__(name) in its constructor")
    if not isinstance(getattr(backend, "capabilities", None), Capabilities):
        raise ConformanceError(
            f'{backend.name} has no capabilities: write `capabilities = Capabilities(libraries=("numpy",))` in its '
            "class, with the array library that it computes on"
        )
    if not backend.capabilities.libraries:
        raise ConformanceError(f"{backend.name}: capabilities.libraries is empty: name numpy, torch or jax")


def _case(case: Case, backend: Backend, limits: Limits) -> Sequence[str]:
    adapted, verdict = adapt_case(case, lambda spec: verdict_of(backend, spec, case.scales != (1.0, 1.0)))
    if not verdict:
        raise Refused(verdict)
    if reason := limits.reason(adapted):
        raise NotRun(reason)
    return run_case(backend, adapted, lifted=adapted.spec.dtype != case.spec.dtype).mutations


def _slip(backend: Backend) -> str:
    """Return what an author forgot, in a sentence, if that explains an error (empty: it does not)."""
    try:
        spec = plain_spec(backend)
        plan: object = backend.plan(spec, AttentionMetadata.build([1], [1], [[0]], spec.block_size))
    except Exception:
        return ""
    if not isinstance(plan, Plan):
        return (
            f"{backend.name}.plan returned a {type(plan).__name__}: return an attn_dispatch.backend.Plan, or a "
            "dataclass derived from it that holds what your kernels want"
        )
    return ""


def case_check(case: Case) -> Check:
    """Return the check that runs a case, lifted to what the backend accepts."""
    return Check(case.name, case.feature, partial(_case, case), case)


def _kit(backend: Backend, limits: Limits) -> None:
    check_literals()
    check_stored()


def _storage(name: str, stored: str, backend: Backend, limits: Limits) -> None:
    STORAGE_CHECKS[name](backend, plain_spec(backend, kv_cache_dtype=stored))


def _merging(dtype: str, parts: int, backend: Backend, limits: Limits) -> None:
    check_merging(backend, replace(plain_spec(backend), dtype=dtype), parts)


def _random(backend: Backend, limits: Limits) -> None:
    check_random_cases(backend, limits.examples, min(limits.tokens, 150 if limits is not NO_LIMITS else 400))


def _verdicts(backend: Backend, limits: Limits) -> None:
    """A verdict names fields of the spec, with what would be accepted."""
    fields = set(AttentionSpec.__dataclass_fields__) | {"", "k_scale, v_scale"}
    accepted = 0
    for case in CASES:
        verdict = verdict_of(backend, case.spec)
        accepted += bool(verdict)
        if verdict != verdict_of(backend, case.spec):
            raise ConformanceError(f"{backend.name} gives two verdicts on one spec: {case.spec}")
        for refusal in verdict.refusals:
            named = {part.strip() for part in refusal.field.replace("+", ",").split(",")}
            if not (named <= fields or refusal.field in fields):
                raise ConformanceError(
                    f"{backend.name} refuses {refusal.field!r}, which is no field of a spec: {refusal}"
                )
            if not refusal.accepts:
                raise ConformanceError(f"{backend.name} refuses {refusal.field} and does not say what it accepts")


def _simple(run: Callable[[Backend], None]) -> Callable[[Backend, Limits], None]:
    return lambda backend, limits: run(backend)


def _nobody(run: Callable[[], None]) -> Callable[[Backend, Limits], None]:
    return lambda backend, limits: run()


def _checks() -> Iterator[Check]:
    yield Check("the kit's own oracle and yardstick", "the kit itself", _kit)
    yield Check("verdicts name fields", "verdicts", _verdicts)
    for case in CASES:
        yield case_check(case)
    for name in STORAGE_CHECKS:
        for stored in CACHE_DTYPES:
            yield Check(f"{name}, {stored}", "storage", partial(_storage, name, stored))
    for dtype in ("float32", "bfloat16", "float16"):
        for parts in (1, 2, 5):
            yield Check(f"merging {parts} parts, {dtype}", "merging", partial(_merging, dtype, parts))
    for name, run in REUSE_CHECKS.items():
        yield Check(name, "plans used again", _simple(run))
    for name in BAD_BATCHES:
        yield Check(f"rejected: {name}", "rejections", _nobody(partial(check_bad_batch, name)))
    yield Check("a batch's arrays are locked", "rejections", _nobody(check_locked_arrays))
    yield Check("integers of any type make one batch", "rejections", _nobody(check_integers))
    for name in REJECTIONS:
        yield Check(f"rejected: {name}", "rejections", _simple(partial(check_rejection, name=name)))
    for name, run in SURROUNDINGS.items():
        yield Check(name, "surroundings", _simple(run))
    yield Check("blocks beyond 2 GiB", "blocks beyond 2 GiB", _simple(check_far_blocks))
    yield Check("random problems", "random problems", _random)
    yield Check("loading imports no vendor", "loading", _simple(check_loading))
    yield Check("the backend that was named runs", "loading", _simple(check_selection))


CHECKS: tuple[Check, ...] = tuple(_checks())
"""Every check. Names are unique."""

FEATURES: tuple[str, ...] = tuple(dict.fromkeys(check.feature for check in CHECKS))
"""Rows of the support table, in order."""
