"""Accelerators of machines that are not here, as the files that they have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_machines import (
    ARC,
    CORE,
    CPU_TORCH,
    CUDA_TORCH,
    JETSON,
    LAPTOP,
    MI300X,
    NVIDIA,
    ROCM_TORCH,
    TPU,
    WSL,
    XPU_TORCH,
    Files,
    build,
    intel,
    kfd,
    machine,
    pci,
    torch,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_dispatch.hardware import detect


def test_nvidia(tmp_path: Path) -> None:
    detected = machine(tmp_path, NVIDIA)
    assert detected.name == "cuda"
    expected = "2x NVIDIA H200 (driver 580.95.05) on AMD EPYC, 1 CPU, AVX-512, AVX512-BF16, 16 GiB"
    assert (detected.description, detected.facts["drivers"]) == (expected, {"nvidia": "580.95.05"})
    assert [(d.evidence, d.facts["slot"], d.facts["pci"]) for d in detected.devices] == [
        ("/dev/nvidia0", "0000:41:00.0", "10de:2335"),
        ("/dev/nvidia1", "0000:01:00.0", "10de:2335"),
    ]


def test_nvidia_where_proc_tells_nothing(tmp_path: Path) -> None:
    detected = machine(tmp_path, {"dev/nvidia0": ""})  # a sandboxed container
    assert (detected.name, detected.devices[0].name, detected.facts["problems"]) == ("cuda", "GPU", [])


def test_the_older_form_of_the_driver_version(tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.216.03  Fri Oct 25 22:43:06 UTC 2024\n"
    assert machine(tmp_path, {"proc/driver/nvidia/version": text}).facts["drivers"] == {"nvidia": "535.216.03"}


def test_gpus_of_windows(tmp_path: Path) -> None:
    cuda = machine(tmp_path / "a", WSL | {"usr/lib/wsl/lib/libcuda.so.1": ""})
    assert (cuda.name, cuda.facts["wsl"], len(cuda.devices)) == ("cuda", True, 1)
    assert machine(tmp_path / "b", WSL | {"opt/rocm/lib/librocdxg.so": ""}).name == "rocm"
    other = machine(tmp_path / "c", WSL | {"usr/lib/wsl/lib/libd3d12.so": ""})
    assert (other.name, other.facts["problems"]) == ("cpu", [])
    assert "/dev/dxg" in other.facts["notes"][0]
    # One node for all of them: the second GPU cannot be known not to be there.
    second = {"CUDA_VISIBLE_DEVICES": "1"}
    assert machine(tmp_path / "d", WSL | {"usr/lib/wsl/lib/libcuda.so.1": ""}, second).name == "cuda"


def test_jetson(tmp_path: Path) -> None:
    detected = machine(tmp_path / "a", JETSON)
    board = {name: text for name, text in JETSON.items() if not name.startswith("dev/")}
    assert (detected.name, [d.name for d in detected.devices]) == ("cuda", ["NVIDIA Jetson Orin Nano Developer Kit"])
    assert (detected.devices[0].facts["soc"], detected.devices[0].facts["l4t"]) == ("tegra234", "36.4.3")
    container = machine(tmp_path / "b", board)
    assert container.name == "cpu"
    assert "--runtime nvidia" in container.facts["problems"][0]
    assert machine(tmp_path / "c", board | {"dev/nvidia0": ""}).devices[0].name == "GPU"  # a card in the board's slot


def test_an_nvidia_gpu_without_its_driver_is_said(tmp_path: Path) -> None:
    detected = machine(tmp_path / "a", pci("0000:01:00.0", "0x10de", "0x2335"))
    assert detected.name == "cpu"
    assert "10de:2335 at 0000:01:00.0" in detected.facts["problems"][0]
    sound = machine(tmp_path / "b", pci("0000:01:00.1", "0x10de", "0x22ba", "0x040300"))
    assert sound.facts["problems"] == []


def test_amd(tmp_path: Path) -> None:
    detected = machine(tmp_path, MI300X | {"sys/module/amdgpu/version": "6.12.12\n"})
    assert (detected.name, detected.facts["drivers"]) == ("rocm", {"amd": "6.12.12"})
    (device,) = detected.devices
    assert (device.name, device.facts["pci"], device.facts["slot"]) == ("gfx942", "1002:74a1", "0000:75:00.0")
    assert device.facts["wave_front_size"] == "64"
    assert device.evidence.endswith("nodes/1/properties: simd_count 1216")


@pytest.mark.parametrize(
    ("version", "name"), [(90010, "gfx90a"), (90500, "gfx950"), (110000, "gfx1100"), (120001, "gfx1201")]
)
def test_the_names_of_amd_targets(tmp_path: Path, version: int, name: str) -> None:
    assert machine(tmp_path, kfd(1, simd_count=96, gfx_target_version=version)).devices[0].name == name


def test_amd_nodes_that_are_no_gpu(tmp_path: Path) -> None:
    detected = machine(tmp_path / "a", kfd(0, cpu_cores_count=8, simd_count=0))
    assert (detected.name, detected.devices) == ("cpu", ())
    assert "simd_count" in detected.facts["problems"][0]
    # The topology is the host's, the device was not given to the container.
    topology = {name: text for name, text in MI300X.items() if name != "dev/kfd"}
    assert machine(tmp_path / "b", topology).name == "cpu"
    bad = machine(tmp_path / "c", {"dev/kfd": "", "sys/class/kfd/kfd/topology/nodes/0/properties": "simd_count many\n"})
    assert "'simd_count many'" in bad.facts["problems"][0]


def test_intel_cards(tmp_path: Path) -> None:
    detected = machine(tmp_path / "a", ARC)
    assert (detected.name, detected.devices[0].name, detected.devices[0].facts["family"]) == ("xpu", "8086:e20b", "BMG")
    assert machine(tmp_path / "b", intel("xe", "0000:00:02.0", "56C0")).name == "xpu"  # given to a virtual machine
    assert machine(tmp_path / "c", intel("xe", "0000:04:00.0", "FFFF")).name == "xpu"  # newer than the list of ids
    assert machine(tmp_path / "d", intel("vfio-pci", "0000:03:00.0", "E20B")).devices == ()
    no_node = machine(tmp_path / "e", {name: text for name, text in ARC.items() if not name.startswith("dev/")})
    assert no_node.name == "cpu"
    assert "/dev/dri/renderD128" in no_node.facts["problems"][0]


@pytest.mark.parametrize(
    ("files", "built", "platform"),
    [
        (LAPTOP, XPU_TORCH, "xpu"),
        (LAPTOP, CPU_TORCH, "cpu"),
        (LAPTOP, {}, "cpu"),
        (kfd(1, simd_count=4, gfx_target_version=100306), CUDA_TORCH, "cpu"),
        (kfd(1, simd_count=80, gfx_target_version=110501), ROCM_TORCH, "rocm"),
    ],
)
def test_an_integrated_gpu_counts_when_torch_was_built_for_it(
    tmp_path: Path, files: Files, built: Files, platform: str
) -> None:
    detected = machine(tmp_path, files | built, search=["site"])
    assert (detected.name, [d.integrated for d in detected.devices]) == (platform, [True])
    assert detected.facts["problems"] == []
    assert [note for note in detected.facts["notes"] if "ATTN_DISPATCH_PLATFORM" in note] == detected.facts["notes"]
    assert bool(detected.facts["notes"]) == (platform == "cpu")


@pytest.mark.parametrize(
    ("device", "subsystem", "generation"),
    [("0x0063", "0x0", "v5e"), ("0x006f", "0x0", "v6e"), ("0x005e", "0x0", "v4"), ("0x0027", "0x004f", "v3")],
)
@pytest.mark.parametrize("node", ["dev/accel0", "dev/vfio/0"])
def test_tpu(tmp_path: Path, device: str, subsystem: str, generation: str, node: str) -> None:
    detected = machine(tmp_path, pci("0000:00:05.0", "0x1ae0", device, "0xff0000", subsystem) | {node: ""})
    assert (detected.name, detected.devices[0].name, detected.devices[0].facts["slot"]) == (
        "tpu",
        generation,
        "0000:00:05.0",
    )
    assert device in detected.devices[0].evidence


def test_a_tpu_of_a_new_generation(tmp_path: Path) -> None:
    newer = pci("0000:00:05.0", "0x1ae0", "0x9999", "0xff0000") | {"sys/class/accel/accel0/device/vendor": "0x1ae0\n"}
    assert machine(tmp_path, newer | {"dev/accel0": ""}).name == "tpu"


@pytest.mark.parametrize(
    "files",
    [
        {"dev/vfio/vfio": "", "dev/vfio/0": ""},
        {"dev/accel0": ""},
        {"dev/accel/accel0": "", "sys/class/accel/accel0/device/vendor": "0x8086\n"},
        pci("0000:00:04.0", "0x1ae0", "0x0042", "0x020000") | {"dev/vfio/0": ""},
    ],
    ids=["vfio", "node", "NPU", "network card"],
)
def test_what_is_no_tpu(tmp_path: Path, files: Files) -> None:
    detected = machine(tmp_path, files)
    assert (detected.name, detected.devices, detected.facts["problems"]) == ("cpu", (), [])


def test_a_tpu_that_was_not_given_to_the_container(tmp_path: Path) -> None:
    detected = machine(tmp_path, TPU)
    assert detected.name == "cpu"
    assert "TPU v5e" in detected.facts["problems"][0]


def test_installed_libraries_are_no_evidence(tmp_path: Path) -> None:
    libraries = {"site/libtpu/__init__.py": "", "site/libtpu/libtpu.so": "", "usr/lib/libcuda.so.1": ""}
    detected = machine(tmp_path, CUDA_TORCH | libraries, search=["site"])
    assert (detected.name, detected.devices, detected.facts["problems"]) == ("cpu", (), [])
    assert detected.facts["torch_flavor"] == "cu130"


@pytest.mark.parametrize(
    ("files", "flavor"),
    [
        (CPU_TORCH, "cpu"),
        (CUDA_TORCH, "cu130"),
        (ROCM_TORCH, "rocm6.4"),
        (torch(hip="7.15.26333", rocm="10.0.0"), "rocm10.0"),
        (XPU_TORCH, "xpu"),
        ({"site/torch/version.py": "__version__ = '2.3.0'\ncuda = \"12.1\"\nhip = None\n"}, "cu121"),
        ({}, None),
    ],
)
def test_the_build_of_torch(tmp_path: Path, files: Files, flavor: str | None) -> None:
    assert machine(tmp_path, files, search=["elsewhere", "site"]).facts["torch_flavor"] == flavor


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (MI300X | CUDA_TORCH, "a cu130 build and cannot use 1x AMD gfx942: install torch's ROCm build"),
        (NVIDIA | ROCM_TORCH, "a rocm6.4 build and cannot use 2x NVIDIA H200: install torch's CUDA build"),
        (NVIDIA | MI300X | ROCM_TORCH, "or set ATTN_DISPATCH_PLATFORM=rocm"),
        (ARC | CPU_TORCH, "install torch's XPU build"),
    ],
)
def test_a_torch_for_other_hardware_is_said(tmp_path: Path, files: Files, words: str) -> None:
    (problem,) = machine(tmp_path, files, search=["site"]).facts["problems"]
    assert words in problem


@pytest.mark.parametrize(
    ("files", "environ", "platform"),
    [
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "-1,0"}, "cpu"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "2"}, "cpu"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "1"}, "cuda"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "GPU-5ebe9f43"}, "cuda"),
        (NVIDIA, {"HIP_VISIBLE_DEVICES": ""}, "cuda"),
        (MI300X, {"HIP_VISIBLE_DEVICES": "-1"}, "cpu"),
        (MI300X, {"ROCR_VISIBLE_DEVICES": ""}, "cpu"),
        (MI300X, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        (MI300X, {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "0"}, "rocm"),
        (NVIDIA | MI300X, {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "0"}, "rocm"),
        (NVIDIA | MI300X, {"ROCR_VISIBLE_DEVICES": "-1"}, "cuda"),
    ],
)
def test_hidden_devices(tmp_path: Path, files: Files, environ: dict[str, str], platform: str) -> None:
    detected = machine(tmp_path, files, environ)
    assert detected.name == platform
    for text in detected.facts["hidden"]:
        assert text in detected.description
        assert any(text.startswith(f"{name}={value!r} hides") for name, value in environ.items())
    assert bool(detected.facts["hidden"]) == (len(detected.devices) < len(detect(tmp_path, environ={}).devices))


def test_several_kinds_have_an_order(tmp_path: Path) -> None:
    detected = machine(tmp_path / "a", NVIDIA | MI300X | ARC)
    assert detected.name == "cuda"
    assert [note.split(" is here too")[0] for note in detected.facts["notes"]] == [
        "1x AMD gfx942",
        "1x Intel GPU 8086:e20b",
    ]
    assert machine(tmp_path / "b", ARC | MI300X).name == "rocm"
    assert machine(tmp_path / "c", NVIDIA | TPU | {"dev/vfio/0": ""}).name == "tpu"


def test_fingerprints_differ_where_machines_do(tmp_path: Path) -> None:
    machines: list[Files] = [{}, NVIDIA, MI300X, {"proc/cpuinfo": CORE}, {"sys/devices/system/cpu/online": "0-3"}]
    prints = [machine(tmp_path / str(i), files).facts["fingerprint"] for i, files in enumerate(machines)]
    assert len(set(prints)) == len(machines)
    # Memory, a driver and another kind of GPU change nothing that is measured.
    same = NVIDIA | {"proc/meminfo": "MemTotal: 1 kB\n", "proc/driver/nvidia/version": ""} | LAPTOP
    assert machine(tmp_path / "same", same).facts["fingerprint"] == prints[1]


@pytest.mark.parametrize(
    "name", ["proc/cpuinfo", "proc/driver/nvidia/version", "sys/class/kfd/kfd/topology/nodes/1/properties"]
)
def test_what_cannot_be_read_is_kept(tmp_path: Path, name: str) -> None:
    build(tmp_path, NVIDIA | MI300X)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()  # a folder where a file belongs: also root cannot read it
    detected = detect(tmp_path, environ={})
    assert detected.name == "cuda"
    assert any(name in text for text in detected.facts["problems"])


@pytest.mark.skipif(os.geteuid() == 0, reason="not run: nothing is closed to root")
def test_a_device_that_this_user_may_not_open_is_said(tmp_path: Path) -> None:
    build(tmp_path, MI300X)
    (tmp_path / "dev/kfd").chmod(0)
    detected = detect(tmp_path, environ={})
    assert detected.name == "rocm"
    assert "group render" in detected.facts["problems"][0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted({**NVIDIA, **MI300X, **ARC, **TPU, **CUDA_TORCH, "proc/meminfo": "", "proc/cpuinfo": "",
                                 "sys/fs/cgroup/cpu.max": "", "sys/devices/system/cpu/online": ""})),
    content=st.one_of(st.binary(max_size=40), st.from_regex(rb"[a-z_]+[ :=] *-?[0-9a-fx,-]+\n", fullmatch=True)),
)  # fmt: skip
def test_no_content_of_a_file_makes_it_raise(tmp_path: Path, name: str, content: bytes) -> None:
    build(tmp_path, NVIDIA | MI300X | ARC | TPU | CUDA_TORCH | {name: ""})
    (tmp_path / name).write_bytes(content)
    detected = detect(tmp_path, environ={}, search=["site"])
    assert json.dumps(detected.facts)
    assert detected.facts["cpu_count"] >= 1


@pytest.mark.parametrize(
    ("files", "closed", "device"),
    [
        (NVIDIA | CUDA_TORCH, "", "cuda"),
        (NVIDIA | CPU_TORCH, "", "cpu"),
        (NVIDIA, "", "cuda"),  # torch's build is not known
        (MI300X | ROCM_TORCH, "", "cuda"),
        (MI300X | ROCM_TORCH, "dev/kfd", "cpu"),
        (MI300X | CPU_TORCH, "", "cpu"),
        (NVIDIA | CUDA_TORCH, "dev/nvidia0", "cuda"),  # the other one may be opened
        (ARC | XPU_TORCH, "", "xpu"),
        (ARC | XPU_TORCH, "dev/dri/renderD128", "cpu"),
        (CPU_TORCH, "", "cpu"),
    ],
)
def test_where_torch_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Files, closed: str, device: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: not closed or not str(path).endswith(closed))
    assert machine(tmp_path, files, search=["site"]).torch_device == device


def test_an_amd_card_that_was_not_given_to_the_container(tmp_path: Path) -> None:
    topology = {name: text for name, text in MI300X.items() if name != "dev/kfd"}
    shared = machine(tmp_path / "a", topology)
    assert shared.name == "cpu"
    assert "1x AMD gfx942: no /dev/kfd here" in shared.facts["problems"][0]
    # A sandbox that hides the host's topology shows the PCI bus.
    sandbox = machine(tmp_path / "b", pci("0000:05:00.0", "0x1002", "0x74a1", "0x120000"))
    assert "AMD GPU 1002:74a1 at 0000:05:00.0: no /dev/kfd here" in sandbox.facts["problems"][0]
    # Nobody misses the GPU inside a Ryzen, nor a screen's.
    ryzen = kfd(1, simd_count=4, gfx_target_version=100306)
    del ryzen["dev/kfd"]
    screen = pci("0000:05:00.0", "0x1002", "0x164e", "0x030000")
    assert machine(tmp_path / "c", ryzen | screen).facts["problems"] == []
