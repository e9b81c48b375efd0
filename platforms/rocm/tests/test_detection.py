"""AMD GPUs by the driver's files alone: targets, several of them, nodes that are CPUs, WSL, and torch's builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.hardware import Platform, detect
from attn_dispatch_rocm.machine import Machine

NODES = "sys/class/kfd/kfd/topology/nodes"
CPU_NODE = "cpu_cores_count 96\nsimd_count 0\nmem_banks_count 1\ngfx_target_version 0\nvendor_id 0\n"
ROCM, CUDA = "cuda: Optional[str] = None\nhip: Optional[str] = '7.2.53211'\n", "cuda = '13.0'\nhip = None\n"


def gpu(version: int, location: int) -> str:
    return (
        f"cpu_cores_count 0\nsimd_count 1216\nmem_banks_count 1\nlds_size_in_kb 64\nwave_front_size 64\n"
        f"gfx_target_version {version}\nvendor_id 4098\ndevice_id 29857\nlocation_id {location}\ndomain 0\n"
        f"drm_render_minor {128 + location // 256}\n"
    )


def machine(root: Path, nodes: list[str], *, torch: str = "", kfd: bool = True, **environ: str) -> Platform:
    files = {f"{NODES}/{i}/properties": text for i, text in enumerate(nodes)}
    if kfd:
        files["dev/kfd"] = ""
    if torch:
        files["site/torch/version.py"] = torch
    files["proc/cpuinfo"] = "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: avx2\n"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return detect(root, environ=environ, search=["site"])


@pytest.mark.parametrize(
    ("version", "target"),
    [
        (90006, "gfx906"),
        (90008, "gfx908"),
        (90010, "gfx90a"),
        (90012, "gfx90c"),
        (90402, "gfx942"),
        (90500, "gfx950"),
        (100300, "gfx1030"),
        (110000, "gfx1100"),
        (110001, "gfx1101"),
        (110501, "gfx1151"),
        (120000, "gfx1200"),
        (120001, "gfx1201"),
    ],
)
def test_targets(tmp_path: Path, version: int, target: str) -> None:
    """As LLVM's AMDGPU guide names them: major, minor and stepping, the last two as hexadecimal digits."""
    (device,) = machine(tmp_path, [CPU_NODE, gpu(version, 256)], torch=ROCM).devices
    assert device.facts["gfx"] == target
    assert Machine(machine(tmp_path, [CPU_NODE, gpu(version, 256)], torch=ROCM), Packages()).targets == (target,)


def test_eight_gpus_behind_two_cpus(tmp_path: Path) -> None:
    """Ten nodes: the order is that of their numbers, not of their names."""
    found = machine(tmp_path, [CPU_NODE, CPU_NODE, *(gpu(90402, 256 * i) for i in range(1, 9))], torch=ROCM)
    assert (found.name, found.description.split(" on ")[0]) == ("rocm", "8x AMD gfx942")
    assert [device.facts["slot"] for device in found.devices] == [f"0000:{i:02x}:00.0" for i in range(1, 9)]
    assert [device.facts["node"] for device in found.devices] == [f"/dev/dri/renderD{128 + i}" for i in range(1, 9)]
    assert found.facts["problems"] == []
    here = Machine(found, Packages([str(tmp_path / "site")]))
    assert (here.targets, len(here.gpus)) == (("gfx942",), 8)


def test_two_kinds_of_gpu(tmp_path: Path) -> None:
    found = machine(tmp_path, [CPU_NODE, gpu(110000, 256), gpu(90402, 512)], torch=ROCM)
    assert found.description.startswith("1x AMD gfx1100, 1x AMD gfx942")
    assert Machine(found, Packages()).targets == ("gfx1100", "gfx942")


def test_a_driver_with_cpus_only(tmp_path: Path) -> None:
    found = machine(tmp_path, [CPU_NODE, CPU_NODE], torch=ROCM)
    assert (found.name, found.devices) == ("cpu", ())
    assert any("none of its 2 nodes has simd_count > 0" in problem for problem in found.facts["problems"])
    missing = Machine(found, Packages([str(tmp_path)])).needs_torch()
    assert missing is not None
    assert "no AMD GPU here" in missing.reason


def test_gpus_that_a_variable_hides(tmp_path: Path) -> None:
    nodes = [CPU_NODE, gpu(90402, 256), gpu(90402, 512)]
    hidden = machine(tmp_path, nodes, torch=ROCM, HIP_VISIBLE_DEVICES="-1")
    assert hidden.name == "cpu"
    assert "HIP_VISIBLE_DEVICES='-1' hides 2x AMD gfx942" in hidden.facts["hidden"][0]
    assert machine(tmp_path, nodes, torch=ROCM, ROCR_VISIBLE_DEVICES="1").name == "rocm"


def test_torchs_build_for_other_gpus_is_told_with_a_remedy(tmp_path: Path) -> None:
    wrong = machine(tmp_path / "a", [CPU_NODE, gpu(90402, 256)], torch=CUDA)
    (problem,) = wrong.facts["problems"]
    assert problem == ("the installed torch is a cu130 build and cannot use 1x AMD gfx942: install torch's ROCm build")
    assert wrong.name == "rocm"
    right = machine(tmp_path / "b", [CPU_NODE, gpu(90402, 256)], torch=ROCM)
    assert (right.facts["torch_flavor"], right.facts["problems"]) == ("rocm7.2", [])


def test_wsl(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir(parents=True)
    (tmp_path / "dev/dxg").touch()
    without = machine(tmp_path, [], torch=ROCM, kfd=False)
    assert without.name == "cpu"
    assert any("librocdxg" in note for note in without.facts["notes"])
    library = tmp_path / "opt/rocm/lib/librocdxg.so"
    library.parent.mkdir(parents=True)
    library.touch()
    found = machine(tmp_path, [], torch=ROCM, kfd=False)
    assert (found.name, found.devices[0].facts["wsl"]) == ("rocm", "yes")
    assert Machine(found, Packages()).targets == ()


def test_amdsmi_is_not_imported() -> None:
    """Nor anything else of ROCm's: looking for GPUs is reading files."""
    script = (
        "import sys, attn_dispatch as ad; ad.platform.name; "
        "print(sorted(m for m in sys.modules if 'smi' in m or m in ('torch', 'hip')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
