"""Random layers and batches that a backend accepts: what nobody thought of naming. Each run has a seed of its own."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np

from attn_dispatch.backend import Backend
from attn_dispatch.conformance.adaptation import plain_spec
from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import is_quantised
from attn_dispatch.dispatch import verdict_of
from attn_dispatch.errors import SpecError

__all__ = ["check_random_cases", "draw_case"]

_SHRINKING = 60  # runs that are spent on a smaller problem that fails too


def check_random_cases(backend: Backend, examples: int = 60, max_tokens: int = 400) -> int:
    """Run random problems; return how many.

    `CONFORMANCE_SEED` repeats a run, `CONFORMANCE_EXAMPLES` makes it longer.

    Args:
        backend: under test.
        examples: how many.
        max_tokens: the longest sequence.

    Raises:
        ConformanceError: one failed: with the seed, its number, and the smallest like it that fails.
        Refused: no plain layer is accepted.
    """
    seed = int(os.environ.get("CONFORMANCE_SEED", secrets.randbelow(2**31)))
    examples = int(os.environ.get("CONFORMANCE_EXAMPLES", examples))
    print(f"random problems: CONFORMANCE_SEED={seed}", file=sys.stderr)
    for number in range(examples):
        rng = np.random.default_rng([seed, number])
        case = draw_case(rng, backend, max_tokens)
        error = _failure(backend, case)
        if error is not None:
            case, error = _shrink(backend, case, error)
            raise ConformanceError(
                f"random problem {number} of CONFORMANCE_SEED={seed}: {type(error).__name__}: {error}\n"
                f"{_describe(case)}"
            ) from error
    return examples


def _failure(backend: Backend, case: Case) -> Exception | None:
    try:
        run_case(backend, case, mutations=False)
    except Exception as error:  # a vendor may raise anything
        return error
    return None


def _describe(case: Case) -> str:
    """Return the case's fields that are not the defaults."""
    plain = Case("random", "random problems", case.spec, (), ())
    others = [f.name for f in fields(Case) if f.name != "spec" and getattr(case, f.name) != getattr(plain, f.name)]
    return f"{case.spec}: " + ", ".join(f"{name}={getattr(case, name)}" for name in others)


def draw_case(rng: np.random.Generator, backend: Backend, max_tokens: int) -> Case:
    """Draw a problem: a layer grown from a plain one by what the backend accepts, and a batch that fits it."""
    spec = _draw_spec(rng, backend)
    sequences = int(rng.integers(0, 6))
    context = rng.integers(0, max(max_tokens - 40, 1), sequences)
    context = np.where(rng.random(sequences) < 0.3, context % 40, context)
    new = rng.choice([1, 1, 1, 0, 2, 4, 9, 33, 80], sequences)
    encoder = None
    if spec.kind == "encoder":
        context = np.zeros(sequences, np.int64)
    if spec.kind == "cross":
        encoder = tuple(map(int, rng.integers(0, max_tokens, sequences)))
        new = np.minimum(new, 9)
    writes = spec.kind == "decoder" and spec.writes_kv
    scaled = is_quantised(spec.kv_cache_dtype) and verdict_of(backend, spec, scaled=True)
    shared = int(rng.integers(1, 4)) * spec.block_size
    can_share = writes and sequences > 1 and int(context.min(initial=0)) > shared
    return Case(
        name="random",
        feature="random problems",
        spec=spec,
        context=tuple(map(int, context)),
        new=tuple(map(int, new)),
        encoder=encoder,
        padding=int(rng.choice([0, 0, 1, 2])) if writes else 0,
        skipped_slots=writes and not can_share and int(new.sum()) > 0 and rng.random() < 0.2,
        scales=(0.03, 0.04) if scaled else (1.0, 1.0),
        magnitude=float(rng.choice([1.0, 1.0, 1.0, 8.0])),
        shared=shared if can_share else 0,
        unused=str(rng.choice(["nan", "ordinary"])),
        arrays=str(rng.choice(["whole", "whole", "strided"])),
        out=str(rng.choice(["none", "none", "given"])),
    )


