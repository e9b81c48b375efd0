"""Which instructions the kernels use."""

from __future__ import annotations

import os

from attn_dispatch_cpu.kernels.isa import host_isa

BF16_DOT_VARIABLE = "ATTN_DISPATCH_CPU_BF16_DOT"


def path_of(kernel: str, dtype: str, stored: str) -> str:
    """Return the code path of a kernel for queries and a cache of these types."""
    if dtype == stored == "bfloat16" and host_isa().bf16_dot and os.environ.get(BF16_DOT_VARIABLE) != "0":
        return "bf16-dot"
    return "fma"
