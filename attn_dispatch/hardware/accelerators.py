"""NVIDIA, AMD, Intel GPUs and TPUs, by the files that their drivers make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from attn_dispatch.hardware.files import Files

__all__ = ["PLATFORM_OF", "Device", "accelerators"]

PLATFORM_OF = {"nvidia": "cuda", "amd": "rocm", "intel-gpu": "xpu", "tpu": "tpu"}

# PCI device ids of Google's accelerators, as JAX's own detection lists them (jax/_src/hardware_utils.py). The vendor
# alone says nothing: Google's network cards and disks have it too.
_TPU_GENERATIONS = {
    "0x0027": "v3", "0x0056": "plc", "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x",
}  # fmt: skip

_HIDING = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        kind: "nvidia", "amd", "intel-gpu" or "tpu".
        name: as the system names it: a model, "gfx942", "v5e", a PCI id.
        evidence: the file, and what in it, that shows it.
        facts: driver, PCI address, instruction set...
    """

    kind: str
    name: str
    evidence: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pci:
    """One PCI device."""

    address: str
    vendor: str
    device: str
    class_: str


def accelerators(files: Files, environ: Mapping[str, str]) -> tuple[list[Device], list[str]]:
    """Return what this process may use, and what is hidden from it, in words."""
    pci = [
        Pci(
            slot,
            *(files.text(f"sys/bus/pci/devices/{slot}/{name}", 32).lower() for name in ("vendor", "device", "class")),
        )
        for slot in files.names("sys/bus/pci/devices")
    ]
    found = [*_nvidia(files, pci), *_amd(files), *_intel(files), *_tpu(files, pci)]
    hidden = []
    for kind, variables in _HIDING.items():
        for variable in variables:
            value = environ.get(variable)
            if value is not None and value.strip() in ("", "-1") and any(d.kind == kind for d in found):
                hidden.append(
                    f"{variable}={value.strip()!r} hides {sum(d.kind == kind for d in found)} {kind} device(s)"
                )
                found = [device for device in found if device.kind != kind]
    return found, hidden


def _nvidia(files: Files, pci: list[Pci]) -> Iterator[Device]:
    version = files.text("proc/driver/nvidia/version", 1024)
    driver = re.search(r"(\d+\.\d+(?:\.\d+)?)", version)
    facts = {"driver": driver[1]} if driver else {}
    nodes = [name for name in files.names("dev") if re.fullmatch(r"nvidia\d+", name)]
    models = [
        model[1].strip()
        for slot in files.names("proc/driver/nvidia/gpus")
        if (
            model := re.search(
                r"^Model:\s*(.+)$", files.text(f"proc/driver/nvidia/gpus/{slot}/information", 4096), re.M
            )
        )
    ]
    for i, node in enumerate(nodes):
        yield Device("nvidia", models[i] if i < len(models) else "NVIDIA GPU", f"/dev/{node}", facts)
    if nodes:
        return
    if files.exists("dev/dxg"):
        # Windows' Linux: the driver is the host's; its CUDA library is mounted here when the GPU is NVIDIA's.
        library = next((n for n in files.names("usr/lib/wsl/lib") if n.startswith("libcuda.so")), None)
        if library:
            yield Device("nvidia", "NVIDIA GPU (WSL)", f"/dev/dxg and /usr/lib/wsl/lib/{library}", {"wsl": "yes"})
            return
    if tegra := files.text("etc/nv_tegra_release", 256):
        if files.exists("dev/nvhost-gpu") or files.exists("dev/nvhost-ctrl-gpu") or files.exists("dev/nvmap"):
            yield Device("nvidia", "NVIDIA Tegra", "/etc/nv_tegra_release and /dev/nvhost-gpu", {"release": tegra[:40]})
            return
    cards = [card for card in pci if card.vendor == "0x10de" and card.class_.startswith("0x03")]
    if cards:
        files.problems.append(
            f"an NVIDIA GPU is on the PCI bus ({cards[0].address}, device {cards[0].device}), but /dev/nvidia* is absent: "
            "its driver is not loaded, or the container was started without the GPU"
        )


def _amd(files: Files) -> Iterator[Device]:
    if not files.exists("dev/kfd"):
        return
    folder = "sys/class/kfd/kfd/topology/nodes"
    gpus = 0
    for node in files.names(folder):
        text = files.text(f"{folder}/{node}/properties", 8192)
        properties = dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
        if int(properties.get("simd_count", "0")) == 0:
            continue  # the host's processors are nodes too
        gpus += 1
        version = int(properties.get("gfx_target_version", "0"))
        # Two decimal digits each for the minor version and the stepping, which are written in hexadecimal: 90402 is
        # gfx942, 90010 is gfx90a.
        target = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        facts = {"gfx": target, "simd_count": properties["simd_count"]}
        facts |= {k: properties[k] for k in ("wave_front_size", "lds_size_in_kb", "device_id") if k in properties}
        if driver := files.text("sys/module/amdgpu/version", 64):
            facts["driver"] = driver
        yield Device("amd", target, f"/dev/kfd and node {node}: simd_count={properties['simd_count']}", facts)
    if not gpus:
        files.problems.append(
            "/dev/kfd is there, but its topology has no node with simd_count > 0: no AMD GPU is usable"
        )


def _intel(files: Files) -> Iterator[Device]:
    for node in files.names("sys/class/drm"):
        if not node.startswith("renderD"):
            continue
        folder = f"sys/class/drm/{node}/device"
        if files.text(f"{folder}/vendor", 32).lower() != "0x8086":
            continue
        uevent = dict(line.partition("=")[::2] for line in files.text(f"{folder}/uevent", 2048).splitlines())
        driver, slot = uevent.get("DRIVER", ""), uevent.get("PCI_SLOT_NAME", "")
        if driver not in ("xe", "i915"):
            continue
        # The GPU of an Intel processor sits at 00:02.0 of its own host bridge; a card is behind a bridge.
        integrated = slot.endswith(":00:02.0") and slot.startswith("0000:")
        facts = {"driver": driver, "pci": slot, "integrated": "yes" if integrated else "no"}
        name = f"Intel GPU {uevent.get('PCI_ID', files.text(f'{folder}/device', 32))}"
        yield Device("intel-gpu", name, f"/sys/class/drm/{node}/device/vendor=0x8086, driver {driver}", facts)


def _tpu(files: Files, pci: list[Pci]) -> Iterator[Device]:
    chips = [card for card in pci if card.vendor == "0x1ae0" and card.device in _TPU_GENERATIONS]
    nodes = [n for n in files.names("dev") if re.fullmatch(r"accel\d+", n)]
    groups = [n for n in files.names("dev/vfio") if n.isdecimal()]
    for i, chip in enumerate(chips):
        generation = _TPU_GENERATIONS[chip.device]
        if not nodes and not groups:
            files.problems.append(
                f"a TPU {generation} is on the PCI bus, but neither /dev/accel* nor /dev/vfio/* is here"
            )
            return
        node = f"/dev/{nodes[i]}" if i < len(nodes) else "/dev/vfio"
        evidence = f"PCI {chip.address}: vendor 0x1ae0, device {chip.device}; {node}"
        yield Device("tpu", f"TPU {generation}", evidence, {"generation": generation, "pci": chip.address})
