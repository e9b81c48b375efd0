"""`cuda/xformers`: xFormers' split-K kernel over paged caches, through its paged block-diagonal masks.

Loading this imports no vendor. Written against xformers 0.0.35: its Python, its Triton kernel. Never run on a GPU here.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout

from .gpus import written
from .paged import PagedCudaBackend, plain_refusals
from .plans import CudaPlan

if TYPE_CHECKING:
    import torch

    from .layer import Owned
    from .store import Store
    from .xformers_step import XformersStep

__all__ = ["XformersBackend", "interpreted"]

UNTRIED = "by the vendor's sources and signatures; never run on a GPU by this project"

_HEAD_SIZES = (16, 32, 64, 128, 256, 512)
_ELSEWHERE = "Ask for triton/paged or torch/sdpa"


_TRITONS = ("triton", "pytorch-triton", "triton-windows")
_NO_BLOCK_POINTERS = (3, 9)
"""The Triton that ended what xFormers' kernel reads its tiles through (xFormers up to 0.0.35)."""


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels; it reads this when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class XformersBackend(PagedCudaBackend):
    """`triton_splitK`: decodes, and prompts cut into pieces of at most 16 queries."""

    @property
    def device_type(self) -> str:
        """The CPU, when Triton interprets its kernels there."""
        return "cpu" if interpreted() else "cuda"

    def default_device(self) -> torch.device:
        """Return the current GPU, or the CPU when Triton interprets."""
        import torch

        return torch.device("cpu") if interpreted() else super().default_device()

    def probe(self) -> Availability:
        """A GPU, torch's CUDA build, xFormers, Triton, and no package in the way."""
        version = self.machine.version("xformers") or ""
        missing = None if interpreted() else self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if not self.machine.locations("xformers"):
            return Availability(False, "xFormers is not installed", "pip install xformers")
        if not self.machine.locations("triton"):
            return Availability(False, f"xFormers {version} without Triton", "pip install triton", version)
        triton = next(filter(None, map(self.machine.version, _TRITONS)), "")
        if (numbers := re.match(r"(\d+)\.(\d+)", triton)) and (int(numbers[1]), int(numbers[2])) >= _NO_BLOCK_POINTERS:
            reason = f"xFormers {version} uses block pointers, which Triton {triton} no longer has"
            return Availability(False, reason, "Install a torch with Triton 3.8 or older", version)
        folders = self.machine.locations("flash_attn")
        if folders and not any((folder / "flash_attn_interface.py").exists() for folder in folders):
            reason = f"xFormers {version} does not import beside a flash_attn that is FlashAttention 4 alone"
            remedy = "Install flash-attn 2 beside it, or uninstall flash-attn-4"
            return Availability(False, reason, remedy, version)
        if interpreted():
            reason = "TRITON_INTERPRET is set: xFormers' kernel runs in Triton's interpreter, on the CPU"
            return Availability(True, reason, version=version, evidence="simulated on CPU")
        for capability in self.machine.capabilities:
            if capability < (8, 0):
                reason = f"xFormers' kernel is for sm_80 and later, {self.machine.gpus[0]} is {written(capability)}"
                return Availability(False, reason, _ELSEWHERE, version)
        return Availability(True, f"xFormers {version} on {self.machine.gpus[0]}; {UNTRIED}", "", version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """What its paged masks can say: causal or not, nothing else."""
        no = plain_refusals(spec, "xFormers")
        if spec.kv_cache_dtype != spec.dtype:
            accepts = f"xFormers reads a paged cache of the layer's own type, {spec.dtype}"
            no.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
        if spec.block_size % 64:
            accepts = "xFormers' kernel reads pages of multiples of 64 tokens"
            no.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=64"))
        if spec.head_size not in _HEAD_SIZES:
            accepts = f"xFormers' kernel is for {', '.join(map(str, _HEAD_SIZES))}"
            no.append(Refusal("head_size", spec.head_size, accepts, _ELSEWHERE))
        if spec.value_head_size != spec.head_size:
            accepts = f"xFormers' kernel takes values as wide as keys, {spec.head_size}"
            no.append(Refusal("value_head_size", spec.value_head_size, accepts, _ELSEWHERE))
        if spec.has_window:
            accepts = "xFormers has no paged mask with a window"
            no.append(Refusal("window", spec.window, accepts, "Ask for cuda/flash-attention or cuda/flashinfer"))
        if spec.logits_soft_cap is not None:
            accepts = "xFormers has no soft-capping"
            no.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, "Ask for cuda/flashinfer"))
        if spec.alibi:
            accepts = "xFormers' paged masks carry no bias"
            no.append(Refusal("alibi", True, accepts, "Ask for cuda/flash-attention with FlashAttention 2"))
        if spec.kind == "encoder":
            accepts = "xFormers' kernel reads pages, or rows without a mask of its own; an encoder may have no pages"
            no.append(Refusal("kind", spec.kind, accepts, "Ask for cuda/flash-attention or cuda/flashinfer"))
        if interpreted():
            no += _refused_by_interpreter(spec)
            return self.refuse(*no) if no else self.accept("runs in Triton's interpreter: for checking, not for speed")
        return self.refuse(*no) if no else self.accept(UNTRIED)

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def step(
        self, spec: AttentionSpec, plan: CudaPlan, device: torch.device, *, paged: bool, capacity: int | None
    ) -> XformersStep:
        """Make the masks."""
        from .xformers_step import XformersStep

        return XformersStep(spec, plan.view, device, paged=paged, capacity=capacity)

    def attend(
        self,
        step: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        store: Store | None,
        owned: Owned,
        out: torch.Tensor | None,
        *,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call for each length of pieces."""
        assert store is not None
        result: tuple[torch.Tensor, torch.Tensor | None] = step.run(q, store, out, wants_lse=wants_lse)
        return result


def _refused_by_interpreter(spec: AttentionSpec) -> list[Refusal]:
    no = []
    remedy = "Unset TRITON_INTERPRET, on a GPU"
    if spec.dtype == "bfloat16":
        no.append(Refusal("dtype", spec.dtype, "Triton's interpreter multiplies bfloat16 wrongly", remedy))
    if spec.head_size > 64:
        accepts = "at most 64 in the interpreter: for wider heads xFormers asks a GPU which tiles fit it"
        no.append(Refusal("head_size", spec.head_size, accepts, remedy))
    return no
