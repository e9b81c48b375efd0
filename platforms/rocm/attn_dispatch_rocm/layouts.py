"""The cache shape of vLLM's first paged kernels, which AITER's older decode kernels and engines still hold.

Keys [N, K, D/x, B, x], values [N, K, D, B], where x elements are 16 bytes: a key's group of x lies together, so that a
thread loads it at once, and a value's tokens do. Conversions are `cache.to_layout("vLLM x8")` and back: always copies,
bit for bit. The head size must be a multiple of x.
"""

from __future__ import annotations

from attn_dispatch.contract import CacheLayout
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.contract.layout import register_layout
from attn_dispatch.errors import CacheError

__all__ = ["VLLM_X4", "VLLM_X8", "VLLM_X16", "vllm_layout"]

_LOAD_BYTES = 16


def _split(x: int) -> CacheLayout:
    return register_layout(CacheLayout(f"vLLM x{x}", (("key", f"N K D/{x} B D%{x}"), ("value", "N K D B"))))


VLLM_X4 = _split(4)
"""Of float32 caches."""

VLLM_X8 = _split(8)
"""Of float16 and bfloat16 caches."""

VLLM_X16 = _split(16)
"""Of caches of one byte (fp8, int8)."""

_BY_BYTES = {4: VLLM_X4, 2: VLLM_X8, 1: VLLM_X16}


def vllm_layout(dtype: str) -> CacheLayout:
    """Return the layout of a cache that stores `dtype` (a canonical name).

    Raises:
        CacheError: elements of that type do not fill 16 bytes in a number that vLLM used.
    """
    size = numpy_dtype(dtype).itemsize
    if dtype in ("uint4", "float64") or size not in _BY_BYTES:
        raise CacheError(f"vLLM's layout of {dtype}: it holds elements of 1, 2 or 4 bytes in groups of {_LOAD_BYTES}")
    return _BY_BYTES[size]
