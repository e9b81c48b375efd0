"""The threads that kernels run on: a few that sleep, woken per call.

Kernels hand out their own work by a ticket counter, so that a call needs no threads at all to be complete: the caller
begins at once, and whoever wakes up in time takes what is left. A thread that comes late finds the call closed and goes
back to sleep; nobody waits for it. OpenMP's and torch's pools are left alone.

Waking a thread takes 30 to 50 us, about what a small decode step takes in all. So where one call follows at once on
another, a worker looks out for the next for a moment before it sleeps; with other work between calls it never does.
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue

import numpy as np

import attn_dispatch
from attn_dispatch_cpu.kernels import wait
from attn_dispatch_cpu.machine_code import Kernel, kernel

VARIABLE = "ATTN_DISPATCH_NUM_THREADS"
SOON_SECONDS = 1e-4  # after a worker's last call, waking up included: the next one then came at once
LOOK_SECONDS = 6e-5


def num_threads() -> int:
    """Threads to use: the environment's setting, else what the process was given (affinity and quota)."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        allowed = os.cpu_count() or 1
    quota = attn_dispatch.platform.facts.get("cpu_quota")
    return allowed if quota is None else max(1, min(allowed, int(quota)))


class _Call:
    """One kernel over one job, and who is inside."""

    __slots__ = ("closed", "done", "inside", "job", "kernel", "lock")

    def __init__(self, kernel: Kernel, job: int) -> None:
        self.kernel = kernel
        self.job = job
        self.lock = threading.Lock()
        self.inside = 0
        self.closed = False
        self.done: threading.Lock | None = None

    def help(self, worker: int) -> None:
        """Work until nothing is left, unless the call is over."""
        with self.lock:
            if self.closed:
                return
            self.inside += 1
        try:
            self.kernel(self.job, worker)
        finally:
            with self.lock:
                self.inside -= 1
                if self.done is not None and not self.inside:
                    self.done.release()

    def close(self) -> None:
        """Let nobody else in, and wait for those who are."""
        with self.lock:
            self.closed = True
            if not self.inside:
                return
            self.done = threading.Lock()
            self.done.acquire()
        self.done.acquire()


class _Inbox:
    """Where a worker's next call is put, and a sign beside it that can be seen without waking up."""

    __slots__ = ("calls", "given", "record")

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call] = SimpleQueue()
        self.record = np.zeros(wait.WORDS, np.int64)
        self.given = 0

    def put(self, call: _Call) -> None:
        """Hand over a call."""
        self.calls.put(call)
        self.given += 1
        self.record[wait.SIGN] = self.given


class Pool:
    """Worker threads, started when first needed. One caller uses them at a time; others run on their own thread."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._inboxes: list[_Inbox] = []
        self._busy = threading.Lock()

    def run(self, kernel: Kernel, job: int, threads: int) -> None:
        """Run a kernel over a job on up to `threads` threads, this one included."""
        if threads <= 1 or not self._busy.acquire(blocking=False):
            kernel(job, 0)
            return
        try:
            while len(self._inboxes) < threads - 1:
                self._start()
            call = _Call(kernel, job)
            try:
                for inbox in self._inboxes[: threads - 1]:
                    inbox.put(call)
                kernel(job, 0)
            finally:
                call.close()
        finally:
            self._busy.release()

    def _start(self) -> None:
        inbox = _Inbox()
        worker = len(self._inboxes) + 1
        threading.Thread(target=_work, args=(inbox, worker), name=f"attn-dispatch-{worker}", daemon=True).start()
        self._inboxes.append(inbox)


def _work(inbox: _Inbox, worker: int) -> None:
    """Help with one call after the other; asleep between two, unless the last one came at once after its forerunner."""
    look = kernel("wait")
    record = inbox.record
    at = record.__array_interface__["data"][0]
    record[wait.TRIES] = 1000
    start = time.perf_counter()
    look(at, worker)  # in vain, to see how long a try takes
    tries = int(1000 * LOOK_SECONDS / max(time.perf_counter() - start, 1e-6))
    taken = 0
    soon = False
    while True:
        if soon:
            record[wait.SEEN], record[wait.TRIES] = taken, tries
            look(at, worker)
        call = inbox.calls.get()
        taken += 1
        soon = time.perf_counter() - start < SOON_SECONDS
        call.help(worker)
        start = time.perf_counter()
        del call  # what a call refers to does not live on while this thread sleeps


POOL = Pool()
if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads: it begins anew.
    os.register_at_fork(after_in_child=POOL._begin)

__all__ = ["POOL", "Pool", "num_threads"]
