"""The threads that kernels run on: a few that sleep, woken per call.

Kernels hand out their own work by a counter, so that a call needs no threads at all to be complete: the caller begins
at once, and whoever wakes up in time takes what is left. A thread that comes late finds the call closed and goes back
to sleep; nobody waits for it. Who is inside is counted by the kernels themselves (`kernels.calls`), so that no signal
can make a caller return while another thread writes. OpenMP's and torch's pools are left alone.

Waking a thread takes 30 to 50 us, about what a small decode step takes in all. So where one call follows at once on
another, a worker looks out for the next for a moment before it sleeps; with other work between calls it never does.
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.machine_code import Kernel, kernel

SOON_SECONDS = 1e-4  # after a worker's last call, waking up included: the next one then came at once
LOOK_SECONDS = 6e-5


class Call(NamedTuple):
    """One kernel over its arguments, as it is handed to a worker.

    Attributes:
        kernel: the compiled kernel.
        arguments, call: the addresses that it takes.
        owner: what keeps the memory at these addresses alive as long as a thread may look at it.
    """

    kernel: Kernel
    arguments: int
    call: int
    owner: object


class Worker:
    """A thread that helps with calls: its queue, and a counter beside it that can be seen without waking up."""

    def __init__(self, number: int) -> None:
        self.calls: SimpleQueue[Call] = SimpleQueue()
        self.record = np.zeros(A.WAIT_WORDS, np.int64)
        self._number = number
        threading.Thread(target=self._work, name=f"attn-dispatch-{number}", daemon=True).start()

    def put(self, call: Call) -> None:
        """Hand over a call."""
        self.calls.put(call)
        self.record[A.WAIT_SIGN] += 1

    def _work(self) -> None:
        """Help with one call after the other; asleep between two, unless the last one came at once after another."""
        look = kernel("wait")
        record, number = self.record, self._number
        at = record.__array_interface__["data"][0]
        record[A.WAIT_LOOKS] = 1000
        start = time.perf_counter()
        look(at, 0, number)  # for nothing, to see how long a look takes
        looks = int(1000 * LOOK_SECONDS / max(time.perf_counter() - start, 1e-6))
        record[A.WAIT_LOOKS] = looks
        soon = False
        while True:
            if soon:
                record[A.WAIT_SEEN] = record[A.WAIT_SIGN]
                if self.calls.empty():
                    look(at, 0, number)
            call = self.calls.get()
            soon = time.perf_counter() - start < SOON_SECONDS
            call.kernel(call.arguments, call.call, number)
            start = time.perf_counter()
            del call  # what a call refers to does not live on while this thread sleeps


class Pool:
    """Worker threads, started when first needed and shared by all callers.

    Nothing here needs to be put right after an exception at any point: a call that its caller never begins is left by
    the workers unopened, and two callers at once share the workers, each finishing its own call in any case.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin without threads: a child of a fork has none of its parent's."""
        self._workers: list[Worker] = []
        self._starting = threading.Lock()

    def run(self, kernel: Kernel, arguments: int, call: int, threads: int, owner: object) -> None:
        """Run a kernel on up to `threads` threads, this one included (see `Call` for the others)."""
        if threads > 1:
            if len(self._workers) < threads - 1:
                with self._starting:
                    while len(self._workers) < threads - 1:
                        self._workers.append(Worker(len(self._workers) + 1))
            handed = Call(kernel, arguments, call, owner)
            for worker in self._workers[: threads - 1]:
                worker.put(handed)
        kernel(arguments, call, 0)


POOL = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.forget)

__all__ = ["POOL", "Call", "Pool"]
