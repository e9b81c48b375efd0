"""Which instructions the kernels use: chosen per kind of cache among those that this CPU has.

    fma        keys and values widened to f32, multiplied and added: on every CPU, for every type
    bf16-dot   VDPBF16PS or BFDOT, pairs of bf16 summed in f32: queries and cache are bf16
    amx        tiles of bf16: queries are bf16, and bf16 holds every value of the cache exactly

That a CPU has an instruction does not make it the fastest: the bf16 dot product doubles these kernels' speed on one
maker's cores and halves it on the other's. What was measured on a core stands in a table; on one that is not in it the
instructions are timed, once, for some milliseconds, and the result is kept with the machine code.
"""

from __future__ import annotations

import json
import os
import time
from functools import cache
from typing import NamedTuple

import numpy as np

from attn_dispatch.errors import EnvironmentVariableError
from attn_dispatch_cpu import amx, machine_code, trusted_files
from attn_dispatch_cpu.kernels.arguments import RATE_CHAINS, RATE_WORDS
from attn_dispatch_cpu.kernels.isa import cpu_identity, host_isa

VARIABLE = "ATTN_DISPATCH_CPU_CODE_PATH"
"""The one path to use wherever it can be: fma, bf16-dot, amx, or amx-emulated (slow: for tests without AMX)."""
BF16_DOT_VARIABLE = "ATTN_DISPATCH_CPU_BF16_DOT"
"""0: do not use bf16-dot."""

PATHS = ("fma", "bf16-dot", "amx", "amx-emulated")
AMX_STORED = ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")

# By LLVM's name of the core, the fastest first. Measured on Zen 4 (dot 2x of fma) and Emerald Rapids (dot 0.6-0.8x of
# fma, AMX 4-10x); their neighbours have the same units. What has neither dot nor AMX has no choice and needs no row.
MEASURED_CORES = {
    "znver4": ("bf16-dot", "fma"),
    "znver5": ("bf16-dot", "fma"),
    "znver6": ("bf16-dot", "fma"),
    "sapphirerapids": ("amx", "fma"),
    "emeraldrapids": ("amx", "fma"),
    "graniterapids": ("amx", "fma"),
    "graniterapids-d": ("amx", "fma"),
}
ROUNDS = 20_000
TRIES = 5


class CodePath(NamedTuple):
    """What a kind of query and cache is computed with.

    Attributes:
        path: one of `PATHS`.
        reason: why that one.
    """

    path: str
    reason: str


def path_of(dtype: str, stored: str) -> str:
    """Return the code path of the attention kernels for queries and a cache of these types."""
    return choose(dtype, stored, os.environ.get(VARIABLE, ""), os.environ.get(BF16_DOT_VARIABLE, "")).path


@cache
def choose(dtype: str, stored: str, forced: str = "", bf16_dot: str = "") -> CodePath:
    """Return the code path for queries and a cache of these types.

    Args:
        dtype: of the queries.
        stored: of the cache.
        forced: the value of `VARIABLE`.
        bf16_dot: the value of `BF16_DOT_VARIABLE`.

    Raises:
        EnvironmentVariableError: no such path, or this machine does not have it.
    """
    isa = host_isa()
    fits = {"fma": True, "bf16-dot": dtype == stored == "bfloat16"}
    fits["amx"] = fits["amx-emulated"] = dtype == "bfloat16" and stored in AMX_STORED
    if forced:
        _check(forced)
        if fits[forced]:
            return CodePath(forced, VARIABLE)
        return CodePath("fma", f"{VARIABLE}={forced} is not for queries of {dtype} and a cache of {stored}")
    candidates = ["fma"]
    if fits["bf16-dot"] and isa.bf16_dot and bf16_dot != "0":
        candidates.append("bf16-dot")
    if fits["amx"] and isa.amx and amx.permitted():
        candidates.append("amx")
    if len(candidates) == 1:
        return CodePath("fma", f"this CPU has nothing else for queries of {dtype} and a cache of {stored}")
    core = cpu_identity()[1]
    if core in MEASURED_CORES:
        order = [path for path in MEASURED_CORES[core] if path in candidates]
        return CodePath(order[0], f"the fastest measured on {core}")
    rates = {path: rate(path) for path in candidates}
    best = max(candidates, key=lambda path: rates[path])
    figures = ", ".join(f"{path} {speed / 1e9:.0f}" for path, speed in rates.items())
    return CodePath(best, f"timed on this CPU ({core}), 10^9 products a second: {figures}")


def describe() -> dict[str, str]:
    """Return what each type of queries and cache is computed with, and why, in words."""
    settings = os.environ.get(VARIABLE, ""), os.environ.get(BF16_DOT_VARIABLE, "")
    kinds = [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float16", "float16"), ("float32", "float32")]
    chosen = {f"{dtype} queries, {stored} cache": choose(dtype, stored, *settings) for dtype, stored in kinds}
    return {kind: f"{each.path}: {each.reason}" for kind, each in chosen.items()}


def _check(forced: str) -> None:
    isa = host_isa()
    missing = {"bf16-dot": not isa.bf16_dot, "amx": not (isa.amx and amx.permitted())}
    if forced not in PATHS:
        raise EnvironmentVariableError(f"{VARIABLE}={forced!r} is not a code path. Known: {', '.join(PATHS)}")
    if missing.get(forced):
        raise EnvironmentVariableError(f"{VARIABLE}={forced}: this CPU does not have it, or the system withholds it")


@cache
def rate(path: str) -> float:
    """Return how many products of bf16 a thread makes in a second, as kept or timed now."""
    file = machine_code.cache_file(f"rate-{path}", "json")
    stored = trusted_files.read(file)
    if stored is not None:
        return float(json.loads(stored))
    kernel = machine_code.kernel("rate", 0, path)
    words = np.zeros(RATE_WORDS, np.int64)
    words[0] = ROUNDS
    at = words.ctypes.data
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        kernel(at, 0, 0)
        seconds.append(time.perf_counter() - start)
    lanes = host_isa().lanes
    products = {"fma": RATE_CHAINS * lanes, "bf16-dot": RATE_CHAINS * 2 * lanes, "amx": 4 * 16 * 16 * 32}[path]
    result = products * ROUNDS / min(seconds)
    machine_code.keep(file, json.dumps(result).encode())
    return result


__all__ = ["PATHS", "CodePath", "choose", "describe", "path_of", "rate"]
