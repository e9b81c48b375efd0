"""Machines that are not here, as the files that they have: what the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from attn_dispatch.hardware import Platform, detect

EPYC = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fma avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t: x\n"
XEON = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2 avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16\n"
CORE = "processor\t: 0\nmodel name\t: Old Core\nflags\t\t: sse4_2 avx avx2 fma f16c\n"
NEOVERSE = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"
WSL = {"proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n", "dev/dxg": ""}

Files = dict[str, str]


def build(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/cpuinfo": EPYC, "proc/meminfo": "MemTotal:  16777216 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(
    root: Path, files: Mapping[str, str], environ: Mapping[str, str] | None = None, search: Iterable[str] = ()
) -> Platform:
    return detect(build(root, files), environ=environ or {}, search=search)


def pci(slot: str, vendor: str, device: str, pci_class: str = "0x030200", subsystem: str = "0x0000") -> Files:
    values = {"vendor": vendor, "device": device, "class": pci_class, "subsystem_device": subsystem}
    return {f"sys/bus/pci/devices/{slot}/{name}": f"{value}\n" for name, value in values.items()}


def nvidia(minor: int, slot: str) -> Files:
    text = f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 3\nBus Location: \t {slot}\nDevice Minor: \t {minor}\n"
    return {
        f"dev/nvidia{minor}": "",
        f"proc/driver/nvidia/gpus/{slot}/information": text,
        **pci(slot, "0x10de", "0x2335"),
    }


def kfd(node: int, **properties: int) -> Files:
    text = "".join(f"{key} {value}\n" for key, value in properties.items())
    return {"dev/kfd": "", f"sys/class/kfd/kfd/topology/nodes/{node}/properties": text}


def intel(driver: str, slot: str, device: str) -> Files:
    folder = "sys/class/drm/renderD128/device"
    uevent = f"DRIVER={driver}\nPCI_CLASS=30000\nPCI_ID=8086:{device}\nPCI_SLOT_NAME={slot}\n"
    return {"dev/dri/renderD128": "", f"{folder}/vendor": "0x8086\n", f"{folder}/uevent": uevent}


def torch(**built: str) -> Files:
    lines = [f"{key}: Optional[str] = {built.get(key)!r}\n" for key in ("cuda", "hip", "rocm", "xpu")]
    return {"site/torch/version.py": f"from typing import Optional\n__version__ = '2.13.0'\n{''.join(lines)}"}


NVIDIA = {
    "dev/nvidiactl": "",
    "dev/nvidia-uvm": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    "GCC version:  gcc version 12.3.0\n",
    **nvidia(0, "0000:41:00.0"),
    **nvidia(1, "0000:01:00.0"),
}
MI300X = {
    **kfd(0, cpu_cores_count=96, simd_count=0, gfx_target_version=0),
    **kfd(1, cpu_cores_count=0, simd_count=1216, wave_front_size=64, gfx_target_version=90402, vendor_id=4098,
          device_id=29857, location_id=0x7500, domain=0, drm_render_minor=128),
}  # fmt: skip
JETSON = {
    "proc/cpuinfo": NEOVERSE,
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "dev/nvgpu/igpu0/ctrl": "",
    "dev/nvidia0": "",
}
ARC = intel("xe", "0000:03:00.0", "E20B")
LAPTOP = intel("i915", "0000:00:02.0", "A7A0")
TPU = pci("0000:00:05.0", "0x1ae0", "0x0063", "0xff0000")
CUDA_TORCH, ROCM_TORCH, XPU_TORCH, CPU_TORCH = (
    torch(cuda="13.0"),
    torch(hip="6.4.43482-0f2"),
    torch(xpu="2025"),
    torch(),
)
