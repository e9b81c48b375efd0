"""Machines that are not here, as trees of the files that they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attn_dispatch.hardware import Platform, detect

EPYC = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fma avx2 avx512f avx512_bf16 amx_bf16\n\nprocessor\t: 1\n"
OLD = "processor\t: 0\nmodel name\t: Old Core\nflags\t\t: sse4_2 avx avx2 fma f16c\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd bf16 i8mm sve\nCPU implementer\t: 0x41\n"


def machine(root: Path, files: dict[str, str], environ: dict[str, str] | None = None, search: tuple = ()) -> Platform:
    for name, text in {"proc/cpuinfo": EPYC, "proc/meminfo": "MemTotal: 1048576 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return detect(root, environ=environ or {}, search=search)


def pci(slot: str, vendor: str, device: str, class_: str = "0x030200") -> dict[str, str]:
    return {
        f"sys/bus/pci/devices/{slot}/{k}": v + "\n"
        for k, v in (("vendor", vendor), ("device", device), ("class", class_))
    }


def kfd(node: int, **properties: int) -> dict[str, str]:
    text = "".join(f"{key} {value}\n" for key, value in properties.items())
    return {"dev/kfd": "", f"sys/class/kfd/kfd/topology/nodes/{node}/properties": text}


def intel(driver: str, slot: str) -> dict[str, str]:
    folder = "sys/class/drm/renderD128/device"
    uevent = f"DRIVER={driver}\nPCI_ID=8086:E20B\nPCI_SLOT_NAME={slot}\n"
    return {f"{folder}/vendor": "0x8086\n", f"{folder}/device": "0xe20b\n", f"{folder}/uevent": uevent}


NVIDIA = {
    "dev/nvidia0": "",
    "dev/nvidia1": "",
    "dev/nvidiactl": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.51.03  Thu",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 3\n",
    "proc/driver/nvidia/gpus/0000:02:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 4\n",
}
MI300 = kfd(0, cpu_cores_count=96, simd_count=0) | kfd(1, simd_count=1216, gfx_target_version=90402, wave_front_size=64)


def test_nvidia(tmp_path: Path) -> None:
    found = machine(tmp_path, NVIDIA)
    assert found.name == "cuda"
    assert found.description.startswith("2x NVIDIA H200, driver 575.51.03, AMD EPYC, 2 cores")
    assert [d.evidence for d in found.devices] == ["/dev/nvidia0", "/dev/nvidia1"]


def test_nvidia_under_windows(tmp_path: Path) -> None:
    release = {"proc/sys/kernel/osrelease": "5.15.0-microsoft-standard-WSL2"}
    assert machine(tmp_path / "a", {"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""} | release).name == "cuda"
    other = machine(tmp_path / "b", {"dev/dxg": "", "usr/lib/wsl/lib/libd3d12.so": ""} | release)
    assert (other.name, other.facts["wsl"]) == ("cpu", True)


def test_tegra(tmp_path: Path) -> None:
    files = {"etc/nv_tegra_release": "# R36 (release)", "dev/nvhost-gpu": "", "proc/cpuinfo": ARM}
    assert machine(tmp_path, files).name == "cuda"


def test_a_card_without_a_driver_is_said(tmp_path: Path) -> None:
    found = machine(tmp_path, pci("0000:01:00.0", "0x10de", "0x2335"))
    assert found.name == "cpu"
    assert "0000:01:00.0" in found.facts["problems"][0]
    # Its sound device is no GPU.
    assert machine(tmp_path / "b", pci("0000:01:00.1", "0x10de", "0x22ba", "0x040300")).facts["problems"] == []


def test_amd(tmp_path: Path) -> None:
    found = machine(tmp_path, MI300)
    assert (found.name, found.devices[0].name, found.devices[0].facts["wave_front_size"]) == ("rocm", "gfx942", "64")
    older = machine(tmp_path / "b", kfd(1, simd_count=440, gfx_target_version=90010))
    assert older.devices[0].name == "gfx90a"
    assert machine(tmp_path / "c", kfd(1, simd_count=96, gfx_target_version=110000)).devices[0].name == "gfx1100"


def test_a_kfd_without_gpus(tmp_path: Path) -> None:
    found = machine(tmp_path, kfd(0, cpu_cores_count=8, simd_count=0))
    assert found.name == "cpu"
    assert "simd_count" in found.facts["problems"][0]


def test_intel_cards_and_processors(tmp_path: Path) -> None:
    assert machine(tmp_path / "a", intel("xe", "0000:03:00.0")).name == "xpu"
    laptop = machine(tmp_path / "b", intel("i915", "0000:00:02.0"))
    assert laptop.name == "cpu"
    assert laptop.facts["devices"][0]["facts"]["integrated"] == "yes"
    assert machine(tmp_path / "c", intel("vfio-pci", "0000:03:00.0")).devices == ()


@pytest.mark.parametrize(("device", "generation"), [("0x0063", "v5e"), ("0x006f", "v6e"), ("0x005e", "v4")])
def test_tpu(tmp_path: Path, device: str, generation: str) -> None:
    found = machine(tmp_path, pci("0000:00:05.0", "0x1ae0", device, "0x120000") | {"dev/accel0": ""})
    assert (found.name, found.devices[0].facts["generation"]) == ("tpu", generation)
    newer = machine(tmp_path / "v", pci("0000:00:05.0", "0x1ae0", device, "0x120000") | {"dev/vfio/0": ""})
    assert newer.name == "tpu"


def test_what_is_no_tpu(tmp_path: Path) -> None:
    assert machine(tmp_path / "a", {"dev/vfio/vfio": "", "dev/vfio/0": ""}).name == "cpu"
    assert machine(tmp_path / "b", {"dev/accel0": ""}).name == "cpu"
    network = pci("0000:00:04.0", "0x1ae0", "0x0042", "0x020000")
    assert machine(tmp_path / "c", network | {"dev/vfio/0": ""}).name == "cpu"
    no_node = machine(tmp_path / "d", pci("0000:00:05.0", "0x1ae0", "0x0063"))
    assert no_node.name == "cpu"
    assert "v5e" in no_node.facts["problems"][0]


def torch(folder: Path, text: str) -> tuple[str]:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(text)
    return (str(folder),)


def test_installed_libraries_are_no_evidence(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "libtpu").mkdir(parents=True)
    search = torch(site, "__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    found = machine(tmp_path / "root", {}, search=search)
    assert (found.name, found.facts["torch_flavor"], found.facts["problems"]) == ("cpu", "cu130", [])


@pytest.mark.parametrize(
    ("text", "flavor"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", "cpu"),
        ("__version__ = '2.8.0'\ncuda = '12.8'\n", "cu128"),
        ("__version__ = '2.9.0+rocm6.4'\ncuda = None\nhip = '6.4.43483'\n", "rocm6.4"),
        ("__version__ = '2.9.0+xpu'\ncuda = None\nhip = None\nxpu = '20250101'\n", "xpu"),
    ],
)
def test_the_build_of_torch(tmp_path: Path, text: str, flavor: str) -> None:
    assert machine(tmp_path / "root", {}, search=torch(tmp_path / "site", text)).facts["torch_flavor"] == flavor


def test_a_torch_for_other_hardware_is_said(tmp_path: Path) -> None:
    cuda = torch(tmp_path / "site", "__version__ = '2.11.0+cu130'\ncuda = '13.0'\n")
    problems = machine(tmp_path / "amd", MI300, search=cuda).facts["problems"]
    assert "cu130" in problems[0]
    assert "install torch's ROCm build" in problems[0]
    rocm = torch(tmp_path / "site2", "__version__ = '2.9.0+rocm6.4'\nhip = '6.4.4'\n")
    assert "CUDA build" in machine(tmp_path / "nv", NVIDIA, search=rocm).facts["problems"][0]


@pytest.mark.parametrize(
    ("files", "variable", "next_"),
    [
        (NVIDIA, "CUDA_VISIBLE_DEVICES", "cpu"),
        (MI300, "HIP_VISIBLE_DEVICES", "cpu"),
        (NVIDIA | MI300, "ROCR_VISIBLE_DEVICES", "cuda"),
    ],
)
def test_hidden_devices(tmp_path: Path, files: dict, variable: str, next_: str) -> None:
    for value in ("", "-1"):
        found = machine(tmp_path, files, {variable: value})
        assert found.name == next_
        assert variable in found.description
    assert machine(tmp_path, files, {variable: "0"}).name != "cpu"


def test_several_kinds_have_an_order(tmp_path: Path) -> None:
    assert machine(tmp_path, NVIDIA | MI300 | intel("xe", "0000:03:00.0")).name == "cuda"


def test_processors(tmp_path: Path) -> None:
    assert machine(tmp_path / "a", {}).facts["isa"] == ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"]
    assert machine(tmp_path / "b", {"proc/cpuinfo": OLD}).facts["isa"] == ["avx2", "fma", "f16c"]
    arm = machine(tmp_path / "c", {"proc/cpuinfo": ARM}).facts
    assert (arm["isa"], arm["machine"]) == (["neon", "bf16", "i8mm", "sve"], "aarch64")


def test_what_a_container_grants(tmp_path: Path) -> None:
    many = {"sys/devices/system/cpu/online": "0-63\n"}
    assert machine(tmp_path / "a", many).facts["cpu_count"] == 64
    limited = machine(
        tmp_path / "b", many | {"sys/fs/cgroup/cpu.max": "250000 100000\n", "sys/fs/cgroup/memory.max": "1000000\n"}
    )
    assert (limited.facts["cpu_count"], limited.facts["memory_bytes"]) == (2, 1000000)
    assert machine(tmp_path / "c", many | {"sys/fs/cgroup/cpu.max": "max 100000\n"}).facts["cpu_count"] == 64
    older = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    assert machine(tmp_path / "d", many | older).facts["cpu_count"] == 4
    none = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    assert machine(tmp_path / "e", many | none).facts["cpu_count"] == 64


def test_what_cannot_be_read_is_kept(tmp_path: Path) -> None:
    (tmp_path / "proc" / "driver" / "nvidia" / "version").mkdir(parents=True)  # a folder where a file belongs
    found = machine(tmp_path, {})
    assert any("proc/driver/nvidia/version" in text for text in found.facts["problems"])


def test_nothing_outside_the_root_counts(tmp_path: Path) -> None:
    empty = detect(tmp_path, environ={}, search=())
    assert (empty.name, empty.facts["cpu_count"], empty.facts["memory_bytes"], empty.devices) == ("cpu", 1, 0, ())
    assert empty.facts["cpu_flags"] == []


def test_this_machine() -> None:
    here = detect()
    json.dumps(dict(here.facts))
    assert here.facts["cpu_count"] >= 1
    assert here.facts["fingerprint"] == detect().facts["fingerprint"]
    assert str(here.facts["cpu_count"]) in here.description


def test_fingerprints_differ_where_machines_do(tmp_path: Path) -> None:
    prints = {machine(tmp_path / str(i), files).facts["fingerprint"] for i, files in enumerate(({}, NVIDIA, MI300))}
    assert len(prints) == 3


def test_it_needs_the_standard_library_alone() -> None:
    folder = Path(detect.__code__.co_filename).parent
    script = (
        "import sys, types, importlib.util\n"
        "package = types.ModuleType('attn_dispatch'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['attn_dispatch'] = package\n"
        "import attn_dispatch.hardware as h\n"
        "assert h.detect().name\n"
        "roots = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'attn_dispatch', '__main__'}\n"
        "print(sorted(r for r in roots if not r.startswith('_')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(folder.parent)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "[]"
