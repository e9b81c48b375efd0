"""What the backends of this folder have in common: a vendor's package on AMD GPUs, asked for each kind of GPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attn_dispatch
from attn_dispatch.adapters.torch.backend import VendorBackend
from attn_dispatch.backend import Availability, Capabilities, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout

from . import layouts
from .machine import Machine

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall

    from .vendor_function import VendorFunction

__all__ = ["FALLBACK", "FALLBACK_HINT", "KNOWN_LAYOUTS", "UNVERIFIED", "Installed", "RocmBackend", "dtype_refusals"]

UNVERIFIED = "by the vendor's sources; never run on an AMD GPU by this project"
FALLBACK = "triton/paged or torch/sdpa"
FALLBACK_HINT = f"Ask for {FALLBACK}"

KNOWN_LAYOUTS = (layouts.VLLM_X4, layouts.VLLM_X8, layouts.VLLM_X16)
"""Registered with the backends, so that a cache of theirs can be converted once one of them is loaded."""


@dataclass(frozen=True)
class Installed:
    """A vendor's package on this machine.

    Attributes:
        vendor: its name, for people.
        version: of the distribution.
        folder: of the package.
        lacks: functions or libraries that it has not, or not as called here, and what was found.
    """

    vendor: str
    version: str
    folder: Path
    lacks: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.vendor} {self.version}".strip()


def dtype_refusals(spec: AttentionSpec, vendor: str) -> list[Refusal]:
    """Refuse types that no vendor here computes with."""
    if spec.dtype in ("float16", "bfloat16"):
        return []
    accepts = f"{vendor} computes in float16 and bfloat16"
    return [Refusal("dtype", spec.dtype, accepts, f"Ask for bfloat16, or ask for {FALLBACK}")]


class RocmBackend(VendorBackend):
    """A vendor's attention over paged caches on AMD GPUs (which torch calls "cuda")."""

    capabilities = Capabilities(libraries=("torch",), fixed_plans=True)
    device_type = "cuda"
    contiguous_rows = True

    vendor: ClassVar[str]
    """The package's name, for people."""
    install: ClassVar[str]
    """How to install it."""
    plain: ClassVar[AttentionSpec]
    """A layer that it computes on every GPU that it is for."""

    def __init__(self, name: str, machine: Machine | None = None) -> None:
        super().__init__(name)
        self._machine = machine

    @property
    def machine(self) -> Machine:
        """The machine that `probe` and `verdict` are about: this one, unless another was given."""
        return self._machine or Machine(attn_dispatch.platform)

    @property
    @abstractmethod
    def installed(self) -> Installed | None:
        """The vendor's package, found without importing it."""

    @abstractmethod
    def refusals(self, package: Installed, target: str, spec: AttentionSpec) -> list[Refusal]:
        """Return why the package cannot compute a spec on one kind of GPU; nothing when it can."""

    def describe(self, package: Installed, spec: AttentionSpec) -> str:
        """Return what computes a spec on this machine, for people."""
        return f"{package} on {', '.join(self.machine.targets)}"

    def probe(self) -> Availability:
        """Look for an AMD GPU that the vendor's package is for, torch's ROCm build, and that package."""
        package = self.installed
        version = str(package) if package else ""
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if package is None:
            return Availability(False, f"{self.vendor} is not installed", self.install)
        for target in self.machine.targets:
            for refusal in self.refusals(package, target, self.plain):
                return Availability(False, f"{package}: {refusal}", refusal.remedy or self.install, version)
        return Availability(True, f"{package} on {self.machine.gpus[0]}; {UNVERIFIED}", version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Say what the installed package computes on this machine's GPUs, each of them."""
        package, targets = self.installed, self.machine.targets
        if package is None or not targets:
            missing = "the GPU's target is not known" if package else f"{self.vendor} is not installed"
            return self.refuse(Refusal("", None, missing, self.probe().remedy or self.install))
        refusals = [refusal for target in targets for refusal in self.refusals(package, target, spec)]
        if refusals:
            return self.refuse(*dict.fromkeys(refusals))
        return self.accept(f"{self.describe(package, spec)}; {UNVERIFIED}")

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def target_of(self, device: torch.device) -> str:
        """Return a GPU's target: the machine's, or of several what torch says of this one."""
        import torch

        targets = self.machine.targets
        if len(targets) == 1 or device.type != "cuda":
            return targets[0] if targets else ""
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]

    @abstractmethod
    def function_for(self, batch: Any) -> VendorFunction:
        """Return the vendor's function that computes a batch, which is one of `device_batch`."""

    def sinks_inside(self, call: DeviceCall) -> bool:
        """Whether the function that computes this batch takes sinks."""
        return self.function_for(call.batch).takes_sinks

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call the vendor's function; see `VendorFunction.attend`."""
        return self.function_for(call.batch).attend(call)
