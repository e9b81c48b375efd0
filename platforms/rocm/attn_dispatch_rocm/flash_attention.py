"""`rocm/flash-attention`: the `flash_attn` package built with Composable Kernel. Loading this imports no vendor.

By the sources of flash-attn 2.8.3.post2 (csrc/flash_attn_ck); never run on a GPU here. The package can also be built
or told to use Triton on AMD GPUs (FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE): its functions then take a block table and do
not read it, so that pages are taken for one long row of keys. That build is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec

from .batch import Batch
from .paged import ELSEWHERE, UNTRIED, PagedRocmBackend, plain_refusals

if TYPE_CHECKING:
    import torch

    from .calls import Call
    from .step import RocmPlan, Step

__all__ = ["TRITON_VARIABLE", "FlashAttentionBackend", "Installed"]

TRITON_VARIABLE = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
"""flash_attn's own variable: TRUE makes it import its Triton kernels instead of the compiled ones."""

TARGETS = ("gfx90a", "gfx942", "gfx950")
"""The GPUs that its setup compiles for."""

_INSTALL = "Build it: pip install flash-attn==2.8.3.post2 --no-build-isolation (see platforms/rocm/Dockerfile)"
_FEW_QUERIES = 16
"""With at most so many queries per sequence, the function that is told lengths and splits keys is asked."""


@dataclass(frozen=True)
class Installed:
    """A flash_attn that was found.

    Attributes:
        version: of the distribution.
        where: its folder.
        compiled: its compiled library (`flash_attn_2_cuda`, by that name on AMD GPUs too) is there.
    """

    version: str
    where: Path
    compiled: bool

    def __str__(self) -> str:
        return f"flash-attn {self.version}".strip()


class FlashAttentionBackend(PagedRocmBackend):
    """One ragged call over NHD pages of multiples of 128 tokens, for decodes, prefills and encoders alike."""

    def probe(self) -> Availability:
        """An AMD GPU that it is compiled for, torch's ROCm build, and the CK build of flash_attn."""
        found = self._installed
        version = str(found) if found else ""
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if found is None:
            return Availability(False, "flash_attn is not installed", _INSTALL)
        no = [refusal for target in self.machine.targets for refusal in self._whole(found, target)]
        if no:
            return Availability(False, f"{found}: {no[0]}", no[0].remedy, version)
        return Availability(True, f"{found} (CK) on {self.machine.gpus[0]}; {UNTRIED}", version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """What the CK build computes on this machine's GPUs."""
        found, targets = self._installed, self.machine.targets
        if found is None or not targets:
            what = "flash_attn is not installed" if found is None else "the GPU's target is not known"
            return self.refuse(Refusal("", None, what, self.probe().remedy or _INSTALL))
        no = [refusal for target in targets for refusal in self._whole(found, target)]
        no = [*dict.fromkeys(no), *_refusals(spec)]
        return self.refuse(*no) if no else self.accept(f"{found} (CK) on {', '.join(targets)}; {UNTRIED}")

    def _whole(self, found: Installed, target: str) -> list[Refusal]:
        """Return what is against the installed build, whatever the spec."""
        no = []
        if os.environ.get(TRITON_VARIABLE, "FALSE") == "TRUE":
            accepts = "flash_attn's Triton build takes a block table and does not read it: results would be wrong"
            no.append(Refusal(TRITON_VARIABLE, "TRUE", accepts, f"Unset it and build flash_attn with CK, or {_else()}"))
        elif not found.compiled:
            accepts = f"{found} has no compiled library (flash_attn_2_cuda): its Triton code reads no block table"
            no.append(Refusal("", None, accepts, _INSTALL))
        if target not in TARGETS:
            no.append(
                Refusal("", None, f"flash_attn's CK build is for {', '.join(TARGETS)}, this is {target}", ELSEWHERE)
            )
        return no

    @cached_property
    def _installed(self) -> Installed | None:
        for folder in self.machine.locations("flash_attn"):
            if (folder / "flash_attn_interface.py").exists():
                compiled = bool(self.machine.locations("flash_attn_2_cuda"))
                return Installed(self.machine.version("flash-attn") or "", folder, compiled)
        return None

    def step(self, spec: AttentionSpec, plan: RocmPlan, device: torch.device, *, paged: bool) -> Step:
        """Few queries of each sequence, all alike: by lengths; else by their sums."""
        from .flash_calls import KVCACHE, VARLEN
        from .step import Step

        def choose(batch: Batch) -> Call:
            return KVCACHE if paged and batch.uniform and batch.max_query <= _FEW_QUERIES else VARLEN

        return Step(spec, plan.view, device, paged=paged, choose=choose)


def _else() -> str:
    return f"{ELSEWHERE[0].lower()}{ELSEWHERE[1:]}"


def _refusals(spec: AttentionSpec) -> list[Refusal]:
    vendor = "flash_attn's CK build"
    no = plain_refusals(spec, vendor)
    if spec.kv_cache_dtype != spec.dtype:
        accepts = f"{vendor} reads a cache of the layer's own type, {spec.dtype}"
        no.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
    if spec.block_size % 128:
        accepts = f"{vendor} reads pages of multiples of 128 tokens"
        no.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=128"))
    if spec.head_size % 8 or spec.head_size > 256:
        accepts = f"{vendor} has heads of at most 256, multiples of 8"
        no.append(Refusal("head_size", spec.head_size, accepts, ELSEWHERE))
    if spec.value_head_size != spec.head_size:
        accepts = f"{vendor} takes values as wide as keys, {spec.head_size}"
        no.append(Refusal("value_head_size", spec.value_head_size, accepts, ELSEWHERE))
    if spec.logits_soft_cap is not None:
        accepts = f"{vendor} takes a soft-cap and does not apply it"
        no.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, f"Ask for rocm/aiter, or {ELSEWHERE[8:]}"))
    if spec.alibi and (spec.returns_lse or spec.sinks) and spec.causal and not spec.has_window:
        # It adds slope * key position: the same as the contract's bias within a row, but another log-sum-exp.
        name = "returns_lse" if spec.returns_lse else "sinks"
        accepts = f"{vendor} counts a causal layer's ALiBi from the first key, which changes the log-sum-exp"
        no.append(Refusal(name, True, accepts, ELSEWHERE))
    return no
