"""Permission to use AMX: Linux gives a process the tile registers only when it asks.

Asked once, when a step first could use them, in the process that runs: a child of a fork inherits the permission, a
new program asks again. A kernel that does not know the question, a sandbox, and a thread with a signal stack too small
for the tiles' state all answer no; the other code paths are used then.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18


@cache
def permitted() -> bool:
    """Ask for the tile registers; say whether this process may use them."""
    if sys.platform != "linux":
        return False
    try:
        answer: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)
    except (OSError, AttributeError):
        return False
    return answer == 0


__all__ = ["permitted"]
