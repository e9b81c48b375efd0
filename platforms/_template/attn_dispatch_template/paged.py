"""`template/paged`: what the backend is, where it runs and what it refuses. Loading this imports no vendor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.adapters.torch.backend import VendorBackend
from attn_dispatch.backend import Availability, Capabilities, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall
    from attn_dispatch.adapters.torch.plan import DevicePlan

    from .paged_call import PagedBatch

__all__ = ["PagedBackend"]


class PagedBackend(VendorBackend):
    """A vendor's attention over a paged cache; the adapter layer writes, adds sinks and clears idle rows."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)
    device_type: ClassVar[str] = "cpu"  # what torch calls the vendor's devices

    def probe(self) -> Availability:
        """Say whether this machine could run it, from files and package metadata alone."""
        version = Packages().version("torch")
        if not version:
            return Availability(False, "torch is not installed", "pip install torch")
        return Availability(True, "attention written out in torch, to be copied and replaced", version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Say yes only to what computes correctly. Every refusal is collected: what was asked, what is accepted."""
        refusals = []
        if spec.alibi:
            refusals.append(Refusal("alibi", True, "the kernel adds no bias", "Ask for torch/sdpa"))
        if spec.logits_soft_cap is not None:
            refusals.append(Refusal("logits_soft_cap", spec.logits_soft_cap, "the kernel has no soft-cap"))
        if spec.kv_cache_dtype != spec.dtype:
            accepts = f"the kernel reads a cache of the layer's own type, {spec.dtype}"
            refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
        return self.refuse(*refusals) if refusals else self.accept()

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """Return the physical order that the kernel reads: here a token's heads lie together."""
        return NHD

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> PagedBatch:
        """Bring the step's batch to a device, in one copy for all layers."""
        from .paged_call import PagedBatch

        return PagedBatch(plan.spec, plan.view, device, paged=paged, max_seq_len=plan.max_seq_len)

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend for one layer: output [T, H, Dv] and LSE f32[T, H]; keys and values have been written."""
        from .paged_call import attend

        return attend(call)
