"""Threads: how many, callers at once, children of a fork, and no spinning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.adapters.environment import num_threads
from attn_dispatch_cpu import planning
from attn_dispatch_cpu.threads import POOL


def problem(seed: int = 0, context: int = 500) -> tuple[Any, Any, Any, Any]:
    """A layer, a plan, a filled cache and a query."""
    rng = np.random.default_rng(seed)
    spec = ad.AttentionSpec(num_heads=8, num_kv_heads=4, head_size=64)
    attn = ad.attention(spec, backend="cpu/numba")
    blocks = -(-context // 32)
    cache = attn.allocate(2 * blocks)
    for array in (cache.key, cache.value):
        array[...] = rng.standard_normal(array.shape).astype(ml_dtypes.bfloat16)
    tables = rng.permutation(2 * blocks).reshape(2, blocks).astype(np.int32)
    plan = attn.plan(ad.AttentionMetadata.build([1, 1], [context, context], tables, slot_mapping=[-1, -1]))
    q = rng.standard_normal((2, 8, 64)).astype(ml_dtypes.bfloat16)
    return attn, plan, cache, q


def test_the_setting_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "3")
    assert num_threads() == 3
    monkeypatch.delenv("ATTN_DISPATCH_NUM_THREADS")
    assert 1 <= num_threads() <= len(os.sched_getaffinity(0))


def test_an_absurd_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "3000")
    before = threading.active_count()
    with pytest.raises(ad.errors.EnvironmentVariableError, match="NUM_THREADS='3000'"):
        problem()
    assert threading.active_count() == before


def test_affinity_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTN_DISPATCH_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert num_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_every_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 2, 3, 8, 16):
        monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", str(threads))
        attn, plan, cache, q = problem()
        results.append(attn.run(plan, q, cache=cache, k=q[:, :4] * 0, v=q[:, :4] * 0).astype(np.float32))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=2e-3)


def test_a_thread_is_woken_for_what_takes_longer_than_waking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WORTH_WAKING", 1 << 18)
    spec = ad.AttentionSpec(num_heads=8, num_kv_heads=4, head_size=64)
    for context, threads in ((32, 1), (256, 1), (512, 2), (1024, 4), (32768, 8)):
        # Keys and values of two sequences: 2 x 4 heads x (64 + 64) elements per token.
        batch = ad.AttentionMetadata.build([1, 1], [context] * 2, [range(context // 32)] * 2, slot_mapping=[-1, -1])
        (work,) = planning.cut(spec, batch.view("decoder"), 8, in_blocks=True)
        assert work.threads == threads
        assert threads > 1 or len(work.items) == 2  # nor is it cut into pieces


def test_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "3")
    problems = [problem(seed) for seed in range(4)]
    expected = [attn.run(plan, q, cache=cache, k=q[:, :4], v=q[:, :4]) for attn, plan, cache, q in problems]
    wrong: list[int] = []

    def call(i: int) -> None:
        attn, plan, cache, q = problems[i]
        for _ in range(60):
            got = attn.run(plan, q, cache=cache, k=q[:, :4], v=q[:, :4])
            if not np.array_equal(got.view(np.uint16), expected[i].view(np.uint16)):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not run: this system has no fork")
def test_a_child_of_a_fork_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "3")
    attn, plan, cache, q = problem()
    expected = attn.run(plan, q, cache=cache, k=q[:, :4], v=q[:, :4])
    child = os.fork()
    if child == 0:
        try:
            got = attn.run(plan, q, cache=cache, k=q[:, :4], v=q[:, :4])
            os._exit(0 if np.array_equal(got.view(np.uint16), expected.view(np.uint16)) else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 60
    done, status = 0, 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 0


FORK_WHILE_COMPILING = """
import os, sys, threading, time
import numpy as np, attn_dispatch as ad
spec = ad.AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, dtype="float32", block_size=8)
attn = ad.attention(spec, backend="cpu/numba")
cache = attn.allocate(2)
one = np.ones((1, 2, 16), np.float32)
def compute():
    plan = attn.plan(ad.AttentionMetadata.build([1], [1], [[1]], 8))
    return attn.run(plan, one, one[:, :1], 3 * one[:, :1], cache).sum()
compiling = threading.Thread(target=compute)
compiling.start()
while "numba.core.compiler" not in sys.modules:
    time.sleep(0.01)
time.sleep(0.5)
assert compiling.is_alive()
child = os.fork()
if child == 0:
    os._exit(0 if compute() == 96 else 1)
compiling.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not run: this system has no fork")
def test_a_fork_while_another_thread_compiles(tmp_path: Path) -> None:
    environment = os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(tmp_path), "ATTN_DISPATCH_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", FORK_WHILE_COMPILING], env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the child of a fork hangs")
    assert out == b"0\n"


class Interrupted(BaseException):
    """What the handler of a signal raises, as Ctrl-C would."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="not run: this system has no timer signals")
def test_interrupted_calls_leave_nobody_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 calls interrupted at random: none returns while a thread still writes, and no thread is lost."""
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "6")
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=1, head_size=64)
    attn = ad.attention(spec, backend="cpu/numba")
    plan = attn.plan(ad.AttentionMetadata.build([96], [1536], [range(48)]))  # six items, a millisecond each
    cache = attn.allocate(48)
    q = np.ones((96, 4, 64), ml_dtypes.bfloat16)
    attn.run(plan, q, q[:, :1], q[:, :1], cache)
    start = time.perf_counter()
    attn.run(plan, q, q[:, :1], q[:, :1], cache)
    usual = time.perf_counter() - start

    def interrupt(*_: object) -> None:
        raise Interrupted

    rng = np.random.default_rng(0)
    outs = [np.full_like(q, 7) for _ in range(4)]
    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(500):
            out = outs[i % 4]
            assert (out == 7).all(), "a thread wrote into the output of a call that was over"
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 1.2 * usual))
                attn.run(plan, q, q[:, :1], q[:, :1], cache, out)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
            out[...] = 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    time.sleep(0.05)
    assert all((out == 7).all() for out in outs)
    assert interrupted > 100
    helped = set()

    def kernel(arguments: int, call: int, worker: int) -> None:
        helped.add(worker)
        time.sleep(0.2)

    POOL.run(kernel, 0, 0, 6, None)
    assert helped == set(range(6))


def test_idle_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "4")
    attn, plan, cache, q = problem()
    attn.run(plan, q, cache=cache, k=q[:, :4], v=q[:, :4])
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
