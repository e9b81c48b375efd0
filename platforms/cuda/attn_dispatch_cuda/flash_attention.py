"""`cuda/flash-attention`: FlashAttention 2, 3 or 4, whichever is installed and fits the GPU.

Loading this imports no vendor. Written against the vendors' real packages (`flash_versions`); never run on a GPU here.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from attn_dispatch.adapters.environment import choice
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout
from attn_dispatch.errors import BackendRefusedError

from .backend import UNVERIFIED, CudaBackend
from .flash_versions import Installed, choose, installed
from .gpus import Capability, sm

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall

    from .flash_attention_call import FlashBatch

__all__ = ["FP8_QUERIES_VARIABLE", "FlashAttentionBackend"]

FP8_QUERIES_VARIABLE = "ATTN_DISPATCH_CUDA_FP8_QUERIES"
"""`1`: FlashAttention 3 may round queries to fp8, which is how it reads an fp8 cache."""

_INSTALL = (
    "pip install flash-attn (FlashAttention 2), flash-attn-4 (Hopper, Blackwell), or build hopper/ of its sources"
)


_PLAIN = AttentionSpec(num_heads=8, num_kv_heads=8, head_size=128, block_size=256)
"""A layer that every version computes on the GPUs that it has kernels for."""


class FlashAttentionBackend(CudaBackend):
    """One ragged call of FlashAttention over NHD pages, for decodes, prefills and encoders alike."""

    def probe(self) -> Availability:
        """Say whether there is a GPU, torch's CUDA build, and a FlashAttention that has kernels for the GPU."""
        versions = ", ".join(dict.fromkeys(map(str, self._installed)))
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, versions)
        if not self._installed:
            return Availability(False, "no FlashAttention is installed", _INSTALL)
        for capability in self.machine.capabilities:
            version, refusals = choose(self._installed, capability, _PLAIN, fp8_queries=False)
            if version is None:
                return Availability(False, f"{versions}: {refusals[0]}", _INSTALL, versions)
        return Availability(True, f"{versions} on {self.machine.gpus[0]}; {UNVERIFIED}", version=versions)

    def import_vendor(self) -> None:
        """Import the version that computes plain layers on each of this machine's GPUs; see `Backend.import_vendor`.

        Raises:
            BackendLoadError: it is installed, but does not import (built for another torch, say).
        """
        from .flash_attention_call import functions_of

        for capability in self.machine.capabilities:
            version, _ = choose(self._installed, capability, _PLAIN, fp8_queries=False)
            if version is not None:
                functions_of(version).load()

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Say what the installed versions compute on this machine's GPUs, each of them."""
        capabilities = self.machine.capabilities
        if not self._installed or not capabilities:
            lack = "no FlashAttention is installed" if capabilities else "the GPU's compute capability is not known"
            return self.refuse(Refusal("", None, lack, self.probe().remedy or _INSTALL))
        chosen: list[str] = []
        refusals: list[Refusal] = []
        for capability in capabilities:
            version, reasons = choose(self._installed, capability, spec, fp8_queries=_fp8_queries())
            refusals += [refusal for refusal in reasons if refusal not in refusals]
            if version is not None:
                chosen.append(f"{version} on {sm(capability)}")
        return self.refuse(*refusals) if refusals else self.accept(f"{', '.join(chosen)}; {UNVERIFIED}")

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def version_for(self, spec: AttentionSpec, capability: Capability) -> Installed:
        """Return the version that computes a spec on a GPU.

        Raises:
            BackendRefusedError: none of those installed does.
        """
        version = self._chosen.get((spec, capability))
        if version is None:
            version, refusals = choose(self._installed, capability, spec, fp8_queries=_fp8_queries())
            if version is None:
                raise BackendRefusedError(f"{self.name} on {sm(capability)}: {'; '.join(map(str, refusals))}")
            self._chosen[spec, capability] = version
        return version

    @cached_property
    def _installed(self) -> list[Installed]:
        return installed(self.machine)

    @cached_property
    def _chosen(self) -> dict[tuple[AttentionSpec, Capability], Installed]:
        return {}

    def capability_of(self, device: torch.device) -> Capability:
        """Return a GPU's compute capability, by the device itself: a machine may have several models."""
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        return major, minor

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> FlashBatch:
        """Choose the version by the device."""
        from .flash_attention_call import FlashBatch, functions_of

        capability = self.capability_of(device)
        functions = functions_of(self.version_for(plan.spec, capability))
        return FlashBatch(plan, device, paged=paged, functions=functions, capability=capability)

    def sinks_inside(self, call: DeviceCall) -> bool:
        """FlashAttention 4 takes sinks; vLLM's 3 those that are bfloat16, of at most 64 heads."""
        batch: FlashBatch = call.batch
        return batch.functions.takes_sinks(call)

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of the version that the batch was made for."""
        batch: FlashBatch = call.batch
        return batch.functions.attend(call)


def _fp8_queries() -> bool:
    return choice(FP8_QUERIES_VARIABLE, "0", "1") == "1"
