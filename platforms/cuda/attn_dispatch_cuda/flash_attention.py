"""`cuda/flash-attention`: FlashAttention 2, 3 or 4, whichever is installed and fits the GPU.

Loading this imports no vendor. Written against the vendors' real packages (`flash_versions`); never run on a GPU here.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionSpec, CacheLayout
from attn_dispatch.errors import BackendRefusedError, EnvironmentVariableError

from .flash_versions import Installed, choose, installed
from .gpus import Capability, written
from .paged import PagedCudaBackend
from .plans import CudaPlan

if TYPE_CHECKING:
    import torch

    from .flash_calls import FlashStep
    from .layer import Owned
    from .store import Store

__all__ = ["FP8_QUERIES_VARIABLE", "FlashAttentionBackend"]

FP8_QUERIES_VARIABLE = "ATTN_DISPATCH_CUDA_FP8_QUERIES"
"""`1`: FlashAttention 3 may round queries to fp8, which is how it reads an fp8 cache."""

UNTRIED = "by the vendor's sources and signatures; never run on a GPU by this project"
_INSTALL = (
    "pip install flash-attn (FlashAttention 2), flash-attn-4 (Hopper, Blackwell), or build hopper/ of its sources"
)


class FlashAttentionBackend(PagedCudaBackend):
    """One ragged call of FlashAttention over NHD pages, for decodes, prefills and encoders alike."""

    def probe(self) -> Availability:
        """A GPU, torch's CUDA build, and a FlashAttention that has kernels for the GPU."""
        found = self._installed
        versions = ", ".join(dict.fromkeys(map(str, found)))
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, versions)
        if not found:
            return Availability(False, "no FlashAttention is installed", _INSTALL)
        for capability in self.machine.capabilities:
            fits, no = choose(found, capability, _plain(256), fp8_queries=False)
            if fits is None:
                return Availability(False, f"{versions}: {no[0]}", _INSTALL, versions)
        return Availability(True, f"{versions} on {self.machine.gpus[0]}; {UNTRIED}", version=versions)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """What the installed versions compute on this machine's GPUs, each of them."""
        found = self._installed
        capabilities = self.machine.capabilities
        if not found or not capabilities:
            what = "no FlashAttention is installed" if not found else "the GPU's compute capability is not known"
            return self.refuse(Refusal("", None, what, self.probe().remedy or _INSTALL))
        serves: list[str] = []
        no: list[Refusal] = []
        for capability in capabilities:
            one, refused = choose(found, capability, spec, fp8_queries=fp8_queries())
            no += [refusal for refusal in refused if refusal not in no]
            if one is not None:
                serves.append(f"{one} on {written(capability)}")
        if no:
            return self.refuse(*no)
        return self.accept(f"{', '.join(serves)}; {UNTRIED}")

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def version_for(self, spec: AttentionSpec, capability: Capability) -> Installed:
        """Return the version that computes a spec on a GPU.

        Raises:
            BackendRefusedError: none of those installed does.
        """
        one = self._chosen.get((spec, capability))
        if one is None:
            one, no = choose(self._installed, capability, spec, fp8_queries=fp8_queries())
            if one is None:
                raise BackendRefusedError(f"{self.name} on {written(capability)}: {'; '.join(map(str, no))}")
            self._chosen[spec, capability] = one
        return one

    @cached_property
    def _installed(self) -> list[Installed]:
        return installed(self.machine)

    @cached_property
    def _chosen(self) -> dict[tuple[AttentionSpec, Capability], Installed]:
        return {}

    def step(
        self, spec: AttentionSpec, plan: CudaPlan, device: torch.device, *, paged: bool, capacity: int | None
    ) -> FlashStep:
        """Choose the version by the device itself."""
        import torch

        from .flash_calls import FlashStep

        version = self.version_for(spec, torch.cuda.get_device_capability(device))
        return FlashStep(version, spec, plan.view, device, paged=paged, capacity=capacity)

    def sinks_inside(self, step: Any, owned: Owned) -> bool:
        """FlashAttention 4 takes sinks; vLLM's 3 those that are bfloat16, of at most 64 heads."""
        return bool(step.calls.takes_sinks(step, owned))

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
        """One call of the version that the step was made for."""
        key, value = (k, v) if store is None else (store.key, store.value)
        result: tuple[torch.Tensor, torch.Tensor | None] = step.calls.attend(
            step, q, key, value, owned, out, wants_lse=wants_lse
        )
        return result


def fp8_queries() -> bool:
    """Whether queries may be rounded to fp8.

    Raises:
        EnvironmentVariableError: the variable is neither 0 nor 1.
    """
    text = os.environ.get(FP8_QUERIES_VARIABLE, "0") or "0"
    if text not in ("0", "1"):
        raise EnvironmentVariableError(f"{FP8_QUERIES_VARIABLE}={text!r} must be 0 or 1")
    return text == "1"


def _plain(block_size: int) -> AttentionSpec:
    return AttentionSpec(num_heads=8, num_kv_heads=8, head_size=128, block_size=block_size)
