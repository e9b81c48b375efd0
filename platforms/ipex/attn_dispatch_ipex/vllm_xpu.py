"""`ipex/vllm-xpu`: the kernels that vLLM moved to from IPEX on Intel GPUs, called without vLLM.

Written against the wheel of vllm-xpu-kernels 0.1.16.2 (its Python, the schemas in its libraries) and the project's
sources; never run on a device here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from attn_dispatch.backend import Availability, Capabilities, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionSpec, LayerParameters
from attn_dispatch_ipex import availability, vendor
from attn_dispatch_ipex.varlen_xpu import OnDevice, VarlenXpuBackend, XpuPlan, intel_gpus, shared_refusals

__all__ = ["VllmXpuBackend"]

_HEAD_SIZES = (64, 96, 128, 192, 256, 512)


class VllmXpuBackend(VarlenXpuBackend):
    """`flash_attn_varlen_func` over NHD pages; writing by the op `reshape_and_cache_flash`."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), applies_scales=False)
    module = "vllm_xpu_kernels"
    remedy = availability.INSTALL_VLLM_XPU

    def probe(self) -> Availability:
        """An Intel GPU, and the wheel."""
        return self._availability

    @cached_property
    def _availability(self) -> Availability:
        return availability.vllm_on_xpu(intel_gpus())

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse what the op takes as an argument and then drops, and sizes that it has no kernel for."""
        no = shared_refusals(spec)
        if spec.block_size not in (16, 32) and spec.block_size % 64:
            accepts = "the decode kernels have pages of 16, 32 and multiples of 64 tokens"
            no.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=64"))
        if spec.head_size not in _HEAD_SIZES:
            accepts = f"the kernels are for {', '.join(map(str, _HEAD_SIZES))}"
            no.append(Refusal("head_size", spec.head_size, accepts, "Use torch/sdpa"))
        if spec.window == (0, 0):
            no.append(Refusal("window", spec.window, "the vendor's tests have none of one token", "Use torch/sdpa"))
        if spec.logits_soft_cap is not None:
            accepts = "the op has the argument and does nothing with it"
            no.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, "Use torch/sdpa"))
        if spec.alibi:
            no.append(Refusal("alibi", True, "the op has the argument and does nothing with it", "Use torch/sdpa"))
        if no:
            return self.refuse(*no)
        return self.accept("by the signatures of vllm-xpu-kernels 0.1.16.2; never run on an Intel GPU here")

    @cached_property
    def _write(self) -> Any:
        vendor.load("vllm_xpu_kernels._C", self.remedy)  # registers the op
        return vendor.load("torch", self.remedy).ops._C_cache_ops.reshape_and_cache_flash

    def write(self, k: Array, v: Array, key: Array, value: Array, slots: Array) -> None:
        """Store rows in slots."""
        one = k.new_ones((), dtype=vendor.load("torch", self.remedy).float32)
        self._write(*self.write_arguments(k, v, key, value, slots, one))

    def attend(
        self, plan: XpuPlan, at: OnDevice, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array
    ) -> None:
        """One ragged call; the vendor tells decodes and prefills apart."""
        interface = vendor.load("vllm_xpu_kernels.flash_attn_interface", self.remedy)
        interface.flash_attn_varlen_func(**self.attend_arguments(plan, at, q, key, value, layer, out))

    @staticmethod
    def write_arguments(k: Array, v: Array, key: Array, value: Array, slots: Array, one: Array) -> tuple[Any, ...]:
        """Return what the op is given: slots i64, and scales as tensors."""
        return (k, v, key, value, slots, "auto", one, one)

    def attend_arguments(
        self, plan: XpuPlan, at: OnDevice, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array
    ) -> dict[str, Any]:
        """Return what `flash_attn_varlen_func` is given. Sinks are of the query's type."""
        spec, step = plan.spec, plan.varlen
        assert step is not None
        sinks = None
        if layer.sinks is not None:
            host = layer.sinks
            sinks = layer.memoize((self.name, str(q.device)), lambda: q.new_tensor(host.tolist()))
        return {
            "q": q,
            "k": key,
            "v": value,
            "max_seqlen_q": step.longest_query,
            "cu_seqlens_q": at.query_start,
            "max_seqlen_k": step.longest,
            "seqused_k": at.lens,
            "softmax_scale": spec.scale,
            "causal": spec.causal,
            "window_size": list(spec.window),
            "block_table": at.tables,
            "s_aux": sinks,
            "out": out,
        }
