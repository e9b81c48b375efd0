"""What a cache holds after a step: each new token written once and exactly, nothing else touched (clauses 6 and 12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.conformance.compute import Outcome
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.conformance.problem import Arrays, Problem
from attn_dispatch.contract.dtypes import is_quantised, quantise

__all__ = ["check_contents"]

# What one stored element may be off by, as a share of its row's largest magnitude (or range), where a layout has finer
# scales than the contract's per-tensor ones: half a step of the type, and some for the scale's own rounding.
_STEP = {"int8": 0.55 / 127, "uint8": 0.6 / 255, "uint4": 0.6 / 15, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}


def check_contents(problem: Problem, outcome: Outcome) -> tuple[list[Arrays], list[Arrays]]:
    """Check clause 6 (each new token written once, nothing else touched); return what is read, per sequence, f64."""
    spec = problem.spec
    if outcome.before is None or outcome.after is None:
        exact = [[x.astype(np.float64) for x in side] for side in (problem.keys, problem.values)]
        return exact[0], exact[1]
    side = problem.view.side
    slots = side.slots
    block, offset = np.divmod(slots[slots >= 0], spec.block_size)
    block = np.searchsorted(problem.watched, block)
    read: list[list[Arrays]] = []
    for name, new, scale, before, after, wanted in (
        ("keys", problem.k, problem.parameters["k_scale"], outcome.before[0], outcome.after[0], problem.keys),
        ("values", problem.v, problem.parameters["v_scale"], outcome.before[1], outcome.after[1], problem.values),
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
            table = np.searchsorted(problem.watched, side.table[s, : -(-len(tokens) // spec.block_size)])
            stored = after[table].transpose(0, 2, 1, 3).reshape(-1, *after.shape[1:2], after.shape[3])[: len(tokens)]
            if outcome.exact:
                # By the contract's own arithmetic, not by what came back: the two were just compared for new tokens.
                by_contract = quantise(tokens, spec.kv_cache_dtype, scale)
                if not np.array_equal(_bits(stored), _bits(by_contract)):
                    raise ConformanceError(
                        f"{problem.case.name}: clause 6: {name} of sequence {s} are not what was written"
                    )
            reads.append(stored.astype(np.float64) * factor)
        read.append(reads)
    return read[0], read[1]


def _bits(array: Arrays) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def _check_steps(problem: Problem, name: str, new: Arrays, stored: Arrays) -> None:
    if not len(new):
        return
    wide = new.astype(np.float32)
    dtype = problem.spec.kv_cache_dtype
    reach: Any = np.abs(wide).max(axis=-1, keepdims=True)
    if dtype in ("uint8", "uint4"):
        # Asymmetric: a group may be a whole block of one channel, so the range is taken over all that is there.
        reach = np.full_like(reach, wide.max() - wide.min())
    error = np.abs(stored - wide)
    if not (error <= _STEP[dtype] * reach + 1e-6).all():
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
    block = int(problem.watched[n])
    slot = block * problem.spec.block_size + b
    raise ConformanceError(f"{problem.case.name}: clause 6: {name} in slot {slot} (block {block}), head {head}, {what}")
