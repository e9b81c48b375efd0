"""`rocm/aiter`: AMD's AITER. Loading this imports no vendor.

By the sources of amd-aiter 0.1.7.post2.dev18 (`aiter_kernels`); never run on a GPU here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch.backend import Call, Refusal
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import BackendRefusedError

from .aiter_kernels import BATCH, DECODE, find_installed, kernels_for
from .backend import Installed, RocmBackend

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
    from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
    from attn_dispatch.adapters.torch.plan import DevicePlan

    from .aiter_call import AiterBatch, AiterFunction

__all__ = ["AiterBackend"]

_LONGEST_DECODE = 8 * 64 * 256
"""Tokens: the longest context that AITER compiles its decode kernel for (8 rounds of 64 partitions of 256)."""


class AiterBackend(RocmBackend):
    """Unified attention in Triton, a HIP kernel for decodes, Composable Kernel's batch prefill for the rest."""

    vendor = "AITER"
    install = "pip install amd-aiter==0.1.7.post2.dev18 (see platforms/rocm/Dockerfile)"
    plain = AttentionSpec(num_heads=8, num_kv_heads=8, head_size=128, block_size=16)

    @cached_property
    def installed(self) -> Installed | None:
        """The installed AITER, by its files: `import aiter` fails where there is no ROCm."""
        return find_installed(self.machine.packages)

    def refusals(self, package: Installed, target: str, spec: AttentionSpec) -> list[Refusal]:
        """Return why none of its kernels computes a spec on a target."""
        return kernels_for(package, target, spec)[1]

    def describe(self, package: Installed, spec: AttentionSpec) -> str:
        """Return which kernels are called on which target."""
        called = []
        for target in self.machine.targets:
            kernels, _ = kernels_for(package, target, spec)
            names = ([DECODE] if DECODE in kernels else []) + [kernels[0]]
            called.append(f"{', '.join(names)} on {target}")
        return f"{package}: {'; '.join(called)}"

    def kernel(self, spec: AttentionSpec, target: str, host: HostBatch) -> str:
        """Return the name of the function that computes a batch.

        Raises:
            BackendRefusedError: none does on that target.
        """
        package = self.installed
        if package is None:
            raise BackendRefusedError(f"{self.name}: AITER is not installed")
        kernels, refusals = kernels_for(package, target, spec)
        if not kernels:
            raise BackendRefusedError(f"{self.name} on {target}: {'; '.join(map(str, refusals))}")
        if DECODE in kernels and host.max_query == 1 and host.max_keys <= _LONGEST_DECODE:
            return DECODE
        return kernels[0]

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> AiterBatch:
        """Return the plan's batch on a device, with the kernel that computes it there."""
        from .aiter_call import AiterBatch

        target = self.target_of(device)
        return AiterBatch(plan, device, paged=paged, choose=lambda host: self.kernel(plan.spec, target, host))

    def function_for(self, batch: AiterBatch) -> AiterFunction:
        """Return the function of the batch's kernel."""
        from .aiter_call import FUNCTIONS

        return FUNCTIONS[batch.kernel]

    def _batch_with_lse(self, plan: Any, batch: AiterBatch) -> AiterBatch:
        """Return the plan's batch for the kernel that returns an LSE, which its layers do not ask for every time."""
        key = ("LSE", batch.device), batch.paged
        if key not in plan.batches:
            other = replace(plan, spec=replace(plan.spec, returns_lse=True))
            plan.batches[key] = self.device_batch(other, batch.device, paged=batch.paged)
        with_lse: AiterBatch = plan.batches[key]
        return with_lse

    def run_layer(self, call: Call, batch: Any, cache: CacheTensors | None, layer: LayerTensors) -> Any:
        """Write and attend.

        Raises:
            CacheError: the kernel does not reach the whole cache. Nothing has been written.
        """
        if call.return_lse and batch.kernel != BATCH:
            batch = self._batch_with_lse(call.plan, batch)
        if cache is not None:
            self.function_for(batch).check_reach(batch, cache)
        return super().run_layer(call, batch, cache, layer)
