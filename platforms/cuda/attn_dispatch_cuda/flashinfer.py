"""`cuda/flashinfer`: FlashInfer's wrappers, planned in our plan and run in our run. Loading this imports no vendor.

Written against flashinfer-python 0.7.2.post1 (its Python, and its kernels' sources); never run on a GPU here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attn_dispatch.adapters.environment import choice
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionSpec, CacheLayout, layout_named
from attn_dispatch.contract.dtypes import dtype_name

from .backend import FALLBACK_HINT, UNVERIFIED, CudaBackend, shared_refusals
from .flashinfer_mixed import not_by_one_kernel
from .gpus import sm
from .machine import Machine

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.layer_pass import DeviceCall

    from .flashinfer_call import InferBatch

__all__ = ["MIXED", "FlashInferBackend", "kernels", "mergeable"]

KERNELS_VARIABLE = "ATTN_DISPATCH_CUDA_FLASHINFER"
"""`auto`, `fa2` or `fa3`: FlashInfer's prefill kernels. fa3 (Hopper) takes nvcc minutes where no wheel has it built."""

LAYOUT_VARIABLE = "ATTN_DISPATCH_CUDA_FLASHINFER_LAYOUT"
"""`NHD` (default: shared with FlashAttention) or `HND`."""

MIXED_VARIABLE = "ATTN_DISPATCH_CUDA_FLASHINFER_MIXED"
"""Who computes a batch of decodes and prefills: by default two wrappers, or FlashInfer's one persistent kernel."""

MIXED = ("two-wrappers", "batch-attention")
_HEAD_SIZES = (64, 128, 256)
_INSTALL = "pip install flashinfer-python, with nvcc and ninja to build its kernels (or flashinfer-jit-cache, built)"


class FlashInferBackend(CudaBackend):
    """The decode wrapper for decodes, the prefill wrapper for the rest, or `BatchAttention` for batches of both."""

    def probe(self) -> Availability:
        """Say whether there is a GPU, torch's CUDA build, FlashInfer, and its kernels or a compiler for them."""
        packages = self.machine.packages
        version = packages.version("flashinfer-python")
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if not packages.folders("flashinfer"):
            return Availability(False, "FlashInfer is not installed", _INSTALL)
        gpu = self.machine.gpus[0]
        old = [capability for capability in self.machine.capabilities if capability < (8, 0)]
        if old:
            reason = f"FlashInfer's kernels are for sm_80 and later, {gpu} is {sm(old[0])}"
            return Availability(False, reason, FALLBACK_HINT, version)
        source = kernels(self.machine)
        if not source:
            reason = f"FlashInfer {version} has no kernels: neither nvcc with ninja nor prebuilt ones were found"
            return Availability(False, reason, _INSTALL, version)
        return Availability(True, f"FlashInfer {version} ({source}) on {gpu}; {UNVERIFIED}", "", version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse sizes that its kernels were not written for, a layer's ALiBi slopes, and windows to the right."""
        type_fits = spec.kv_cache_dtype == spec.dtype or spec.kv_cache_dtype.startswith("float8")
        checks = (
            ("kv_cache_dtype", type_fits, f"FlashInfer reads a cache of the layer's own type ({spec.dtype}) or fp8",
             "Ask for one of these"),
            ("head_size", spec.head_size in _HEAD_SIZES,
             f"FlashInfer's kernels are for {', '.join(map(str, _HEAD_SIZES))}", FALLBACK_HINT),
            ("value_head_size", spec.value_head_size == spec.head_size,
             f"FlashInfer's paged kernels take values as wide as keys, {spec.head_size}", FALLBACK_HINT),
            ("alibi", not spec.alibi, "FlashInfer computes slopes of its own, a layer's cannot be given",
             "Ask for cuda/flash-attention with FlashAttention 2"),
            ("window", spec.window[1] <= 0, "the right side of a window must be 0 or -1",
             "Ask for cuda/flash-attention"),
        )  # fmt: skip
        refusals = shared_refusals(spec, "FlashInfer")
        refusals += [Refusal(name, getattr(spec, name), text, hint) for name, fits, text, hint in checks if not fits]
        note = ""
        if choice(MIXED_VARIABLE, *MIXED) == "batch-attention":
            reason = not_by_one_kernel(spec, self.machine.capabilities)
            note = "; mixed batches by " + (f"two wrappers: {reason}" if reason else "BatchAttention")
        return self.refuse(*refusals) if refusals else self.accept(UNVERIFIED + note)

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """By the variable: FlashInfer reads both."""
        return layout_named(choice(LAYOUT_VARIABLE, "NHD", "HND"))

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> InferBatch:
        """Plan FlashInfer's wrappers."""
        from .flashinfer_call import InferBatch

        kernels, layout = choice(KERNELS_VARIABLE, "auto", "fa2", "fa3"), self.layout(plan.spec).name
        one_kernel = choice(MIXED_VARIABLE, *MIXED) == "batch-attention"
        one_kernel = one_kernel and not not_by_one_kernel(plan.spec, self.machine.capabilities)
        return InferBatch(plan, device, paged=paged, layout=layout, kernels=kernels, one_kernel=one_kernel)

    def write(self, call: DeviceCall) -> None:
        """By FlashInfer's one kernel for keys and values where its model fits."""
        if not call.batch.append(call):
            super().write(call)

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the wrappers that the batch planned."""
        batch: InferBatch = call.batch
        return batch.attend(call)

    def merge_states(self, states: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        """By FlashInfer's kernels on a GPU; see `Backend.merge_states`."""
        if not mergeable(states):
            return super().merge_states(states)
        from .flashinfer_call import merge

        return merge(states)


def mergeable(states: Sequence[tuple[Array, Array]]) -> bool:
    """Return whether FlashInfer's kernels merge results: 16 bits, on one GPU, 8 elements a thread of one block."""
    if len(states) < 2:
        return False
    out, lse = states[0]
    if any(not getattr(x, "is_cuda", False) or x.requires_grad for state in states for x in state):
        return False
    kinds = [(x.shape, x.dtype, x.device) for state in states for x in state]
    if kinds != kinds[:2] * len(states) or out.device != lse.device or len(out.shape) != 3:
        return False
    if dtype_name(out.dtype) not in ("float16", "bfloat16") or dtype_name(lse.dtype) != "float32":
        return False
    rows, heads, size = out.shape
    return tuple(lse.shape) == (rows, heads) and rows > 0 and size in _HEAD_SIZES and heads * (size // 8) <= 1024


def kernels(machine: Machine) -> str:
    """Return where FlashInfer's kernels would come from, in words; empty when from nowhere."""
    folders = machine.packages.folders("flashinfer")
    if machine.packages.folders("flashinfer_jit_cache") or any((f / "data" / "aot").is_dir() for f in folders):
        return "prebuilt kernels"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # Where FlashInfer looks: the variable alone if it is set, else the path, else the usual folder.
    usual = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    compiler = usual.exists() or (not home and shutil.which("nvcc") is not None)
    return "kernels built here by nvcc" if compiler and shutil.which("ninja") else ""
