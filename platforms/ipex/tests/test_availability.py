"""What IPEX's users are told: what is wrong, the one command that mends it, and where to go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attn_dispatch_ipex import availability
from attn_dispatch_ipex.availability import INSTALL_CPU, ipex_on_cpu, ipex_on_xpu, vllm_on_xpu

FACTS = {"system": "linux", "machine": "x86_64", "isa": ("avx2", "avx512f")}
GPU = ["Intel GPU (8086:e20b)"]


def have(**versions: str) -> Callable[[str], str]:
    return lambda name: versions.get(name.replace("-", "_"), "")


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"torch": "2.13.0", "intel_extension_for_pytorch": "2.8.0"}, ("torch 2.13.0 found", "2.8.* needed", "2.8.0")),
        ({"torch": "2.13.0+cpu"}, ("torch 2.13.0+cpu found", "2.8.* needed", "not installed")),
        ({"torch": "2.80.0", "intel_extension_for_pytorch": "2.8.0"}, ("torch 2.80.0 found", "2.8.* needed")),
        ({}, ("torch is not installed", "2.8.* needed")),
        ({"torch": "2.8.0"}, ("IPEX 2.8.0 is not installed",)),
        ({"torch": "2.8.0", "intel_extension_for_pytorch": "2.7.0"}, ("IPEX 2.7.0 found",)),
        ({"torch": "2.8.0+xpu", "intel_extension_for_pytorch": "2.8.10+xpu"}, ("2.8.10+xpu found", "CPU build")),
    ],
)
def test_what_does_not_belong_together_is_named_with_its_remedy(
    versions: dict[str, str], words: tuple[str, ...]
) -> None:
    found = ipex_on_cpu(FACTS, have(**versions))
    assert not found
    assert all(word in found.reason for word in words), found.reason
    assert found.remedy.startswith(INSTALL_CPU)
    assert "cpu/numba and torch/sdpa" in found.remedy


@pytest.mark.parametrize(
    ("changed", "word"), [({"machine": "aarch64"}, "aarch64"), ({"system": "darwin"}, "darwin"), ({"isa": ()}, "AVX2")]
)
def test_machines_that_ipex_was_not_built_for(changed: dict[str, object], word: str) -> None:
    found = ipex_on_cpu(FACTS | changed, have(torch="2.8.0", intel_extension_for_pytorch="2.8.0"))
    assert not found
    assert word in found.reason
    assert "pip install" not in found.remedy


def test_a_user_for_whom_it_works_is_led_on() -> None:
    found = ipex_on_cpu(FACTS, have(torch="2.8.0+cpu", intel_extension_for_pytorch="2.8.0"))
    assert found
    assert found.version == "2.8.0"
    assert "archived" in found.remedy
    assert "cpu/numba and torch/sdpa" in found.remedy


def test_without_an_intel_gpu_both_say_so() -> None:
    everything = have(torch="2.8.0+xpu", intel_extension_for_pytorch="2.8.10+xpu", vllm_xpu_kernels="0.1.16.2")
    for found in (ipex_on_xpu([], everything), vllm_on_xpu([], everything)):
        assert not found
        assert "no Intel GPU" in found.reason


def test_with_an_intel_gpu() -> None:
    found = ipex_on_xpu(GPU, have(torch="2.8.0+xpu", intel_extension_for_pytorch="2.8.10+xpu"))
    assert found
    assert "never run" in found.reason
    assert "ipex/vllm-xpu" in found.remedy
    assert not ipex_on_xpu(GPU, have(torch="2.8.0", intel_extension_for_pytorch="2.8.0"))
    assert not ipex_on_xpu(GPU, have(torch="2.13.0+xpu", intel_extension_for_pytorch="2.8.10+xpu"))
    assert vllm_on_xpu(GPU, have(torch="2.14.0+xpu", vllm_xpu_kernels="0.1.16.2"))
    assert "vllm-xpu-kernels is not installed" in vllm_on_xpu(GPU, have(torch="2.14.0+xpu")).reason


def test_doctor_beside_another_torch(tmp_path: Path) -> None:
    """Package metadata is all that is read, so that another torch's, found first, is all that it takes."""
    info = tmp_path / "torch-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-m", "attn_dispatch", "doctor"], env=environment, capture_output=True, text=True, check=False
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ipex/paged-cpu"))
    assert "torch 2.13.0 found, 2.8.* needed for IPEX 2.8.0" in line
    assert availability.INSTALL_CPU in line
