"""The folder of machine code: used, shared, unwritable, damaged; and what a person is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attn_dispatch_cpu.machine_code import cache_folder

PROGRAM = """
import numpy as np, attn_dispatch as ad
spec = ad.AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, dtype="float32", block_size=8)
attn = ad.attention(spec, backend="cpu/numba")
cache = attn.allocate(2)
plan = attn.plan(ad.AttentionMetadata.build([1], [1], [[1]], 8))
one = np.ones((1, 2, 16), np.float32)
print(attn.run(plan, one, one[:, :1], 3 * one[:, :1], cache).sum())
from attn_dispatch_cpu import machine_code
print(sorted(k[0] for k in machine_code._compiled))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a process that computes with one folder."""
    environment = os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(folder), "ATTN_DISPATCH_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    """Return what it said on stderr; it must have computed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("96.0\n['narrow', 'write']"), out
    return err


def codes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (size, time) of the kernels kept."""
    kept = list((folder / "cpu-numba").glob("*.code"))
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in kept}


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "cpu-numba"


def test_two_processes_at_once_then_one_that_loads(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    said = [finished(process) for process in both]
    assert said == ["", ""]  # stderr is no terminal here
    kept = codes(tmp_path)
    assert len(kept) == 2
    assert not list((tmp_path / "cpu-numba").glob("*[!e]"))  # no temporary file is left
    finished(start(tmp_path))
    assert codes(tmp_path) == kept  # nothing was compiled again
    # Damage: half of one file is gone, the other holds something else.
    for path, data in zip(sorted((tmp_path / "cpu-numba").glob("*.code")), (b"", b"\0" * 500), strict=True):
        path.write_bytes(data or path.read_bytes()[:1000])
    finished(start(tmp_path))
    assert {name: size for name, (size, _) in codes(tmp_path).items()}.keys() == kept.keys()
    assert all(size > 1000 for size, _ in codes(tmp_path).values())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    finished(start(blocked))
    assert blocked.read_text() == "not a folder"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="not run: this system has no pseudo-terminals")
def test_a_person_is_told(tmp_path: Path) -> None:
    reader, writer = os.openpty()
    environment = os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(tmp_path), "ATTN_DISPATCH_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    process.communicate(timeout=120)
    text = os.read(reader, 4096).decode()
    os.close(reader)
    assert "compiling cpu/numba write" in text
    assert f"kept in {tmp_path / 'cpu-numba'}" in text.replace("\r\n", "\n").replace("\n", " ").replace("  ", " ")
