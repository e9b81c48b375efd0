"""The folder of machine code: used, shared, unwritable, damaged; and what a person is told."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import attn_dispatch_cpu
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
    assert out.startswith("96.0\n['decode', 'write']"), out
    return err


def codes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (size, time) of the kernels kept."""
    kept = list((folder / "cpu-numba").glob("*.o"))
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in kept}


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "cpu-numba"


def test_a_home_folder_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", "~/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "x" / "cpu-numba"


def test_two_processes_at_once_then_one_that_loads(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    said = [finished(process) for process in both]
    assert said == ["", ""]  # stderr is no terminal here
    kept = codes(tmp_path)
    assert len(kept) == 2
    assert stat.S_IMODE((tmp_path / "cpu-numba").stat().st_mode) == 0o700
    assert not list((tmp_path / "cpu-numba").glob("*[!o]"))  # no temporary file is left
    finished(start(tmp_path))
    assert codes(tmp_path) == kept  # nothing was compiled again
    # Damage: half of one file is gone, the other holds something else.
    for path, data in zip(sorted((tmp_path / "cpu-numba").glob("*.o")), (b"", b"\0" * 500), strict=True):
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


WARNING = "RuntimeWarning: cpu/numba runs no machine code from there"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="not run: this system has no owners of files")
def test_what_others_may_write_is_not_run(tmp_path: Path) -> None:
    """Folders and files that others may write, or own, are neither read nor written; one warning says so."""
    finished(start(tmp_path))
    folder = tmp_path / "cpu-numba"
    kept = codes(tmp_path)

    def untouched() -> None:
        errors = finished(start(tmp_path))
        assert errors.count(WARNING) == 1, errors
        assert codes(tmp_path) == kept

    folder.chmod(0o777)
    untouched()
    folder.chmod(0o755)  # others may only read: made ours alone, and used
    assert finished(start(tmp_path)) == ""
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.glob("*.o"):
        path.chmod(0o666)
    errors = finished(start(tmp_path))
    assert errors.count(WARNING) == 2, errors  # one for each file, which is then written anew
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.glob("*.o"))
    kept = codes(tmp_path)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        untouched()


def test_no_file_is_unpickled(tmp_path: Path) -> None:
    """A payload that would run while it is unpickled does not, whatever its digest says."""
    finished(start(tmp_path))
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    for path in (tmp_path / "cpu-numba").glob("*.o"):
        path.write_bytes(hashlib.sha256(payload).digest() + payload)
    process = start(tmp_path)
    process.communicate(timeout=120)
    assert not (tmp_path / "ran").exists()
    source = Path(attn_dispatch_cpu.__file__).parent
    assert not [path for path in source.rglob("*.py") if "pickle" in path.read_text()]


class Payload:
    """What an attacker would put into a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_process_that_loads_needs_no_numba(tmp_path: Path) -> None:
    finished(start(tmp_path))
    environment = os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(tmp_path), "ATTN_DISPATCH_NUM_THREADS": "1"}
    program = PROGRAM + "\nimport sys; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
