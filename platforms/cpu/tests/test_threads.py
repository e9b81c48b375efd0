"""Threads: how many, callers at once, children of a fork, and no spinning."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch_cpu import planning
from attn_dispatch_cpu.threads import num_threads


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
        assert threads > 1 or len(work.tiles) == 2  # nor is it cut into pieces


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


def test_idle_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "4")
    attn, plan, cache, q = problem()
    attn.run(plan, q, cache=cache, k=q[:, :4], v=q[:, :4])
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
