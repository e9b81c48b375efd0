"""Entry points: found by name, before what is portable, without a vendor, without a device, on a machine with none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest

from attn_dispatch.conformance.loading import loaded_vendors
from attn_dispatch.dispatch import registry
from attn_dispatch.hardware import Device
from attn_dispatch_cuda.gpus import capability_from, capability_of

NAMES = ("cuda/flash-attention", "cuda/flashinfer", "cuda/xformers")


@pytest.mark.parametrize("name", NAMES)
def test_loading_imports_no_vendor(name: str) -> None:
    assert loaded_vendors(name) == []


def test_they_are_tried_before_what_is_portable() -> None:
    ranks = {entry.name: entry.rank for entry in registry().entries if entry.platform == "cuda"}
    assert [name for name in registry().ranked("cuda") if name in NAMES] == list(NAMES)
    assert max(ranks[name] for name in NAMES) < 60


def test_an_installation_without_a_vendor_has_a_kernel_for_the_gpu() -> None:
    """And not the exact, slow reference alone: Triton comes with torch's CUDA builds, its platform with this one."""
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in metadata.requires("attn-dispatch-cuda") or ()}
    assert "attn-dispatch-triton" in names
    assert list(registry().ranked("cuda"))[-2:] == ["cuda/xformers", "triton/paged"]


def test_a_machine_without_a_gpu_is_told_so_and_can_fork() -> None:
    """Every backend is probed, asked and forked after; no device is initialised on the way."""
    script = (
        "import json, os, sys\n"
        "import attn_dispatch as ad\n"
        "from attn_dispatch.dispatch import registry, verdict_of\n"
        "spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, block_size=256)\n"
        "found = {}\n"
        f"for name in {NAMES!r}:\n"
        "    backend = registry().load(name)\n"
        "    found[name] = [backend.probe().reason, bool(verdict_of(backend, spec))]\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if 'torch' not in sys.modules else 1)\n"
        "found['forked'] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("forked") == 0
    here = [device for device in __import__("attn_dispatch").platform.devices if device.kind == "nvidia"]
    for reason, _ in found.values():
        assert here or "no NVIDIA GPU here" in reason


@pytest.mark.parametrize(
    ("model", "capability"),
    [
        ("NVIDIA H200", (9, 0)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA H20", (9, 0)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GB200", (10, 0)),
        ("NVIDIA B300 SXM6 AC", (10, 3)),
        ("NVIDIA GB10", (12, 1)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
        ("NVIDIA GeForce RTX 5090", (12, 0)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9)),
        ("NVIDIA L4", (8, 9)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA A30", (8, 0)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA A40", (8, 6)),
        ("NVIDIA RTX A6000", (8, 6)),
        ("NVIDIA GeForce RTX 3090", (8, 6)),
        ("Tesla T4", (7, 5)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("Jetson AGX Orin", (8, 7)),
        ("GPU", None),
        ("NVIDIA Something New", None),
    ],
)
def test_capabilities_by_model(model: str, capability: tuple[int, int] | None) -> None:
    assert capability_of(Device("nvidia", model, "/dev/nvidia0")) == capability


def test_a_tegra_is_known_by_its_chip() -> None:
    assert capability_of(Device("nvidia", "A board", "/dev/nvgpu", {"soc": "tegra234"})) == (8, 7)
    assert capability_from(" 12.1 ", "X") == (12, 1)
