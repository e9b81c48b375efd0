"""What a backend asks of a machine: its GPUs, and what is installed, read from files. No vendor is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from attn_dispatch.backend import Availability
from attn_dispatch.hardware import Platform

from .gpus import Capability, capability_of, from_text

__all__ = ["CAPABILITY_VARIABLE", "Machine"]

CAPABILITY_VARIABLE = "ATTN_DISPATCH_CUDA_CAPABILITY"
"""`9.0`: the compute capability of the GPUs, where neither the driver's files nor this package know the model."""


@dataclass(frozen=True)
class Machine:
    """A machine, and where its Python looks for packages.

    Attributes:
        platform: what `attn_dispatch.hardware.detect` found.
        search: folders in which packages are looked for (None: `sys.path`).
    """

    platform: Platform
    search: Sequence[str] | None = None

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
            return (from_text(text, CAPABILITY_VARIABLE),)
        found = {capability_of(device) for device in self.platform.devices if device.kind == "nvidia"}
        if None in found:
            asked = self._from_torch()
            return tuple(sorted(asked))
        return tuple(sorted(c for c in found if c is not None))

    def _from_torch(self) -> set[Capability]:
        torch = sys.modules.get("torch")
        if self.search is not None or torch is None or not torch.cuda.is_initialized():
            return set()
        return {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}

    def locations(self, module: str) -> list[Path]:
        """Return the folders of a top-level package (or the file of a module), without importing it."""
        spec = PathFinder.find_spec(module, None if self.search is None else list(self.search))
        if spec is None:
            return []
        if spec.submodule_search_locations is not None:
            return [Path(folder) for folder in spec.submodule_search_locations]
        return [] if spec.origin is None else [Path(spec.origin)]

    def version(self, distribution: str) -> str | None:
        """Return the version of an installed distribution."""
        path = sys.path if self.search is None else list(self.search)
        found = next(iter(metadata.distributions(name=distribution, path=path)), None)
        return found.version if found else None

    def needs_torch(self) -> Availability | None:
        """Say what is missing before any vendor's kernels matter: a GPU, and a torch that was built for it."""
        if not self.gpus:
            return Availability(False, "no NVIDIA GPU here (/dev/nvidia* absent)")
        if not self.locations("torch"):
            return Availability(False, "torch is not installed", "pip install torch")
        build = str(self.platform.facts.get("torch_flavor") or "unknown")
        if not build.startswith("cu"):
            reason = f"the installed torch is a {build} build, the machine has {self.gpus[0]}"
            return Availability(False, reason, "Install torch's CUDA build")
        if not self.capabilities:
            reason = f"the compute capability of {self.gpus[0]} is not known"
            return Availability(False, reason, f"Set {CAPABILITY_VARIABLE}, as in {CAPABILITY_VARIABLE}=9.0")
        return None
