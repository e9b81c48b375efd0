"""`ipex/paged-cpu`: IPEX's paged ops on the CPU. What it accepts and refuses; the vendor is imported by `cpu_ops`."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec
from attn_dispatch_ipex import availability
from attn_dispatch_ipex.steps import PARTITION_TOKENS, route

__all__ = ["PagedCpuBackend"]

DTYPES = ("float32", "bfloat16", "float16")
E5M2 = "float8_e5m2"
SMALLEST_FP8_HEAD = 31
SMALLEST_SCALE = 2.0**-126
"""The least normal float32."""


class PagedCpuBackend(Backend):
    """Attention by `ipex.llm.modules.PagedAttention` over a cache in HND order.

    Per-tensor scales of an fp8 cache are ignored by the ops and applied here: the keys' belongs to the scores, as the
    softmax's scale does, the values' to the output.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)

    def probe(self) -> Availability:
        """Versions of torch and IPEX that belong together, on a CPU with AVX2."""
        return self._availability

    @cached_property
    def _availability(self) -> Availability:
        import attn_dispatch  # the door: it may be what is importing this module

        return availability.ipex_on_cpu(attn_dispatch.platform.facts)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse what the ops lack, what they compute wrongly in silence, and what crashes them."""
        no: list[Refusal] = []
        if spec.dtype not in DTYPES:
            no.append(Refusal("dtype", spec.dtype, f"IPEX computes in {', '.join(DTYPES)}", "Ask for float32"))
        if spec.kv_cache_dtype != spec.dtype and (spec.kv_cache_dtype != E5M2 or spec.dtype == "float16"):
            accepts = "IPEX stores the layer's own type, or float8_e5m2 under float32 and bfloat16"
            no.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
        if spec.kv_cache_dtype == E5M2 and spec.head_size < SMALLEST_FP8_HEAD:
            accepts = f"IPEX reads fp8 heads of fewer than {SMALLEST_FP8_HEAD} elements beyond their end, and crashes"
            no.append(Refusal("head_size, kv_cache_dtype", (spec.head_size, E5M2), accepts, f"Store {spec.dtype}"))
        if spec.value_head_size != spec.head_size:
            accepts = f"IPEX takes values to be as wide as keys, {spec.head_size}"
            no.append(Refusal("value_head_size", spec.value_head_size, accepts))
        if spec.sinks:
            no.append(Refusal("sinks", True, "IPEX's softmax has no sink", "Use cpu/numba or torch/sdpa"))
        if spec.returns_lse:
            no.append(Refusal("returns_lse", True, "IPEX's ops return no LSE", "Use cpu/numba or torch/sdpa"))
        if spec.scale < SMALLEST_SCALE:
            accepts = "IPEX scales what it has masked, and minus infinity times this is not minus infinity"
            no.append(Refusal("scale", spec.scale, accepts, "Scale the queries instead"))
        ops = route(spec, spec.block_size, spec.kv_cache_dtype)
        if not ops.varlen:
            no += self._without_varlen(spec, ops.one_token)
        if no:
            return self.refuse(*no)
        if not ops.one_token:
            return self.accept("decodes run through the prefill op, which is slower at them")
        if not ops.varlen:
            return self.accept("prompts run token by token through the decode op")
        return self.accept()

    def _without_varlen(self, spec: AttentionSpec, one_token: bool) -> list[Refusal]:
        """Refusals of a layer that the prefill op gets wrong: every token must be one that the decode op gets right."""
        field, value, lack = (
            ("alibi", True, "IPEX's prefill op has no ALiBi")
            if spec.alibi
            else ("window", spec.window, "IPEX's prefill op takes a window of nothing to the left for none at all")
        )
        if not spec.causal:
            return [Refusal(field, value, f"{lack}, and its decode op, which would do for each token, is causal")]
        if one_token:
            return []
        if PARTITION_TOKENS % spec.block_size:
            accepts = f"{lack}, and its decode op needs a block size that divides {PARTITION_TOKENS}"
            return [Refusal(f"{field}, block_size", (value, spec.block_size), accepts, "Ask for block_size=32")]
        if spec.logits_soft_cap is not None:
            accepts = f"{lack}, and its decode op has no soft-cap within a window"
            return [Refusal(f"{field}, logits_soft_cap, window", (value, spec.logits_soft_cap, spec.window), accepts)]
        accepts = f"{lack}, and its decode op reads no {spec.kv_cache_dtype} under {spec.dtype}"
        return [Refusal(f"{field}, kv_cache_dtype", (value, spec.kv_cache_dtype), accepts, "Use bfloat16")]

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed torch tensor on the CPU."""
        return self._ops.zeros(shape, dtype, device)

    def indexable_view(self, array: Array) -> Array:
        """Return fp8 as its bytes: torch does not index fp8."""
        return self._ops.indexable_view(array)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Cut the batch up for the two ops, and filter the slots that are not written."""
        plan: Plan = self._ops.CpuPlan(spec=spec, view=metadata.view(spec.kind))
        return plan

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write the new keys and values, then attend; see `cpu_ops`."""
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out = call.cache, call.layer, call.out
        return self._ops.run(plan, q, k, v, cache, layer, out)

    @cached_property
    def _ops(self) -> Any:
        from attn_dispatch_ipex import vendor

        vendor.load("intel_extension_for_pytorch", availability.INSTALL_CPU)
        from attn_dispatch_ipex import cpu_ops

        return cpu_ops
