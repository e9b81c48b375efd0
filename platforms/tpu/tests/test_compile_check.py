"""The compile check on one row: it passes, writes its table, and fails when a kernel is broken on purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROW = ["--generations", "v5e", "--only", "head sizes 64/128"]

# The kernel is given heads that it was not padded for: Mosaic must not take them.
WRONG_SHAPE = """
real = ragged.ragged_paged_attention
def broken(q, pages, *more, **named):
    return real(q[..., :64], pages[..., :64], *more, **named)
ragged.ragged_paged_attention = broken
"""
# The pages are touched after the update: they can no longer be the caller's memory.
COPIED_CACHE = """
import jax.numpy as jnp
real = programs._attend
def broken(pages, *more):
    out, pages = real(pages, *more)
    return out, jnp.concatenate([pages, pages])
programs._attend = broken
"""


def run(breakage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\n"
        "from platforms.tpu.evidence import compile_check, compiling\n"
        "compiling.prepare()\n"
        "from attn_dispatch_tpu import programs, ragged\n"
        f"{breakage}\n"
        f"sys.exit(compile_check.main({[*ROW, *arguments]!r}))\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_it_compiles_and_writes_its_table(tmp_path: Path) -> None:
    done = run("", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    table = (tmp_path / "tpu-compile.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| head sizes 64/128 |")]
    code, *_ = row.split("|")[2].split("/")
    assert int(code) > 0
    assert "libtpu" in table
    assert "python -m platforms.tpu.evidence.compile_check" in table  # what makes it


@pytest.mark.parametrize(
    ("breakage", "words"),
    [(WRONG_SHAPE, "the verdict says yes, the compiler no"), (COPIED_CACHE, "it is copied")],
    ids=["a kernel that Mosaic does not take", "a cache that is copied"],
)
def test_it_fails_when_a_kernel_is_broken(breakage: str, words: str) -> None:
    done = run(breakage, "--output", "")
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert words in done.stdout


def test_what_is_not_there_is_not_a_pass() -> None:
    done = run("", "--output", "", "--only", "no such row")
    assert done.returncode == 1
    assert "no row" in done.stdout
