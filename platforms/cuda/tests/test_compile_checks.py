"""The compile checks: that they fail where it should, with the real compiler on small kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from platforms.cuda.evidence import flashinfer_compile

KERNEL = """
__global__ void twice(float* x) {{ x[threadIdx.x] *= 2.0f; {broken} }}
extern "C" void launch(float* x) {{ twice<<<1, 32>>>(x); }}
"""


def built(tmp_path: Path, broken: str) -> subprocess.CompletedProcess[str]:
    """Build one kernel as FlashInfer builds its own, in a process that is prepared like the check's."""
    found = flashinfer_compile.toolkit()
    if found is None or shutil.which("ninja") is None:
        pytest.skip("not run: needs nvcc and ninja (nvidia-cuda-nvcc, ninja)")
    (tmp_path / "kernel.cu").write_text(KERNEL.format(broken=broken))
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from platforms.cuda.evidence import flashinfer_compile as check\n"
        "work = Path(sys.argv[1])\n"
        "found = check.toolkit()\n"
        "check.prepare(found, work, '9.0a')\n"
        "from flashinfer.jit.core import gen_jit_spec\n"
        "library, seconds = check.build('small', gen_jit_spec('small', [work / 'kernel.cu']), False)\n"
        "for kernel in check.kernels_in(library, found.cuobjdump):\n"
        "    print(kernel.name, kernel.registers, kernel.stack_bytes)\n"
        "print(check.build('small', gen_jit_spec('small', [work / 'kernel.cu']), False)[1])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_kernel_is_built_measured_and_kept(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
    done = built(tmp_path, "")
    assert done.returncode == 0, done.stderr[-2000:]
    kernel, again = done.stdout.splitlines()[-2:]
    name, registers, stack = kernel.split()
    assert "twice" in name
    assert 1 < int(registers) < 40
    assert int(stack) == 0
    assert float(again) == 0.0


def test_a_broken_kernel_fails(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
    done = built(tmp_path, "no_such_function();")
    assert done.returncode != 0
    assert "no_such_function" in done.stderr + done.stdout
    assert not list(tmp_path.rglob("small.so"))


def test_the_command_fails_without_a_compiler(tmp_path: Path) -> None:
    """An interpreter that sees none of the wheels, with an empty path."""
    environ = {"PATH": str(tmp_path), "PYTHONPATH": str(Path(flashinfer_compile.__file__).parent)}
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('check', sys.argv[1])\n"
        "check = importlib.util.module_from_spec(spec)\n"
        "sys.modules['check'] = check\n"
        "spec.loader.exec_module(check)\n"
        "sys.exit(check.main([]))\n"
    )
    python = os.path.realpath(sys.executable)  # outside of any environment
    command = [python, "-I", "-S", "-c", script, flashinfer_compile.__file__]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no nvcc (pip install nvidia-cuda-nvcc" in done.stderr


def test_flash_attention_4_that_cannot_be_had_fails(tmp_path: Path) -> None:
    """No package where the path says, and none in the environment: nothing passes for compiled."""
    environ = os.environ | {"ATTN_DISPATCH_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "platforms.cuda.evidence.flash4_compile",
        "--arch",
        "sm_90",
        "--path",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if find_spec("flash_attn") is not None:
        pytest.skip("not run: a flash_attn is installed here")
    assert done.returncode == 1
    assert "does not import" in done.stdout
    assert not list(tmp_path.rglob("*.json"))
