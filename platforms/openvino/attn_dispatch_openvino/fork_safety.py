"""Locks that `os.fork` waits for.

A child has none of its parent's threads. If one of OpenVINO's was computing, or held a lock of its thread pool, the
child's own first call would wait for it for ever. So forking waits until nobody computes, and until the pool's threads
have gone to sleep; a child that is forked then computes as its parent does.
"""

from __future__ import annotations

import os
import threading
import time
import weakref

__all__ = ["fork_safe_lock"]

_SETTLE_SECONDS = 0.05  # a thread of the pool looks for more work for about a millisecond, then sleeps

_registry = threading.RLock()
_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_held: list[threading.RLock] = []  # by a thread that forks


def fork_safe_lock() -> threading.RLock:
    """Return a new lock to be held while OpenVINO computes; in a forked child it is free.

    Whoever holds one must not ask for another to be made.
    """
    lock = threading.RLock()
    with _registry:
        _locks.add(lock)
    return lock


def _take_all() -> None:
    _registry.acquire()
    _held[:] = [*_locks, _registry]
    for lock in _held[:-1]:
        lock.acquire()
    time.sleep(_SETTLE_SECONDS)


def _free_all() -> None:
    # None are held when this module was imported while another thread was forking (OpenVINO's telemetry does).
    locks = _held[:]
    _held.clear()
    for lock in locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_all, after_in_parent=_free_all, after_in_child=_free_all)
