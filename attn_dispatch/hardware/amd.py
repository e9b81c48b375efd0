"""AMD GPUs: the nodes of the compute driver's topology that have vector units.

`/dev/kfd` alone says nothing: machines whose GPU it cannot drive have it too, with nodes for their CPUs only.
"""

from __future__ import annotations

from .device import Device
from .nvidia import WSL_NODE
from .tree import Tree

__all__ = ["driver", "find", "target"]

_NODES = "sys/class/kfd/kfd/topology/nodes"
_VENDOR_ID = 0x1002
_WSL_LIBRARIES = ("opt/rocm/lib/librocdxg.so", "opt/rocm/lib/librocdxg.so.1")

# Targets that LLVM's AMDGPU user guide lists as APU: GPUs that are a part of a CPU.
# fmt: off
_APUS = frozenset({
    "gfx700", "gfx703", "gfx705", "gfx801", "gfx810", "gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035",
    "gfx1036", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153",
})
# fmt: on


def driver(tree: Tree) -> str | None:
    """Return the version of the kernel driver, where it is not the kernel's own."""
    return tree.word("sys/module/amdgpu/version") or None


def target(version: int) -> str:
    """Return the compiler's name for a GPU: 90402 is gfx942 (major, minor, stepping; the last two hexadecimal)."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def find(tree: Tree) -> list[Device]:
    """Return the AMD GPUs that this process can open."""
    if not tree.exists("dev/kfd"):
        return _wsl(tree)
    version = driver(tree)
    found = [device for node in tree.names(_NODES) if (device := _device(tree, node, version)) is not None]
    if found:
        tree.check_access("dev/kfd", "Add the user to the group render")
    elif nodes := tree.names(_NODES):
        tree.problems.append(f"/dev/kfd: none of its {len(nodes)} nodes has simd_count > 0, so there is no GPU to use")
    return found


def _device(tree: Tree, node: str, version: str | None) -> Device | None:
    name = f"{_NODES}/{node}/properties"
    text = tree.read(name)
    if text is None:
        return None
    values: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        try:
            values[key] = int(value)
        except ValueError:
            tree.problems.append(f"/{name}: {line!r} is not a name and a number")
    if values.get("simd_count", 0) <= 0:
        return None
    gfx = target(values.get("gfx_target_version", 0))
    facts = {"gfx": gfx, "integrated": "yes" if gfx in _APUS else "no"}
    facts |= {key: str(values[key]) for key in ("simd_count", "wave_front_size", "lds_size_in_kb") if key in values}
    if "device_id" in values:
        facts["pci"] = f"{values.get('vendor_id', _VENDOR_ID):04x}:{values['device_id']:04x}"
    if "location_id" in values:
        place = values["location_id"]
        bus, device, function = place >> 8 & 0xFF, place >> 3 & 0x1F, place & 7
        facts["slot"] = f"{values.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"
    if minor := values.get("drm_render_minor"):
        facts["node"] = f"/dev/dri/renderD{minor}"
    if version:
        facts["driver"] = version
    return Device("amd", gfx, f"/{name}: simd_count {values['simd_count']}", facts)


def _wsl(tree: Tree) -> list[Device]:
    """Return the GPU behind Windows' driver, where ROCm's bridge to it is installed; its target is not told."""
    if not tree.exists(WSL_NODE):
        return []
    for library in _WSL_LIBRARIES:
        if tree.exists(library):
            facts = {"node": f"/{WSL_NODE}", "library": f"/{library}", "wsl": "yes"}
            return [Device("amd", "GPU of Windows", f"/{WSL_NODE} with /{library}", facts)]
    return []
