"""What the two backends for Intel GPUs have in common: an NHD cache, and one ragged op for every sequence.

IPEX has a decode op for XPU too, but over another layout ([N, K, D, B]) and without windows: its ragged op takes
decodes as sequences of one query, so that one cache serves both. vllm-xpu-kernels tells them apart itself.
Nothing here has run on an Intel GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attn_dispatch
from attn_dispatch.adapters.torch.backend import VendorBackend
from attn_dispatch.backend import Capabilities, Refusal
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.device_batch import DeviceBatch
    from attn_dispatch.adapters.torch.plan import DevicePlan

__all__ = ["XpuBackend", "intel_gpus", "shared_refusals"]


def intel_gpus() -> list[str]:
    """Return the Intel GPUs of this machine, described; no device is opened."""
    return [str(device) for device in attn_dispatch.platform.devices if device.kind == "intel-gpu"]


def shared_refusals(spec: AttentionSpec) -> list[Refusal]:
    """Refuse what neither vendor's op has."""
    refusals = []
    if spec.dtype not in ("float16", "bfloat16"):
        refusals.append(Refusal("dtype", spec.dtype, "the op computes in float16 and bfloat16", "Ask for bfloat16"))
    if spec.kv_cache_dtype != spec.dtype:
        accepts = f"only caches of the layer's own type, {spec.dtype}, have been compared with the vendor's sources"
        refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
    if spec.value_head_size != spec.head_size:
        accepts = f"the op takes values to be as wide as keys, {spec.head_size}"
        refusals.append(Refusal("value_head_size", spec.value_head_size, accepts))
    if spec.kind == "encoder":
        refusals.append(Refusal("kind", "encoder", "the op reads pages; an encoder may have none", "Use torch/sdpa"))
    if spec.returns_lse:
        refusals.append(Refusal("returns_lse", True, "the op does not return LSE for paged keys", "Use torch/sdpa"))
    return refusals


class XpuBackend(VendorBackend):
    """An NHD cache, and one ragged call for decodes and prefills alike."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), applies_scales=False)
    device_type: ClassVar[str] = "xpu"
    contiguous_rows = True

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> DeviceBatch:
        """Bring the batch to a device."""
        from attn_dispatch.adapters.torch.device_batch import DeviceBatch

        return DeviceBatch(plan.spec, plan.view, device, paged=paged)
