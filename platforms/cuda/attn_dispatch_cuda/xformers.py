"""`cuda/xformers`: xFormers' split-K kernel over paged caches, through its paged block-diagonal masks.

Loading this imports no vendor. Written against xformers 0.0.35: its Python, its Triton kernel. Never run on a GPU here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.backend import Availability, Capabilities, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout

from .backend import FALLBACK_HINT, UNVERIFIED, CudaBackend, shared_refusals
from .gpus import sm
from .machine import interpreted

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall

    from .xformers_call import XformersBatch

__all__ = ["XformersBackend", "interpreted"]

_HEAD_SIZES = (16, 32, 64, 128, 256, 512)
_TRITONS = ("triton", "pytorch-triton", "triton-windows")
_NO_BLOCK_POINTERS = (3, 9)
"""The Triton that ended what xFormers' kernel reads its tiles through (xFormers up to 0.0.35)."""


class XformersBackend(CudaBackend):
    """`triton_splitK`: decodes, and prompts cut into pieces of at most 16 queries."""

    # Its masks keep lengths on the host: a captured graph would not see new ones.
    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), fixed_plans=False)

    @property
    def device_type(self) -> str:
        """The CPU, when Triton interprets its kernels there."""
        return "cpu" if interpreted() else "cuda"

    def probe(self) -> Availability:
        """Say whether there is a GPU, torch's CUDA build, xFormers, Triton, and no package in the way."""
        version = self.machine.packages.version("xformers")
        missing = None if interpreted() else self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if not self.machine.packages.folders("xformers"):
            return Availability(False, "xFormers is not installed", "pip install xformers")
        if not self.machine.packages.folders("triton"):
            return Availability(False, f"xFormers {version} without Triton", "pip install triton", version)
        triton = self.machine.packages.version(*_TRITONS)
        if (numbers := re.match(r"(\d+)\.(\d+)", triton)) and (int(numbers[1]), int(numbers[2])) >= _NO_BLOCK_POINTERS:
            reason = f"xFormers {version} uses block pointers, which Triton {triton} no longer has"
            return Availability(False, reason, "Install a torch with Triton 3.8 or older", version)
        folders = self.machine.packages.folders("flash_attn")
        if folders and not any((folder / "flash_attn_interface.py").exists() for folder in folders):
            reason = f"xFormers {version} does not import beside a flash_attn that is FlashAttention 4 alone"
            remedy = "Install flash-attn 2 beside it, or uninstall flash-attn-4"
            return Availability(False, reason, remedy, version)
        if interpreted():
            reason = "TRITON_INTERPRET is set: xFormers' kernel runs in Triton's interpreter, on the CPU"
            return Availability(True, reason, version=version, evidence="simulated on CPU")
        for capability in self.machine.capabilities:
            if capability < (8, 0):
                reason = f"xFormers' kernel is for sm_80 and later, {self.machine.gpus[0]} is {sm(capability)}"
                return Availability(False, reason, FALLBACK_HINT, version)
        return Availability(True, f"xFormers {version} on {self.machine.gpus[0]}; {UNVERIFIED}", "", version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse what its paged masks cannot say: they are causal or not, nothing else."""
        refusals = shared_refusals(spec, "xFormers")
        if spec.kv_cache_dtype != spec.dtype:
            accepts = f"xFormers reads a paged cache of the layer's own type, {spec.dtype}"
            refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
        if spec.block_size % 64:
            accepts = "xFormers' kernel reads pages of multiples of 64 tokens"
            refusals.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=64"))
        if spec.head_size not in _HEAD_SIZES:
            accepts = f"xFormers' kernel is for {', '.join(map(str, _HEAD_SIZES))}"
            refusals.append(Refusal("head_size", spec.head_size, accepts, FALLBACK_HINT))
        if spec.value_head_size != spec.head_size:
            accepts = f"xFormers' kernel takes values as wide as keys, {spec.head_size}"
            refusals.append(Refusal("value_head_size", spec.value_head_size, accepts, FALLBACK_HINT))
        if spec.has_window:
            accepts = "xFormers has no paged mask with a window"
            refusals.append(Refusal("window", spec.window, accepts, "Ask for cuda/flash-attention or cuda/flashinfer"))
        if spec.logits_soft_cap is not None:
            accepts = "xFormers has no soft-capping"
            refusals.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, "Ask for cuda/flashinfer"))
        if spec.alibi:
            accepts = "xFormers' paged masks carry no bias"
            refusals.append(Refusal("alibi", True, accepts, "Ask for cuda/flash-attention with FlashAttention 2"))
        if spec.kind == "encoder":
            accepts = "xFormers' kernel reads pages, or rows without a mask of its own; an encoder may have no pages"
            refusals.append(Refusal("kind", spec.kind, accepts, "Ask for cuda/flash-attention or cuda/flashinfer"))
        if interpreted():
            refusals += _refused_by_interpreter(spec)
            return (
                self.refuse(*refusals)
                if refusals
                else self.accept("runs in Triton's interpreter: for checking, not for speed")
            )
        return self.refuse(*refusals) if refusals else self.accept(UNVERIFIED)

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> XformersBatch:
        """Make the masks."""
        from .xformers_call import XformersBatch

        return XformersBatch(plan.spec, plan.view, device, paged=paged)

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call for each length of pieces."""
        batch: XformersBatch = call.batch
        return batch.attend(call)


def _refused_by_interpreter(spec: AttentionSpec) -> list[Refusal]:
    refusals = []
    remedy = "Unset TRITON_INTERPRET, on a GPU"
    if spec.dtype == "bfloat16":
        refusals.append(Refusal("dtype", spec.dtype, "Triton's interpreter multiplies bfloat16 wrongly", remedy))
    if spec.head_size > 64:
        accepts = "at most 64 in the interpreter: for wider heads xFormers asks a GPU which tiles fit it"
        refusals.append(Refusal("head_size", spec.head_size, accepts, remedy))
    return refusals