def _draw_spec(rng: np.random.Generator, backend: Backend) -> AttentionSpec:
    spec = plain_spec(backend)
    choices = list(_choices(rng, spec))
    for i in rng.permutation(len(choices)):
        try:
            changed = replace(spec, **choices[i](spec))
        except SpecError:
            continue
        if verdict_of(backend, changed):
            spec = changed
    return spec


def _choices(rng: np.random.Generator, plain: AttentionSpec) -> Iterator[Callable[[AttentionSpec], dict[str, Any]]]:
    """Yield changes of a spec, each of some fields; most layers keep most of a plain one's."""

    def rarely(share: float, change: dict[str, Any]) -> Callable[[AttentionSpec], dict[str, Any]]:
        return lambda spec: change if rng.random() < share else {}

    kv_heads = int(rng.integers(1, 4))
    yield rarely(0.9, {"num_heads": kv_heads * int(rng.choice([1, 2, 3, 4, 8])), "num_kv_heads": kv_heads})
    size = int(rng.choice([8, 16, 32, 40, 64, 80, 128]))
    yield rarely(0.7, {"head_size": size, "value_head_size": size, "scale": float(rng.choice([size**-0.5, 0.2]))})
    yield rarely(0.3, {"value_head_size": int(rng.choice([32, 64, 128]))})
    dtype = str(rng.choice(["float32", "bfloat16", "float16", "float64"]))
    yield rarely(0.8, {"dtype": dtype, "kv_cache_dtype": dtype})
    stored = str(rng.choice(["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "float16"]))
    yield lambda spec: {"kv_cache_dtype": stored} if spec.dtype != "float64" and rng.random() < 0.3 else {}
    yield rarely(0.6, {"block_size": int(rng.choice([5, 8, 16, 32, 64, 128, 256]))})
    left = int(rng.choice([0, 1, 7, 31, 32, 33, 63, 64, 100, 300]))
    right = int(rng.choice([-1, 0, 5]))
    yield lambda spec: {"window": (left, -1 if spec.causal else right)} if rng.random() < 0.4 else {}
    yield rarely(0.4, {"logits_soft_cap": float(rng.choice([1.5, 30.0]))})
    yield rarely(0.3, {"alibi": True})
    yield rarely(0.3, {"sinks": True})
    yield rarely(0.4, {"returns_lse": True})
    yield rarely(0.2, {"causal": False})
    yield lambda spec: {"writes_kv": False} if spec.kind == "decoder" and rng.random() < 0.15 else {}
    kind = str(rng.choice(["encoder", "cross"]))
    yield rarely(0.25, {"kind": kind, "causal": False, "writes_kv": True, "alibi": False, "window": (-1, -1)})


def _shrink(backend: Backend, case: Case, error: Exception) -> tuple[Case, Exception]:
    """Return the smallest problem like this one that was found to fail, and its error."""
    budget = _SHRINKING
    smaller = True
    while smaller and budget > 0:
        smaller = False
        for candidate in _simpler(case, partial(plain_spec, backend)):
            budget -= 1
            if budget <= 0:
                break
            if verdict_of(backend, candidate.spec, candidate.scales != (1.0, 1.0)):
                failure = _failure(backend, candidate)
                if failure is not None:
                    case, error, smaller = candidate, failure, True
                    break
    return case, error


def _simpler(case: Case, plain: Callable[[], AttentionSpec]) -> Iterator[Case]:
    for s in range(len(case.new)):
        yield replace(
            case,
            context=case.context[:s] + case.context[s + 1 :],
            new=case.new[:s] + case.new[s + 1 :],
            encoder=None if case.encoder is None else case.encoder[:s] + case.encoder[s + 1 :],
            shared=0,
        )
    defaults = Case("", "", case.spec, (), ())
    for field in fields(Case):
        if field.name not in ("name", "feature", "spec", "context", "new", "encoder"):
            default = getattr(defaults, field.name)
            if getattr(case, field.name) != default:
                yield replace(case, **{field.name: default})
    simple = plain()
    for name in ("window", "logits_soft_cap", "alibi", "sinks", "returns_lse", "block_size", "scale"):
        if getattr(case.spec, name) != getattr(simple, name):
            try:
                yield replace(case, spec=replace(case.spec, **{name: getattr(simple, name)}))
            except SpecError:
                continue
    if any(c > 9 for c in case.context) and not case.shared:
        yield replace(case, context=tuple(c // 2 for c in case.context))
