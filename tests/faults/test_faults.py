"""What happens to processes: interrupts, forks under load, kills, full disks. Nothing is lost, nothing is wrong after.

For every backend that computes on this machine's CPU through its real runtime.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attn_dispatch as ad

SPEC = "ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype='float32', block_size=32)"
BACKENDS = [name for name, state in ad.backends().items() if state and not name.startswith(("tpu", "template"))]

HEAD = f"""
import os, random, signal, sys, threading, time
import numpy as np
import attn_dispatch as ad

attn = ad.attention({SPEC}, sys.argv[1])
library = attn.backend.capabilities.libraries[0]
if library == "torch":
    import torch
rng = np.random.default_rng(0)

def own(x):
    return torch.from_numpy(x) if library == "torch" else x

new, lens, tables = [70, 1, 3], [70, 200, 90], [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]
batch = ad.AttentionMetadata.build(new, lens, tables, 32)
rows = [own(rng.standard_normal((74, heads, 64)).astype(np.float32)) for heads in (4, 2, 2)]
plan, cache = attn.plan(batch), attn.allocate(13)
expected = np.asarray(attn.run(plan, *rows, cache)).copy()

def right(cache):
    return np.allclose(np.asarray(attn.run(plan, *rows, cache)), expected, rtol=1e-5, atol=1e-6)

assert right(cache)
"""

INTERRUPTS = (
    HEAD
    + """
class Interrupted(Exception):
    pass

def interrupt(*_):
    raise Interrupted

begin = time.perf_counter()
for _ in range(10):
    attn.run(plan, *rows, cache)
usual = (time.perf_counter() - begin) / 10
signal.signal(signal.SIGALRM, interrupt)
out, stopped = own(np.zeros_like(expected)), 0
for i in range(500):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1.3 * usual))
        attn.run(plan, *rows, cache, out)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        stopped += 1
        out[...] = 7
        time.sleep(2e-4)
        assert (np.asarray(out) == 7).all(), "somebody wrote into the output of a call that was over"
signal.setitimer(signal.ITIMER_REAL, 0)
assert stopped > 50, stopped
assert right(cache)
fresh = attn.allocate(13)
for name in ("key", "value"):
    fresh.arrays[name][...] = cache.arrays[name]
assert right(fresh)
"""
)

FORKS = (
    HEAD
    + """
stop, wrong = threading.Event(), []

def work():
    mine = attn.allocate(13)
    first = np.asarray(attn.run(plan, *rows, mine)).copy()
    while not stop.is_set():
        if not np.array_equal(np.asarray(attn.run(plan, *rows, mine)), first):
            wrong.append("a result of the parent's thread")
        time.sleep(0)

thread = threading.Thread(target=work)
thread.start()
for _ in range(100):
    child = os.fork()
    if not child:
        os._exit(0 if right(cache) else 3)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            status = "hangs"
            break
        time.sleep(0.001)
    if status:
        wrong.append(f"child: {status}")
        break
stop.set()
thread.join()
assert not wrong, wrong
assert right(cache)
"""
)

FULL_DISK = (
    """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))  # a write beyond it fails, as on a disk that is full
"""
    + HEAD
)


def run(
    script: str, backend: str, folder: Path | None = None, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"ATTN_DISPATCH_NUM_THREADS": "3", "PYTHONDONTWRITEBYTECODE": "1"}
    if folder is not None:
        environ["ATTN_DISPATCH_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-c", script, backend]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)


@pytest.mark.parametrize("backend", BACKENDS)
def test_500_interrupted_calls(backend: str) -> None:
    done = run(INTERRUPTS, backend)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_100_forks_under_load(backend: str) -> None:
    done = run(FORKS, backend)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_disk(backend: str, tmp_path: Path) -> None:
    done = run(FULL_DISK, backend, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_size <= 2048 for path in tmp_path.rglob("*") if path.is_file())
    again = run(HEAD, backend, tmp_path)  # what was half written is not taken for whole
    assert again.returncode == 0, again.stderr[-2000:]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu/numba"])
def test_killed_while_writing_machine_code(backend: str, tmp_path: Path) -> None:
    """Killed at its first file, its second, its third: whoever comes next starts from whatever lies there."""
    for files in (1, 2, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD, backend],
            env=os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(tmp_path), "ATTN_DISPATCH_NUM_THREADS": "2"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and sum(path.is_file() for path in tmp_path.rglob("*")) < files:
            pass
        process.kill()
        process.wait()
    done = run(HEAD, backend, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
