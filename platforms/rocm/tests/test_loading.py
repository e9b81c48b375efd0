"""Entry points: found by name, before what is portable, without a vendor, without a device, on a machine with none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import attn_dispatch as ad
from attn_dispatch.conformance.loading import loaded_vendors
from attn_dispatch.contract.layout import layout_named
from attn_dispatch.dispatch import registry

NAMES = ("rocm/aiter", "rocm/flash-attention")


@pytest.mark.parametrize("name", NAMES)
def test_loading_and_asking_import_no_vendor(name: str) -> None:
    assert loaded_vendors(name) == []


def test_they_are_tried_before_what_is_portable() -> None:
    ranks = {entry.name: entry.rank for entry in registry().entries if entry.platform == "rocm"}
    assert [name for name in registry().ranked("rocm") if name in NAMES] == list(NAMES)
    assert max(ranks[name] for name in NAMES) < 60


def test_a_machine_without_a_gpu_is_told_so_and_can_fork() -> None:
    """Every backend is probed, asked and forked after; no device is initialised on the way."""
    script = (
        "import json, os, sys\n"
        "import attn_dispatch as ad\n"
        "from attn_dispatch.dispatch import registry, verdict_of\n"
        "spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, block_size=128)\n"
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
    here = [device for device in ad.platform.devices if device.kind == "amd"]
    for reason, _ in found.values():
        assert here or "no AMD GPU here" in reason


def test_named_layouts_are_known_once_a_backend_is_loaded() -> None:
    registry().load("rocm/aiter")
    assert dict(layout_named("vLLM x8").arrays) == {"key": "N K D/8 B D%8", "value": "N K D B"}
