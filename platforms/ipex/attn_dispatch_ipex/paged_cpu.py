"""`ipex/paged-cpu`: IPEX's paged ops on the CPU, what they accept and what is refused. Imports no vendor."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import attn_dispatch
from attn_dispatch.adapters.torch.backend import VendorBackend
from attn_dispatch.backend import Availability, Capabilities, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import CacheError

from .availability import ipex_on_cpu
from .paged_cpu_batch import PARTITION_TOKENS, usable_ops

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall
    from attn_dispatch.adapters.torch.plan import DevicePlan

    from .paged_cpu_call import PagedCpuBatch

__all__ = ["PagedCpuBackend"]

DTYPES = ("float32", "bfloat16", "float16")
E5M2 = "float8_e5m2"
SMALLEST_FP8_HEAD = 31
SMALLEST_SCALE = 2.0**-126
"""The least normal float32."""


class PagedCpuBackend(VendorBackend):
    """Attention by `ipex.llm.modules.PagedAttention` over a cache in HND order.

    Per-tensor scales of an fp8 cache are ignored by the ops and applied here: the keys' belongs to the scores, as the
    softmax's scale does, the values' to the output.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)
    device_type: ClassVar[str] = "cpu"

    def probe(self) -> Availability:
        """Versions of torch and IPEX that belong together, on a CPU with AVX2."""
        return self._availability

    @cached_property
    def _availability(self) -> Availability:
        return ipex_on_cpu(attn_dispatch.platform.facts)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse what the ops lack, what they compute wrongly in silence, and what crashes them."""
        refusals: list[Refusal] = []
        if spec.dtype not in DTYPES:
            refusals.append(Refusal("dtype", spec.dtype, f"IPEX computes in {', '.join(DTYPES)}", "Ask for float32"))
        if spec.kv_cache_dtype != spec.dtype and (spec.kv_cache_dtype != E5M2 or spec.dtype == "float16"):
            accepts = "IPEX stores the layer's own type, or float8_e5m2 under float32 and bfloat16"
            refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
        if spec.kv_cache_dtype == E5M2 and spec.head_size < SMALLEST_FP8_HEAD:
            accepts = f"IPEX reads fp8 heads of fewer than {SMALLEST_FP8_HEAD} elements beyond their end, and crashes"
            refusals.append(
                Refusal("head_size, kv_cache_dtype", (spec.head_size, E5M2), accepts, f"Store {spec.dtype}")
            )
        if spec.value_head_size != spec.head_size:
            accepts = f"IPEX takes values to be as wide as keys, {spec.head_size}"
            refusals.append(Refusal("value_head_size", spec.value_head_size, accepts))
        if spec.sinks:
            refusals.append(Refusal("sinks", True, "IPEX's softmax has no sink", "Use cpu/numba or torch/sdpa"))
        if spec.returns_lse:
            refusals.append(Refusal("returns_lse", True, "IPEX's ops do not return LSE", "Use cpu/numba or torch/sdpa"))
        if spec.scale < SMALLEST_SCALE:
            accepts = "IPEX scales what it has masked, and minus infinity times this is not minus infinity"
            refusals.append(Refusal("scale", spec.scale, accepts, "Scale the queries instead"))
        ops = usable_ops(spec, spec.block_size, spec.kv_cache_dtype)
        if not ops.prefill:
            refusals += _without_prefill(spec, ops.decode)
        if refusals:
            return self.refuse(*refusals)
        if not ops.decode:
            return self.accept("decodes run through the prefill op, which is slower at them")
        if not ops.prefill:
            return self.accept("prompts run token by token through the decode op")
        return self.accept()

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
        """Return a zeroed tensor in host memory."""
        if device is not None and device != "cpu":
            raise CacheError(f"device={device!r}: {self.name} computes on the CPU, and so do its caches")
        return super().zeros(shape, dtype, "cpu")

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> PagedCpuBatch:
        """Cut the batch up for the two ops, and filter the slots that are not written."""
        from .paged_cpu_call import PagedCpuBatch

        return PagedCpuBatch(plan.spec, plan.view, device, paged=paged)

    def write(self, call: DeviceCall) -> None:
        """Store the new keys and values."""
        from .paged_cpu_call import write

        write(call)

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, decodes and prefills each by their op."""
        from .paged_cpu_call import attend

        return attend(call), None


def _without_prefill(spec: AttentionSpec, decode: bool) -> list[Refusal]:
    """Refusals of a layer that the prefill op gets wrong: every token must be one that the decode op gets right."""
    field, value, lack = (
        ("alibi", True, "IPEX's prefill op has no ALiBi")
        if spec.alibi
        else ("window", spec.window, "IPEX's prefill op treats window[0]=0 as no window")
    )
    if not spec.causal:
        return [Refusal(field, value, f"{lack}, and its decode op, which would do for each token, is causal")]
    if decode:
        return []
    if PARTITION_TOKENS % spec.block_size:
        accepts = f"{lack}, and its decode op needs a block size that divides {PARTITION_TOKENS}"
        return [Refusal(f"{field}, block_size", (value, spec.block_size), accepts, "Ask for block_size=32")]
    if spec.logits_soft_cap is not None:
        accepts = f"{lack}, and its decode op has no soft-cap within a window"
        return [Refusal(f"{field}, logits_soft_cap, window", (value, spec.logits_soft_cap, spec.window), accepts)]
    accepts = f"{lack}, and its decode op reads no {spec.kv_cache_dtype} under {spec.dtype}"
    return [Refusal(f"{field}, kv_cache_dtype", (value, spec.kv_cache_dtype), accepts, "Use bfloat16")]
