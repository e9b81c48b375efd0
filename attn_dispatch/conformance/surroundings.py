"""What must not matter to a result: torch's default dtype and device, and how far into memory a block lies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attn_dispatch.backend import Backend
from attn_dispatch.conformance.adaptation import adapt_case, plain_spec
from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.cases import CASES
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.compute import any_array, compute
from attn_dispatch.conformance.findings import ConformanceError, NotRun, Refused
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.arrays import library_of
from attn_dispatch.contract.dtypes import itemsize
from attn_dispatch.dispatch import verdict_of

__all__ = ["SURROUNDINGS", "check_far_blocks"]

# Masks, slopes, sinks, lengths: what a step makes tensors of.
_SUBSET = (
    "mixed float32", "mixed bfloat16", "mixed float64", "window float32", "ALiBi float32", "ALiBi float64",
    "sinks float32", "LSE float32", "encoder window", "cross, first step float32", "padding sequence",
    "int8 cache, scaled", "tokens with slot -1",
)  # fmt: skip


def check_default_dtype(backend: Backend, dtype: str) -> None:
    """A subset of the cases under another default dtype of torch."""
    torch, device = _torch(backend)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        _run_subset(backend, device, f"torch.set_default_dtype(torch.{dtype})")
    finally:
        torch.set_default_dtype(before)


def check_default_device(backend: Backend) -> None:
    """A subset of the cases while torch makes tensors on a device that computes nothing, unless it is told where."""
    torch, device = _torch(backend)
    with torch.device("meta"):
        _run_subset(backend, device, "torch.set_default_device('meta')")


def _torch(backend: Backend) -> tuple[Any, str]:
    if "torch" not in backend.capabilities.libraries:
        raise NotRun("the backend does not compute on torch's tensors")
    like = any_array(backend, None)
    if library_of(like) != "torch":
        raise NotRun("the backend does not compute on torch's tensors")
    return sys.modules["torch"], str(like.device)


def _run_subset(backend: Backend, device: str, where: str) -> None:
    ran = 0
    for case in CASES:
        if case.name not in _SUBSET:
            continue
        adapted, verdict = adapt_case(case, partial(verdict_of, backend))
        if not verdict:
            continue
        try:
            ran += bool(run_case(backend, adapted, mutations=False, run=partial(compute, device=device)).verdict)
        except Exception as error:
            raise ConformanceError(f"under {where}: {type(error).__name__}: {error}") from error
    if not ran:
        raise NotRun("none of these cases is accepted")


def check_far_blocks(backend: Backend) -> None:
    """Blocks whose elements lie beyond what 32 bits count, where there is memory for such a cache."""
    if backend.probe().evidence.startswith("simulated"):
        raise NotRun("a simulator would fill the memory of a whole cache")
    spec = _small_elements(backend)
    elements = spec.num_kv_heads * spec.block_size * spec.head_size
    blocks = int(2**31 / (elements * itemsize(spec.kv_cache_dtype))) + 1
    needed = 3 * 2 * blocks * elements * itemsize(spec.kv_cache_dtype)
    free = _free_bytes()
    if free < needed:
        raise NotRun(f"needs {needed / 2**30:.0f} GiB of free memory, {free / 2**30:.0f} are here")
    run_case(backend, Case("blocks beyond 2 GiB", "", spec, (70, 3), (1, 2), first_block=blocks), mutations=False)


def _small_elements(backend: Backend) -> AttentionSpec:
    """Return a layer whose cache has elements of one byte, so that 2 GiB are 2^31 of them, or a plain one."""
    for stored in ("float8_e4m3fn", "int8"):
        try:
            return plain_spec(backend, kv_cache_dtype=stored)
        except Refused:
            continue
    return plain_spec(backend)


def _free_bytes() -> int:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 0)


SURROUNDINGS: Mapping[str, Callable[[Backend], None]] = {
    "torch's default dtype is bfloat16": partial(check_default_dtype, dtype="bfloat16"),
    "torch's default dtype is float64": partial(check_default_dtype, dtype="float64"),
    "torch's default device is another": check_default_device,
}
"""Each is called with a backend."""
