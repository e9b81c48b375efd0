"""`ipex/paged-xpu`: IPEX's ops on an Intel GPU. Written by the sources of 2.8.10+xpu; never run on a device."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from attn_dispatch.backend import Availability, Capabilities, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionSpec, LayerParameters
from attn_dispatch_ipex import availability, vendor
from attn_dispatch_ipex.varlen_xpu import OnDevice, VarlenXpuBackend, XpuPlan, intel_gpus, shared_refusals

__all__ = ["PagedXpuBackend"]


class PagedXpuBackend(VarlenXpuBackend):
    """`PagedAttention.reshape_and_cache_flash` and `.flash_attn_varlen_func` (chunked prefill) over NHD pages."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), applies_scales=False)
    module = "intel_extension_for_pytorch"
    remedy = availability.INSTALL_XPU

    def probe(self) -> Availability:
        """An Intel GPU, and the XPU builds of torch and IPEX that belong together."""
        return self._availability

    @cached_property
    def _availability(self) -> Availability:
        return availability.ipex_on_xpu(intel_gpus())

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """What IPEX's own tests and kernel tables cover."""
        no = shared_refusals(spec)
        if spec.block_size not in (64, 128):
            accepts = "IPEX has ragged kernels for pages of 64 and 128 tokens"
            no.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=64"))
        if spec.head_size > 256:
            no.append(Refusal("head_size", spec.head_size, "IPEX's tests end at 256", "Use torch/sdpa"))
        if spec.window[0] == 0 or (spec.window[1] == 0 and not spec.causal):
            accepts = "IPEX tests windows that are open or have a token on each side that is closed"
            no.append(Refusal("window", spec.window, accepts))
        if spec.alibi:
            no.append(Refusal("alibi", True, "IPEX's own tests of the op leave it out", "Use torch/sdpa"))
        if spec.sinks:
            no.append(Refusal("sinks", True, "IPEX's softmax has no sink", "Use ipex/vllm-xpu or torch/sdpa"))
        return self.refuse(*no) if no else self.accept("by IPEX 2.8.10+xpu's sources; never run on an Intel GPU here")

    @cached_property
    def _paged(self) -> Any:
        return vendor.load(self.module, self.remedy).llm.modules.PagedAttention

    def write(self, k: Array, v: Array, key: Array, value: Array, slots: Array) -> None:
        """Store rows in slots (the op skips negative ones; there are none)."""
        self._paged.reshape_and_cache_flash(*self.write_arguments(k, v, key, value, slots))

    def attend(
        self, plan: XpuPlan, at: OnDevice, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array
    ) -> None:
        """One ragged call."""
        positional, named = self.attend_arguments(plan, at, q, key, value, out)
        self._paged.flash_attn_varlen_func(*positional, **named)

    @staticmethod
    def write_arguments(k: Array, v: Array, key: Array, value: Array, slots: Array) -> tuple[Any, ...]:
        """Return what `reshape_and_cache_flash` is given."""
        return (k, v, key, value, slots)

    @staticmethod
    def attend_arguments(
        plan: XpuPlan, at: OnDevice, q: Array, key: Array, value: Array, out: Array
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what `flash_attn_varlen_func` is given: by position what IPEX's two builds name differently."""
        spec, step = plan.spec, plan.varlen
        assert step is not None
        positional = (out, q, key, value, at.query_start, at.kv_start, step.longest_query, step.longest)
        named = {
            "window_size_left": spec.window[0],
            "window_size_right": spec.window[1],
            "softcap": spec.logits_soft_cap or -1.0,
        }
        return (*positional, spec.scale, spec.causal, at.tables, None), named
