"""What the op computes correctly, as refusals of what it does not: no vendor import.

Each refusal was measured. Most stand for a result that would be wrong without an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import attn_dispatch
from attn_dispatch import AttentionSpec, Refusal

from .releases import Release

__all__ = ["CPU_BLOCK", "GPU_BLOCK", "NOTES", "cpu_flags", "refusals"]

CPU_BLOCK, GPU_BLOCK = 32, 16

CACHES = {
    "float32": ("float32", "float16", "uint8", "uint4"),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "uint8", "uint4"),
}
"""Cache types by compute type."""

NOTES = {
    "uint8": "8-bit cache, a scale per token and head: results are off by about 1 % (root mean square)",
    "uint4": "4-bit cache, a scale per token and head: results are off by about 15 % (root mean square)",
}
"""What a user should know of a yes, by cache type: measured on numbers of unit variance (tests/test_cache_types.py)."""

_GPU_CACHES = {"float32": ("float16",), "float16": ("float16",)}

_MIN_HEAD, _MAX_HEAD = 8, 512
_PACKED_RATIO = 4  # found with a checking malloc: in float32, beyond D = 4 Dv it writes past the end of a buffer
_OTHER = "Use another backend"
_NEWER = "Install OpenVINO 2026.3 or newer"
_NEWER_THAN_2025 = "Install OpenVINO 2026.0 or newer"


def cpu_flags() -> frozenset[str]:
    """Return what the processor says it can do, as the core found it."""
    return frozenset(attn_dispatch.platform.facts.get("cpu_flags", ()))


def refusals(spec: AttentionSpec, release: Release, device: str) -> Iterator[Refusal]:
    """Yield every reason why a spec cannot be run."""
    yield from _types(spec, release, device)
    block = CPU_BLOCK if device == "CPU" else GPU_BLOCK
    if spec.block_size != block:
        yield Refusal("block_size", spec.block_size, f"needs {block}", f"Ask for block_size={block}")
    if spec.logits_soft_cap is not None:
        yield Refusal("logits_soft_cap", spec.logits_soft_cap, "the op has no soft-cap", _OTHER)
    if spec.returns_lse:
        yield Refusal("returns_lse", True, "the op keeps its log-sum-exp to itself", _OTHER)
    yield from _masks(spec, release)
    if spec.sinks and not release.sinks:
        yield Refusal("sinks", True, "this release ignores sinks", _NEWER_THAN_2025)


def _types(spec: AttentionSpec, release: Release, device: str) -> Iterator[Refusal]:
    by_dtype = CACHES if device == "CPU" else _GPU_CACHES
    caches = by_dtype.get(spec.dtype)
    if caches is None:
        yield Refusal("dtype", spec.dtype, f"needs {', '.join(by_dtype)}", _OTHER)
        return
    if spec.kv_cache_dtype not in caches:
        accepts = f"with dtype={spec.dtype} it stores {', '.join(caches)}"
        yield Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {caches[0]}")
    elif spec.kv_cache_dtype.startswith("uint"):
        if not release.reads_only:
            accepts = "this release cannot leave a cache as it is, and rewriting would round again"
            yield Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, _NEWER)
    elif spec.kv_cache_dtype == "float16" and not release.float16_exact:
        yield Refusal("kv_cache_dtype", "float16", "this release does not round to nearest", _NEWER)
    if spec.dtype == "bfloat16" and device == "CPU" and not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        # OpenVINO lists BF16 among its capabilities there too, and then crashes.
        accepts = "this processor has neither avx512_bf16 nor amx_bf16"
        yield Refusal("dtype", "bfloat16", accepts, "Ask for float32")
    if spec.kv_cache_dtype.startswith("uint") and spec.head_size > _PACKED_RATIO * spec.value_head_size:
        least = -(-spec.head_size // _PACKED_RATIO)
        accepts = f"a {spec.kv_cache_dtype} cache with head_size={spec.head_size} needs {least}: the op corrupts memory"
        yield Refusal("value_head_size", spec.value_head_size, accepts, f"Ask for kv_cache_dtype={spec.dtype}")
    odd = spec.dtype == "bfloat16" or spec.kv_cache_dtype == "uint4"
    for field, size in (("head_size", spec.head_size), ("value_head_size", spec.value_head_size)):
        if not _MIN_HEAD <= size <= _MAX_HEAD:
            yield Refusal(field, size, f"{_MIN_HEAD} to {_MAX_HEAD} were measured", _OTHER)
        elif odd and size % 2:
            what = "bfloat16" if spec.dtype == "bfloat16" else "a uint4 cache"
            yield Refusal(field, size, f"odd sizes give NaN in {what}", "Ask for float32")


def _masks(spec: AttentionSpec, release: Release) -> Iterator[Refusal]:
    if spec.has_window and not release.window:
        yield Refusal("window", spec.window, "this release's window is one token off", _NEWER_THAN_2025)
    if spec.has_window and spec.alibi:
        yield Refusal("window", spec.window, "with a window the op drops ALiBi", _OTHER)
    if not spec.causal and spec.has_window:
        yield Refusal("window", spec.window, "windows are for causal layers: the op would ignore it", _OTHER)
    if not (spec.causal or spec.sees_every_key or release.token_types):
        yield Refusal("causal", False, "this release ignores token types, which make tokens see ahead", _NEWER)
    if not spec.causal and spec.alibi:
        accepts = "the op's bias has a sign: tokens ahead would be favoured"
        yield Refusal("alibi", True, accepts, "Ask for causal=True, or another backend")
