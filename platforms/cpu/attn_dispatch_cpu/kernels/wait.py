"""Waiting a short while for another thread's sign, without the GIL and without the operating system."""

from __future__ import annotations

from typing import Any

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.memory import peek, read_i64


def make_wait_kernel() -> Any:
    """Build the kernel `(record, call, worker)`: it returns when the counter moved, or after so many looks."""

    def wait(record: int, call: int, worker: int) -> None:
        seen = read_i64(record + 8 * A.WAIT_SEEN)
        looks = read_i64(record + 8 * A.WAIT_LOOKS)
        while looks > 0 and peek(record + 8 * A.WAIT_SIGN) == seen:
            looks -= 1

    return wait


__all__ = ["make_wait_kernel"]
