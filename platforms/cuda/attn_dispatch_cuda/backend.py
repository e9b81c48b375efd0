"""What the backends of this folder have in common: paged caches on NVIDIA GPUs. Imports no vendor."""

from __future__ import annotations

from functools import cached_property

import attn_dispatch
from attn_dispatch.adapters.torch.backend import VendorBackend
from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .machine import Machine

__all__ = ["FALLBACK_HINT", "UNVERIFIED", "CudaBackend", "shared_refusals"]

UNVERIFIED = "by the vendor's sources and signatures; never run on a GPU by this project"
FALLBACK_HINT = "Ask for triton/paged or torch/sdpa"


def shared_refusals(spec: AttentionSpec, vendor: str) -> list[Refusal]:
    """Refuse what none of the three vendors computes."""
    if spec.dtype in ("float16", "bfloat16"):
        return []
    accepts = f"{vendor} computes in float16 and bfloat16"
    return [Refusal("dtype", spec.dtype, accepts, "Ask for bfloat16, or for triton/paged or torch/sdpa")]


class CudaBackend(VendorBackend):
    """A vendor's attention over a paged cache on an NVIDIA GPU."""

    def __init__(self, name: str, machine: Machine | None = None) -> None:
        super().__init__(name)
        self._machine = machine

    @property
    def device_type(self) -> str:
        """What torch calls the devices that arrays must be on."""
        return "cuda"

    @cached_property
    def machine(self) -> Machine:
        """The machine that `probe` and `verdict` are about: this one, unless another was given."""
        return self._machine or Machine(attn_dispatch.platform)
