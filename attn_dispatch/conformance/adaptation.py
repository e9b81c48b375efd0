"""Cases lifted to what a backend's verdict accepts: a kernel for bfloat16 and pages of 64 is checked with those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from attn_dispatch.backend import Backend, Verdict
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.findings import Refused
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import verdict_of

__all__ = ["BLOCK_SIZES", "DTYPES", "adapt_case", "adapt_spec", "plain_spec"]

DTYPES = ("float32", "bfloat16", "float16")
BLOCK_SIZES = (32, 16, 64, 128, 256)


def adapt_case(case: Case, accepts: Callable[[AttentionSpec], Verdict]) -> tuple[Case, Verdict]:
    """Return a case with a dtype and a block size that are accepted, and the verdict on it.

    What the case is about (`case.fixed`) stays as it is. If nothing is accepted, the case and its own verdict.

    Args:
        case: of the kit.
        accepts: a backend's verdict on a spec.
    """
    spec, verdict = adapt_spec(case.spec, accepts, case.fixed)
    return (case if spec is case.spec else replace(case, spec=spec)), verdict


def adapt_spec(
    spec: AttentionSpec, accepts: Callable[[AttentionSpec], Verdict], fixed: tuple[str, ...] = ()
) -> tuple[AttentionSpec, Verdict]:
    """Return the first spec that is accepted, this one or one of another dtype or block size, and the verdict on it."""
    first = accepts(spec)
    if first:
        return spec, first
    for other in _alternatives(spec, fixed):
        verdict = accepts(other)
        if verdict:
            return other, verdict
    return spec, first


def _alternatives(spec: AttentionSpec, fixed: tuple[str, ...]) -> Iterator[AttentionSpec]:
    dtypes = [spec.dtype] if "dtype" in fixed else list(dict.fromkeys([spec.dtype, *DTYPES]))
    sizes = [spec.block_size] if "block_size" in fixed else list(dict.fromkeys([spec.block_size, *BLOCK_SIZES]))
    for dtype in dtypes:
        stored = dtype if spec.kv_cache_dtype == spec.dtype else spec.kv_cache_dtype
        for size in sizes:
            yield replace(spec, dtype=dtype, kv_cache_dtype=stored, block_size=size)


def plain_spec(backend: Backend, fixed: tuple[str, ...] = (), **fields: Any) -> AttentionSpec:
    """Return a small plain layer that the backend accepts.

    Args:
        backend: under test.
        fixed: fields that stay as given.
        **fields: of the spec, beside heads 4/2 of 64, float32.

    Raises:
        Refused: there is none.
    """
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32"}
    refusals = []
    for head_size in [fields["head_size"]] if "head_size" in fields else [64, 128]:
        wanted = AttentionSpec(**(plain | {"head_size": head_size} | fields))
        spec, verdict = adapt_spec(wanted, lambda spec: verdict_of(backend, spec), fixed)
        if verdict:
            return spec
        refusals.append(verdict)
    raise Refused(refusals[0])
