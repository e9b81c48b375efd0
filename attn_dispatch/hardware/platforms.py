"""The list of hardware, which stands nowhere else: new hardware is one row here and the module that finds its devices.

A row is found by the platform's name, `by_name("rocm").torch_device`, or by the kind of its devices,
`by_kind("nvidia").name`.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEVICE_KINDS", "NAMES", "PLATFORMS", "Hardware", "by_kind", "by_name"]


class Hardware(NamedTuple):  # half as long to import as a dataclass
    """One kind of hardware with its runtime.

    Attributes:
        name: of the platform, as in `ad.platform.name` and in the names of entry-point groups.
        device_kind: of its accelerators, as in `Device.kind` and a CI job's `needs`; empty for the CPU.
        maker: what a sentence calls one of them.
        torch_device: the type of its devices in torch; "cpu" where torch itself has none.
        torch_build: what torch calls its build for it.
        torch_flavor: what the name of that build's flavor begins with ("cu" of "cu130").
        hiding_variables: the variables that hide devices from its runtime. Of each group the first that is set counts.
    """

    name: str
    device_kind: str
    maker: str
    torch_device: str = "cpu"
    torch_build: str = ""
    torch_flavor: str = "cpu"
    hiding_variables: tuple[tuple[str, ...], ...] = ()


PLATFORMS = (
    Hardware("tpu", "tpu", "TPU"),
    Hardware("cuda", "nvidia", "NVIDIA", "cuda", "CUDA", "cu", (("CUDA_VISIBLE_DEVICES",),)),
    # HIP obeys CUDA_VISIBLE_DEVICES unless its own variable is set.
    Hardware(
        "rocm", "amd", "AMD", "cuda", "ROCm", "rocm",
        (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")),
    ),
    Hardware("xpu", "intel-gpu", "Intel GPU", "xpu", "XPU", "xpu"),
    Hardware("cpu", "", "CPU"),
)  # fmt: skip
"""Every platform; a machine with several kinds of accelerator is the first of these that it has."""

NAMES = tuple(row.name for row in PLATFORMS)
DEVICE_KINDS = tuple(row.device_kind for row in PLATFORMS if row.device_kind)


def by_name(name: str) -> Hardware:
    """Return the platform of this name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


def by_kind(kind: str) -> Hardware:
    """Return the platform whose accelerators are of this kind.

    Raises:
        KeyError: there is none.
    """
    return _BY_KIND[kind]


_BY_NAME = {row.name: row for row in PLATFORMS}
_BY_KIND = {row.device_kind: row for row in PLATFORMS if row.device_kind}
