"""The compile check on one row: it passes, writes its table, and fails when a kernel is broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attn_dispatch_triton
from platforms.triton.evidence import compile_check

DECODE, PREFILL = "decode, D 128 bf16 B 16", "prefill, D 128 bf16 B 16"
CDNA_TILE, RDNA_TILE = "_CDNA_DECODE = {128: Tiles(64, 64, 4, 1)", "128: Tiles(64, 32, 8, 1), 256: Tiles(32, 16, 8, 1)"


def run(folder: Path, edit: tuple[str, str, str] | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the check of a copy of its files in which one text was replaced: (file, what, by what)."""
    for module, copy in ((attn_dispatch_triton, "attn_dispatch_triton"), (compile_check, "platforms/triton/evidence")):
        source = Path(module.__file__).parent  # type: ignore[arg-type]
        shutil.copytree(source, folder / copy, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    if edit is not None:
        name, old, new = edit
        (file,) = folder.rglob(name)
        text = file.read_text()
        assert old in text, f"{name} no longer holds {old!r}: this test breaks nothing"
        file.write_text(text.replace(old, new))
    cache = {"ATTN_DISPATCH_CACHE_DIR": str(folder / "cache")}
    environment = {**os.environ, **cache, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "platforms.triton.evidence.compile_check", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_it_compiles_and_writes_its_table(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = run(
        tmp_path, None, "--targets", "gfx942", "--only", DECODE, "--output", str(tmp_path), "--json", str(file)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(file.read_text())["findings"]
    assert {f["target"] for f in found} == {"gfx942"}
    for finding in found:
        result = finding["result"]
        assert result["spills"] == 0
        assert result["matrix"] > 0
        assert 0 < result["shared_bytes"] <= 65536
        assert result["code_bytes"] > 0
        assert result["occupancy"] > 0
    assert "gfx942" in (tmp_path / "triton-compile.md").read_text()


@pytest.mark.parametrize(
    ("target", "row", "edit", "words"),
    [
        ("gfx942", DECODE, ("elements.py", "tl.dot(q, keys,", "tl.dot(q, tl.trans(keys),"), "CompilationError"),
        ("gfx942", DECODE, ("tiles.py", CDNA_TILE, "_CDNA_DECODE = {128: Tiles(64, 512, 8, 1)"), "gfx942 has 65536"),
        ("gfx1100", PREFILL, ("tiles.py", RDNA_TILE, RDNA_TILE.replace("64, 32, 8", "128, 64, 4")), "0 are written"),
    ],
    ids=["a product of shapes that do not fit", "more LDS than the target has", "registers spill"],
)
def test_it_fails_when_a_kernel_is_broken(
    target: str, row: str, edit: tuple[str, str, str], words: str, tmp_path: Path
) -> None:
    done = run(tmp_path, edit, "--targets", target, "--only", row, "--output", "")
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert words in done.stdout


def test_what_was_compiled_before_stands_for_the_same_program_alone(tmp_path: Path) -> None:
    """Nothing is compiled twice; another kernel, in a file that this one's imports, is."""
    arguments = ("--targets", "gfx942", "--only", "write, D 128 bf16", "--output", "")
    assert run(tmp_path, None, *arguments).returncode == 0
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text().replace('"seconds": ', '"seconds": 77'))
    assert " 77" in run(tmp_path, None, *arguments).stdout
    broken = ("elements.py", "tl.dot(q, keys,", "tl.dot(q, tl.trans(keys),")
    decode = ("--targets", "gfx942", "--only", DECODE, "--output", "")
    assert run(tmp_path, None, *decode).returncode == 0
    done = run(tmp_path, broken, *decode)
    assert done.returncode == 1
    assert "CompilationError" in done.stdout


def test_what_is_not_there_is_not_a_pass(tmp_path: Path) -> None:
    done = run(tmp_path, None, "--targets", "gfx942", "--output", "", "--only", "no such row")
    assert done.returncode == 1
    assert "no row" in done.stdout


def test_a_compiler_that_ends_the_process_is_not_a_pass(tmp_path: Path) -> None:
    edit = (
        "compiling.py",
        "    function = kernels",
        "    if target.name == 'gfx942':\n        import os; os.abort()\n    function = kernels",
    )
    done = run(tmp_path, edit, "--targets", "gfx942,sm_90", "--only", "write, D 128 bf16", "--output", "")
    assert done.returncode == 1
    assert "gfx942 all: the compiler ended the process" in done.stdout
    assert "2 programs for gfx942, sm_90" in done.stdout
    assert done.stdout.count("not as they must be") == 1


def test_a_verdict_that_refuses_what_compiles_is_not_a_pass(tmp_path: Path) -> None:
    edit = ("targets.py", "LARGEST_HEAD = 1024", "LARGEST_HEAD = 64")
    done = run(tmp_path, edit, "--targets", "gfx942", "--only", DECODE, "--output", "")
    assert done.returncode == 1
    assert "the verdict says no, every target yes" in done.stdout


def test_a_verdict_that_accepts_what_does_not_fit_is_not_a_pass(tmp_path: Path) -> None:
    edit = ("targets.py", "LARGEST_HEAD = 1024", "LARGEST_HEAD = 4096")
    done = run(tmp_path, edit, "--targets", "sm_86", "--only", "decode, D 2048", "--output", "")
    assert done.returncode == 1
    assert "131584 bytes of shared memory, sm_86 has 101376" in done.stdout
