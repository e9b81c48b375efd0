"""Scratch: a kernel stays within the memory that its table of regions says."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.conformance import Case, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry
from attn_dispatch_cpu import numba_call

GUARD = 1 << 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["same", "int8", "float8_e5m2"])
@pytest.mark.parametrize("sizes", [(64, 64), (33, 576), (576, 9)])
def test_kernels_stay_inside(dtype: str, stored: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "1")
    memories = []

    def scratch(launch: numba_call.Launch, size: int) -> int:
        memory = np.full(size + 2 * GUARD + 4096, 0xA5, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % 4096
        memories.append((memory, start, start + size))
        return memory.ctypes.data + start

    monkeypatch.setattr(numba_call.Launch, "_scratch", scratch)
    spec = AttentionSpec(
        num_heads=12,
        num_kv_heads=4,
        head_size=sizes[0],
        value_head_size=sizes[1],
        dtype=dtype,
        kv_cache_dtype=dtype if stored == "same" else stored,
        block_size=136,
        sinks=True,
    )
    case = Case("scratch", "scratch", spec, (300, 150, 0, 40), (1, 2, 70, 33))
    assert run_case(registry().load("cpu/numba"), case, mutations=False).verdict
    assert len(memories) >= 2  # decode and prefill
    for memory, start, end in memories:
        assert (memory[:start] == 0xA5).all()
        assert (memory[end:] == 0xA5).all()
