"""`ipex/paged-xpu`: IPEX's ops on an Intel GPU. Written by the sources of 2.8.10+xpu; never run on a device."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec

from .availability import ipex_on_xpu
from .xpu import XpuBackend, intel_gpus, shared_refusals

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall

__all__ = ["PagedXpuBackend"]


class PagedXpuBackend(XpuBackend):
    """`PagedAttention.flash_attn_varlen_func` (chunked prefill) over NHD pages."""

    def probe(self) -> Availability:
        """An Intel GPU, and the XPU builds of torch and IPEX that belong together."""
        return self._availability

    @cached_property
    def _availability(self) -> Availability:
        return ipex_on_xpu(intel_gpus())

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """What IPEX's own tests and kernel tables cover."""
        refusals = shared_refusals(spec)
        if spec.block_size not in (64, 128):
            accepts = "IPEX has ragged kernels for pages of 64 and 128 tokens"
            refusals.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=64"))
        if spec.head_size > 256:
            refusals.append(Refusal("head_size", spec.head_size, "IPEX's tests end at 256", "Use torch/sdpa"))
        if spec.window[0] == 0 or (spec.window[1] == 0 and not spec.causal):
            accepts = "IPEX tests windows that are open or have a token on each side that is closed"
            refusals.append(Refusal("window", spec.window, accepts))
        if spec.alibi:
            refusals.append(Refusal("alibi", True, "IPEX's own tests of the op leave it out", "Use torch/sdpa"))
        if spec.sinks:
            refusals.append(Refusal("sinks", True, "IPEX's softmax has no sink", "Use ipex/vllm-xpu or torch/sdpa"))
        if refusals:
            return self.refuse(*refusals)
        return self.accept("by IPEX 2.8.10+xpu's sources; never run on an Intel GPU here")

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One ragged call."""
        from .paged_xpu_call import attend

        return attend(call), None
