"""`ipex/vllm-xpu`: the kernels that vLLM moved to from IPEX on Intel GPUs, called without vLLM.

Written against the wheel of vllm-xpu-kernels 0.1.16.2 (its Python, the schemas in its libraries) and the project's
sources; never run on a device here.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec

from .availability import vllm_on_xpu
from .xpu import XpuBackend, intel_gpus, shared_refusals

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall

__all__ = ["VllmXpuBackend"]

_HEAD_SIZES = (64, 96, 128, 192, 256, 512)


class VllmXpuBackend(XpuBackend):
    """`flash_attn_varlen_func` over NHD pages."""

    def probe(self) -> Availability:
        """An Intel GPU, and the wheel."""
        return self._availability

    @cached_property
    def _availability(self) -> Availability:
        return vllm_on_xpu(intel_gpus())

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse what the op takes as an argument and then drops, and sizes that it has no kernel for."""
        refusals = shared_refusals(spec)
        if spec.block_size not in (16, 32) and spec.block_size % 64:
            accepts = "the decode kernels have pages of 16, 32 and multiples of 64 tokens"
            refusals.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=64"))
        if spec.head_size not in _HEAD_SIZES:
            accepts = f"the kernels are for {', '.join(map(str, _HEAD_SIZES))}"
            refusals.append(Refusal("head_size", spec.head_size, accepts, "Use torch/sdpa"))
        if spec.window == (0, 0):
            accepts = "the vendor's tests have none of one token"
            refusals.append(Refusal("window", spec.window, accepts, "Use torch/sdpa"))
        unused = "the op has the argument and does nothing with it"
        if spec.logits_soft_cap is not None:
            refusals.append(Refusal("logits_soft_cap", spec.logits_soft_cap, unused, "Use torch/sdpa"))
        if spec.alibi:
            refusals.append(Refusal("alibi", True, unused, "Use torch/sdpa"))
        if refusals:
            return self.refuse(*refusals)
        return self.accept("by the signatures of vllm-xpu-kernels 0.1.16.2; never run on an Intel GPU here")

    def sinks_inside(self, call: DeviceCall) -> bool:
        """The op takes them."""
        return True

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One ragged call; the vendor tells decodes and prefills apart."""
        from .vllm_xpu_call import attend

        return attend(call), None
