"""What a process may do: fork, run for long with many layers, be given few CPUs, run on another system."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch import AttentionMetadata
from attn_dispatch.dispatch import registry

NAME = "openvino/paged"

FORKS = """
import os, sys, threading, time
import numpy as np
import attn_dispatch as ad

attn = ad.attention(ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=64, dtype="float32"), "openvino/paged")
batch = ad.AttentionMetadata.build([1000], [1000], [list(range(32))])
rng = np.random.default_rng(0)
rows = [rng.standard_normal((1000, heads, 64)).astype(np.float32) for heads in (8, 2, 2)]
plan, cache = attn.plan(batch), attn.allocate(32)
expected = attn.run(plan, *rows, cache)
busy, stop = [0, 0], threading.Event()

def work(i):
    own = attn.allocate(32)
    while not stop.is_set():
        attn.run(plan, *rows, own)
        busy[i] += 1

threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for thread in threads:
    thread.start()
while not all(busy):
    time.sleep(0.01)
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        os._exit(0 if all(np.allclose(attn.run(plan, *rows, c), expected) for c in (cache, attn.allocate(32))) else 3)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        status = "hangs"
    if status:
        stop.set()
        sys.exit(f"child: {status}")
before = list(busy)
time.sleep(0.5)
stop.set()
for thread in threads:
    thread.join()
assert all(now > then for now, then in zip(busy, before)), "the parent's threads go on"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_is_forked_while_others_compute() -> None:
    """Its parent's threads were in the middle of a call: without them, the child's own call would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, "20"], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"ATTN_DISPATCH_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def decode(attn: Any, cache: Any, arrays: Any) -> Any:
    plan = attn.plan(AttentionMetadata.build([1], [1], [[0]]))
    return plan, attn.run(plan, *arrays, cache)


def test_many_layers_on_one_cache_share_a_request(layer: Callable[..., Any]) -> None:
    """Layers come and go (an engine may make them anew for each step): what the cache keeps does not grow."""
    exact = {}
    cache, arrays = None, None
    for i in range(30):
        it = layer(scale=0.1 + i % 3)
        attn = it.on()
        cache, arrays = cache or attn.allocate(1), arrays or it.arrays(1)
        _, out = decode(attn, cache, arrays)
        if i % 3 not in exact:
            exact[i % 3] = decode(it.on("reference"), it.on("reference").allocate(1), arrays)[1]
        np.testing.assert_allclose(out, exact[i % 3], atol=1e-5)
    assert cache.backend_state[NAME].request.cache_info().currsize == 1


def test_layers_with_slopes_of_their_own_on_one_cache(layer: Callable[..., Any]) -> None:
    """They share a request: each computes with its own numbers, in any order."""
    slopes = [np.linspace(0.1, 0.9, 4, dtype=np.float32), np.linspace(2, 1, 4, dtype=np.float32)]
    makers = [layer({"alibi_slopes": s}, alibi=True) for s in slopes]
    layers = [(it.on(), it.on("reference")) for it in makers]
    q, k, v = makers[0].arrays(40)
    plan, cache = layers[0][0].plan(AttentionMetadata.build([40], [40], [[1, 0]])), layers[0][0].allocate(2)
    for i in (0, 1, 0, 0, 1, 1, 0):
        attn, reference = layers[i]
        batch = AttentionMetadata.build([40], [40], [[1, 0]])
        expected = reference.run(reference.plan(batch), q, k, v, reference.allocate(2))
        np.testing.assert_allclose(attn.run(plan, q, k, v, cache), expected, atol=1e-5)


def test_compiled_programs_are_bounded(layer: Callable[..., Any]) -> None:
    """2 MB each: a process that has met many kinds of layers keeps those that it used last."""
    from attn_dispatch_openvino.program import MOST_PROGRAMS

    programs = []
    for heads in range(1, MOST_PROGRAMS + 9):
        it = layer(num_heads=heads, num_kv_heads=1, head_size=8)
        plan, _ = decode(it.on(), it.on().allocate(1), it.arrays(1))
        programs.append(weakref.ref(plan.program))
    del plan
    gc.collect()
    alive = sum(program() is not None for program in programs)
    # A step's tensors and a cache's requests may keep a few more for a while.
    assert alive <= MOST_PROGRAMS + 4


def test_threads_are_those_that_the_process_was_given(
    layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with a quota of one CPU on a machine of 64: OpenVINO by itself would take all of them."""
    facts = dict(ad.platform.facts) | {"cpu_quota": 1.0}
    monkeypatch.setattr("attn_dispatch.platform", SimpleNamespace(facts=facts))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("ATTN_DISPATCH_NUM_THREADS", raising=False)
    it = layer()
    plan, _ = decode(it.on(), it.on().allocate(1), it.arrays(1))
    assert plan.program.key.target.threads == plan.program.property("INFERENCE_NUM_THREADS") == 1


def test_threads_where_there_is_no_affinity(layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS have no `os.sched_getaffinity`."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr("attn_dispatch.platform", SimpleNamespace(facts=dict(ad.platform.facts) | {"cpu_quota": None}))
    monkeypatch.delenv("ATTN_DISPATCH_NUM_THREADS", raising=False)
    it = layer()
    plan, _ = decode(it.on(), it.on().allocate(1), it.arrays(1))
    assert plan.program.key.target.threads == 3


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"system": "darwin", "machine": "arm64", "cpu_flags": ()}, "x86-64 alone, this machine is arm64"),
        ({"system": "win32", "machine": "AMD64", "cpu_flags": ()}, "win32 does not list"),
        ({"system": "darwin", "machine": "x86_64", "cpu_flags": ()}, "darwin does not list"),
        ({"system": "linux", "machine": "x86_64", "cpu_flags": ("sse4_2",)}, "AVX2, which this processor lacks"),
        ({"system": "linux", "machine": "aarch64", "cpu_flags": ("asimd",)}, "this machine is aarch64"),
    ],
    ids=lambda value: "-".join((value["system"], value["machine"])) if isinstance(value, dict) else "",
)
def test_other_systems_are_told_what_is_missing(
    facts: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac "needs AVX2" would be nonsense; on Windows nobody knows whether the processor has it."""
    backend = registry().load(NAME)
    monkeypatch.setattr("attn_dispatch.platform", SimpleNamespace(facts=facts))
    availability = backend.probe()
    assert not availability
    assert words in availability.reason
