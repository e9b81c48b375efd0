"""Who may be inside a call: how the caller of a kernel and the threads that help it begin and end.

A call is open from the first instruction of the caller's kernel to the last, all of it machine code: an exception that
a signal raises in the caller (Ctrl-C) comes before, when nobody has begun, or after, when nobody is inside any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import int32, njit
from numba.core import cgutils
from numba.extending import intrinsic

from attn_dispatch_cpu.kernels.memory import add_atomic, peek
from attn_dispatch_cpu.kernels.vector import I32

STATE = 8  # of the call's pair of words: how many threads are inside, and
OPEN = 1 << 32  # the caller has begun,
CLOSED = 1 << 33  # the caller has found no work left
EARLY_LOOKS = 1 << 14  # a thread may come before the caller, which takes a microsecond, or never begins
LATE_LOOKS = 1 << 12  # the caller looks as often whether the others are out; then it lets other threads run in between


@intrinsic  # type: ignore[untyped-decorator]
def yield_processor(typing_context: Any) -> Any:
    """Let another thread have this CPU."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), name)
        return builder.call(function, [])

    return int32(), codegen


@njit  # type: ignore[untyped-decorator]
def enter(call: int, worker: int) -> bool:
    """Say whether this thread may work on the call; if so, `leave` must follow."""
    if worker == 0:
        add_atomic(call + STATE, OPEN)
        return True
    looks = 0
    while looks < EARLY_LOOKS and peek(call + STATE) & OPEN == 0:
        looks += 1
    before = add_atomic(call + STATE, 1)
    if before & OPEN != 0 and before & CLOSED == 0:
        return True
    add_atomic(call + STATE, -1)
    return False


@njit  # type: ignore[untyped-decorator]
def leave(call: int, worker: int) -> None:
    """End this thread's part: the caller lets nobody else in and waits for those who are."""
    if worker != 0:
        add_atomic(call + STATE, -1)
        return
    add_atomic(call + STATE, CLOSED)
    looks = 0
    while peek(call + STATE) & (OPEN - 1) != 0:
        looks += 1
        if looks > LATE_LOOKS:
            yield_processor()


def guarded(kernel: Callable[[int, int, int], None]) -> Callable[[int, int, int], None]:
    """Return a kernel that enters the call first and leaves it last."""
    body = njit(nogil=True, error_model="numpy", boundscheck=False, inline="never")(kernel)

    def call_kernel(args: int, call: int, worker: int) -> None:
        if enter(call, worker):
            body(args, call, worker)
            leave(call, worker)

    return call_kernel


__all__ = ["enter", "guarded", "leave"]
