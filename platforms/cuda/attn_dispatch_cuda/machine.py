"""What a backend asks of a machine: its GPUs, and what is installed, read from files. No vendor is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.backend import Availability
from attn_dispatch.hardware import Platform

from .gpus import Capability, capability_from, capability_of

__all__ = ["CAPABILITY_VARIABLE", "Machine", "interpreted"]

CAPABILITY_VARIABLE = "ATTN_DISPATCH_CUDA_CAPABILITY"
"""`9.0`: the compute capability of the GPUs, where neither the driver's files nor this package know the model."""


@dataclass(frozen=True)
class Machine:
    """A machine, and where its Python looks for packages.

    Attributes:
        platform: what `attn_dispatch.hardware.detect` found.
        search: folders in which packages are looked for (None: as `import` would).
    """

    platform: Platform
    search: Sequence[str] | None = None

    @property
    def packages(self) -> Packages:
        """What its Python can import."""
        return Packages(self.search)

    @property
    def gpus(self) -> list[str]:
        """The NVIDIA GPUs that this process may use, in words."""
        return [str(device) for device in self.platform.devices if device.kind == "nvidia"]

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """The compute capability of every model of GPU here, each once; none when one of them is not known.

        The variable comes first, then the names in the driver's files, then torch, if this process uses its CUDA
        already. Nothing is initialised to find out.
        """
        if (text := os.environ.get(CAPABILITY_VARIABLE)) is not None:
            return (capability_from(text, CAPABILITY_VARIABLE),)
        known = {capability_of(device) for device in self.platform.devices if device.kind == "nvidia"}
        return tuple(sorted(c for c in (self._from_torch() if None in known else known) if c is not None))

    def _from_torch(self) -> set[Capability]:
        torch = sys.modules.get("torch")
        if self.search is not None or torch is None or not torch.cuda.is_initialized():
            return set()
        return {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}

    def needs_torch(self) -> Availability | None:
        """Say what is missing before any vendor's kernels matter: a GPU, and a torch that was built for it."""
        if not self.gpus:
            return Availability(False, "no NVIDIA GPU here (/dev/nvidia* absent)")
        if not self.packages.folders("torch"):
            return Availability(False, "torch is not installed", "pip install torch")
        build = str(self.platform.facts.get("torch_flavor") or "unknown")
        if not build.startswith("cu"):
            reason = f"the installed torch is a {build} build, the machine has {self.gpus[0]}"
            return Availability(False, reason, "Install torch's CUDA build")
        if not self.capabilities:
            reason = f"the compute capability of {self.gpus[0]} is not known"
            return Availability(False, reason, f"Set {CAPABILITY_VARIABLE}, as in {CAPABILITY_VARIABLE}=9.0")
        return None


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels; it reads this when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
