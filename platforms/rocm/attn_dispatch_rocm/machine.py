"""What a backend asks of a machine: its AMD GPUs by target, and what is installed. Files alone; no vendor."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.backend import Availability
from attn_dispatch.errors import EnvironmentVariableError
from attn_dispatch.hardware import Platform

__all__ = ["TARGET_VARIABLE", "Machine"]

TARGET_VARIABLE = "ATTN_DISPATCH_ROCM_TARGET"
"""`gfx942`: the GPUs' target, where the driver's files do not tell it (under WSL there are none)."""

_TORCH = "Install torch's ROCm build (platforms/rocm/Dockerfile has one)"
_TARGET = re.compile(r"gfx[0-9a-f]{3,5}")


@dataclass(frozen=True)
class Machine:
    """A machine, and the packages that its Python can import.

    Attributes:
        platform: what `attn_dispatch.hardware.detect` found.
        packages: what its Python can import.
    """

    platform: Platform
    packages: Packages = field(default_factory=Packages)

    @property
    def gpus(self) -> list[str]:
        """The AMD GPUs that this process may use, in words."""
        return [str(device) for device in self.platform.devices if device.kind == "amd"]

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of the GPUs here, each once ("gfx942"); none when one of them is not known.

        Raises:
            EnvironmentVariableError: the variable is not like "gfx942".
        """
        if (text := os.environ.get(TARGET_VARIABLE)) is not None:
            if not _TARGET.fullmatch(text.strip()):
                raise EnvironmentVariableError(
                    f"{TARGET_VARIABLE}={text!r} is not a target, as in {TARGET_VARIABLE}=gfx942"
                )
            return (text.strip(),)
        targets = {device.facts.get("gfx", "") for device in self.platform.devices if device.kind == "amd"}
        return () if "" in targets else tuple(sorted(targets))

    def needs_torch(self) -> Availability | None:
        """Say what is missing before any vendor's kernels matter: a GPU, and a torch that was built for it."""
        if not self.gpus:
            return Availability(
                False, "no AMD GPU here (/dev/kfd has no node with simd_count > 0)", self._other_build()
            )
        if not self.packages.folders("torch"):
            return Availability(False, "torch is not installed", _TORCH)
        build = str(self.platform.facts.get("torch_flavor") or "unknown")
        if not build.startswith("rocm"):
            reason = f"the installed torch is a {build} build, the machine has {self.gpus[0]}"
            return Availability(False, reason, _TORCH)
        if not self.targets:
            remedy = f"Set {TARGET_VARIABLE}, as in {TARGET_VARIABLE}=gfx942"
            return Availability(False, f"the target of {self.gpus[0]} is not known", remedy)
        return None

    def _other_build(self) -> str:
        """What to do where the installed torch is for AMD GPUs, and the machine's are others."""
        build = str(self.platform.facts.get("torch_flavor") or "")
        nvidia = [str(device) for device in self.platform.devices if device.kind == "nvidia"]
        if build.startswith("rocm") and nvidia:
            return f"The installed torch is a {build} build: for {nvidia[0]} install torch's CUDA build"
        return ""
