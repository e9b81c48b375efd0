"""`rocm/aiter`: AMD's AITER. Loading this imports no vendor.

Written by the sources of amd-aiter 0.1.7.post2.dev18 (`aiter_kernels`); never run on a GPU here.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import BackendRefusedError

from .aiter_kernels import BATCH, DECODE, UNIFIED, Installed, installed, serving
from .batch import Batch
from .paged import UNTRIED, PagedRocmBackend

if TYPE_CHECKING:
    import torch

    from .step import RocmPlan, Step

__all__ = ["AiterBackend"]

_INSTALL = "pip install amd-aiter==0.1.7.post2.dev18 (see platforms/rocm/Dockerfile)"
_LONGEST_DECODE = 8 * 64 * 256
"""Tokens: the longest context that AITER compiles its decode kernel for (8 rounds of 64 partitions of 256)."""


class AiterBackend(PagedRocmBackend):
    """Unified attention in Triton, a HIP kernel for decodes, Composable Kernel's batch prefill for the rest."""

    def probe(self) -> Availability:
        """An AMD GPU that AITER knows, torch's ROCm build, and an AITER whose functions are those called here."""
        found = self._installed
        version = str(found) if found else ""
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if found is None:
            return Availability(False, "AITER is not installed", _INSTALL)
        plain = AttentionSpec(num_heads=8, num_kv_heads=8, head_size=128, block_size=16)
        for target in self.machine.targets:
            kernels, no = serving(found, target, plain)
            if not kernels:
                return Availability(False, f"{found}: {no[0]}", no[0].remedy or _INSTALL, version)
        return Availability(True, f"{found} on {self.machine.gpus[0]}; {UNTRIED}", version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """What the installed AITER computes on this machine's GPUs, each of them."""
        found, targets = self._installed, self.machine.targets
        if found is None or not targets:
            what = "AITER is not installed" if found is None else "the GPU's target is not known"
            return self.refuse(Refusal("", None, what, self.probe().remedy or _INSTALL))
        serves: list[str] = []
        no: list[Refusal] = []
        for target in targets:
            kernels, refused = serving(found, target, spec)
            no += [refusal for refusal in refused if refusal not in no]
            serves.append(f"{', '.join(_used(kernels))} on {target}")
        return self.refuse(*no) if no else self.accept(f"{found}: {'; '.join(serves)}; {UNTRIED}")

    @cached_property
    def _installed(self) -> Installed | None:
        return installed(self.machine)

    def kernel(self, spec: AttentionSpec, target: str, batch: Batch) -> str:
        """Return the function that computes a batch.

        Raises:
            BackendRefusedError: none does on that target.
        """
        found = self._installed
        kernels, no = serving(found, target, spec) if found else ((), [Refusal("", None, "AITER is not installed")])
        if not kernels:
            raise BackendRefusedError(f"{self.name} on {target}: {'; '.join(map(str, no))}")
        if DECODE in kernels and batch.max_query == 1 and batch.max_keys <= _LONGEST_DECODE:
            return DECODE
        return kernels[0]

    def step(self, spec: AttentionSpec, plan: RocmPlan, device: torch.device, *, paged: bool) -> Step:
        """Choose the kernel by the batch and the device."""
        from .aiter_calls import CALLS, TILE_TOKENS
        from .step import Step

        target = self.target_of(device)
        return Step(
            spec,
            plan.view,
            device,
            paged=paged,
            choose=lambda batch: CALLS[self.kernel(spec, target, batch)],
            tile=TILE_TOKENS,
        )


def _used(kernels: tuple[str, ...]) -> list[str]:
    """Return the kernels that are called, of those that could be."""
    return [name for name in (DECODE, UNIFIED, BATCH) if name in (*kernels[:1], *(k for k in kernels if k == DECODE))]
