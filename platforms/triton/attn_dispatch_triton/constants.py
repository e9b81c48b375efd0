"""What kernels are compiled for, of a spec. One place, for launches and for the compile check. No vendor."""

from __future__ import annotations

from typing import Any

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import is_quantised

from .tiles import Tiles, padded

__all__ = ["attend_constants", "compute_type", "pass_constants", "tile_sizes"]

_STORED = {"float8_e4m3fn": 1, "float8_e5m2": 2, "int8": 3}


def compute_type(spec: AttentionSpec, paged: bool) -> str:
    """Return the type of the operands of matrix products; sums are float32 in any case.

    A quantised element is exact in any of the 16-bit types. Where a cache stores another float than the layer computes
    with, neither holds the other.
    """
    stored = spec.kv_cache_dtype if paged else spec.dtype
    return spec.dtype if stored == spec.dtype or is_quantised(stored) else "float32"


def attend_constants(spec: AttentionSpec, paged: bool, interpreted: bool) -> dict[str, Any]:
    """Return the compile-time arguments that a spec decides; COMPUTE by name.

    Args:
        spec: the layer.
        paged: keys are in a cache (an encoder's need not be).
        interpreted: for Triton's interpreter.
    """
    left, right = spec.window
    return {
        "PAGED": paged,
        "BLOCK_SIZE": spec.block_size,
        "GROUP": spec.group_size,
        "HEAD_SIZE": spec.head_size,
        "VALUE_SIZE": spec.value_head_size,
        "STORED": _STORED.get(spec.kv_cache_dtype, 0) if paged else 0,
        "COMPUTE": compute_type(spec, paged),
        "INTERPRETED": interpreted,
        "CAUSAL": spec.causal,
        "LEFT": left,
        "RIGHT": right,
        "CAPPED": spec.logits_soft_cap is not None,
        "ALIBI": spec.alibi,
        "BLOCK_D": padded(spec.head_size),
        "BLOCK_DV": padded(spec.value_head_size),
    }


def pass_constants(spec: AttentionSpec, tiles: Tiles) -> dict[str, int]:
    """Return the compile-time arguments that tiles decide."""
    return {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys, "STAGES": tiles.stages}


def tile_sizes(spec: AttentionSpec, paged: bool) -> tuple[int, int, int, bool]:
    """Return what tiles depend on: D, Dv, bytes of an operand, and whether the cache's elements are widened."""
    compute_bytes = 4 if compute_type(spec, paged) == "float32" else 2
    return spec.head_size, spec.value_head_size, compute_bytes, paged and is_quantised(spec.kv_cache_dtype)
