"""Waiting a short while for another thread's sign, without the GIL and without the operating system."""

from __future__ import annotations

from typing import Any

from attn_dispatch_cpu.kernels.memory import peek, read_i64

SIGN = 0  # the words of the record: a counter that another thread raises,
SEEN = 1  # what it was,
TRIES = 2  # and how often to look
WORDS = 3


def make_wait_kernel() -> Any:
    """Build the kernel, as a plain function `(record, worker)`: it returns when the counter moved, or after `TRIES`."""

    def wait(record: int, worker: int) -> None:
        seen = read_i64(record + 8 * SEEN)
        tries = read_i64(record + 8 * TRIES)
        while tries > 0 and peek(record + 8 * SIGN) == seen:
            tries -= 1

    return wait


__all__ = ["SEEN", "SIGN", "TRIES", "WORDS", "make_wait_kernel"]
