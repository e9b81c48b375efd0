"""`rocm/flash-attention`: the `flash_attn` package built with Composable Kernel. Loading this imports no vendor.

By the sources of flash-attn 2.8.3.post2 (csrc/flash_attn_ck); never run on a GPU here. The package can also be built
or told to use Triton on AMD GPUs (FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE): its functions then take a block table and do
not read it, so that pages are taken for one long row of keys. That build is refused.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING

from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .backend import FALLBACK, FALLBACK_HINT, Installed, RocmBackend, dtype_refusals

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.device_batch import DeviceBatch
    from attn_dispatch.adapters.torch.plan import DevicePlan

    from .vendor_function import VendorFunction

__all__ = ["TARGETS", "TRITON_VARIABLE", "FlashAttentionBackend"]

TRITON_VARIABLE = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
"""flash_attn's own variable: TRUE makes it import its Triton kernels instead of the compiled ones."""

TARGETS = ("gfx90a", "gfx942", "gfx950")
"""The GPUs that its setup compiles for."""

_LIBRARY = "flash_attn_2_cuda"
"""Its compiled library, by that name on AMD GPUs too."""

_FEW_QUERIES = 16
"""With at most so many queries per sequence, the function that splits keys over the GPU is called."""


class FlashAttentionBackend(RocmBackend):
    """One ragged call over NHD pages of multiples of 128 tokens, for decodes, prefills and encoders alike."""

    vendor = "flash-attn"
    install = "Build it: pip install flash-attn==2.8.3.post2 --no-build-isolation (see platforms/rocm/Dockerfile)"
    plain = AttentionSpec(num_heads=8, num_kv_heads=8, head_size=128, block_size=128)

    @cached_property
    def installed(self) -> Installed | None:
        """The installed flash_attn, by its files."""
        packages = self.machine.packages
        for folder in packages.folders("flash_attn"):
            if (folder / "flash_attn_interface.py").exists():
                lacks = {} if packages.folders(_LIBRARY) else {_LIBRARY: "absent"}
                return Installed(self.vendor, packages.version("flash-attn"), folder, lacks)
        return None

    def refusals(self, package: Installed, target: str, spec: AttentionSpec) -> list[Refusal]:
        """Return why the CK build cannot compute a spec on a target."""
        refusals = []
        if os.environ.get(TRITON_VARIABLE, "FALSE") == "TRUE":
            accepts = "flash_attn's Triton build takes a block table and does not read it: results would be wrong"
            remedy = f"Unset it and build flash_attn with CK, or ask for {FALLBACK}"
            refusals.append(Refusal(TRITON_VARIABLE, "TRUE", accepts, remedy))
        elif package.lacks:
            accepts = f"{package} has no compiled library ({_LIBRARY}): its Triton code reads no block table"
            refusals.append(Refusal("", None, accepts, self.install))
        if target not in TARGETS:
            accepts = f"flash_attn's CK build is for {', '.join(TARGETS)}, this is {target}"
            refusals.append(Refusal("", None, accepts, FALLBACK_HINT))
        return refusals + _spec_refusals(spec)

    def describe(self, package: Installed, spec: AttentionSpec) -> str:
        """Return the build and the GPUs."""
        return f"{package} (CK) on {', '.join(self.machine.targets)}"

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> DeviceBatch:
        """Return the plan's batch on a device."""
        from attn_dispatch.adapters.torch.device_batch import DeviceBatch

        return DeviceBatch(plan.spec, plan.view, device, paged=paged, max_seq_len=plan.max_seq_len)

    def function_for(self, batch: DeviceBatch) -> VendorFunction:
        """Few queries of each sequence, all alike: by lengths; else by their sums."""
        from .flash_attention_call import KVCACHE, VARLEN

        host = batch.host
        return KVCACHE if batch.paged and host.uniform and host.max_query <= _FEW_QUERIES else VARLEN


def _spec_refusals(spec: AttentionSpec) -> list[Refusal]:
    vendor = "flash_attn's CK build"
    refusals = dtype_refusals(spec, vendor)
    if spec.kv_cache_dtype != spec.dtype:
        accepts = f"{vendor} reads a cache of the layer's own type, {spec.dtype}"
        refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
    if spec.block_size % 128:
        accepts = f"{vendor} reads pages of multiples of 128 tokens"
        refusals.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=128"))
    if spec.head_size % 8 or spec.head_size > 256:
        accepts = f"{vendor} has heads of at most 256, multiples of 8"
        refusals.append(Refusal("head_size", spec.head_size, accepts, FALLBACK_HINT))
    if spec.value_head_size != spec.head_size:
        accepts = f"{vendor} takes values as wide as keys, {spec.head_size}"
        refusals.append(Refusal("value_head_size", spec.value_head_size, accepts, FALLBACK_HINT))
    if spec.logits_soft_cap is not None:
        accepts = f"{vendor} takes a soft-cap and does not apply it"
        refusals.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, f"Ask for rocm/aiter, {FALLBACK}"))
    if spec.alibi and (spec.returns_lse or spec.sinks) and spec.causal and not spec.has_window:
        # It adds slope * key position: the same as the contract's bias within a row, but another log-sum-exp.
        name = "returns_lse" if spec.returns_lse else "sinks"
        accepts = f"{vendor} counts a causal layer's ALiBi from the first key, which changes the log-sum-exp"
        refusals.append(Refusal(name, True, accepts, FALLBACK_HINT))
    return refusals
