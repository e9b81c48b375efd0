"""What the backends of this folder have in common: paged caches on NVIDIA GPUs, and the steps around a vendor's call.

A backend adds what it is and refuses (no vendor is imported for that), its kind of `Step`, and one call.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import attn_dispatch
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Refusal
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.errors import ArrayError, CacheError

from .machine import Machine
from .plans import CudaPlan

if TYPE_CHECKING:
    import torch

    from .layer import Owned
    from .step import Step
    from .store import Store

__all__ = ["PagedCudaBackend", "plain_refusals"]


def plain_refusals(spec: AttentionSpec, vendor: str) -> list[Refusal]:
    """Refuse what none of the three vendors computes."""
    found = []
    if spec.dtype not in ("float16", "bfloat16"):
        accepts = f"{vendor} computes in float16 and bfloat16"
        found.append(Refusal("dtype", spec.dtype, accepts, "Ask for bfloat16, or for triton/paged or torch/sdpa"))
    return found


class PagedCudaBackend(Backend):
    """A vendor's attention over a paged cache on an NVIDIA GPU."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), fixed_plans=True)

    def __init__(self, name: str, machine: Machine | None = None) -> None:
        super().__init__(name)
        self._given = machine

    @property
    def device_type(self) -> str:
        """What torch calls the devices that arrays must be on."""
        return "cuda"

    @cached_property
    def machine(self) -> Machine:
        """The machine that `probe` and `verdict` speak of: this one, unless another was given."""
        return self._given or Machine(attn_dispatch.platform)

    @abstractmethod
    def probe(self) -> Availability:
        """See `Backend.probe`."""

    @abstractmethod
    def step(
        self, spec: AttentionSpec, plan: CudaPlan, device: torch.device, *, paged: bool, capacity: int | None
    ) -> Step:
        """Return the plan's batch on a device."""

    @abstractmethod
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
        """Attend with q [T, H, D] over the cache, or over k and v; return the output and the LSE, natural, f32[T, H].

        Without the sinks, unless `sinks_inside`. `out` is contiguous, and may be ignored.
        """

    def sinks_inside(self, step: Any, owned: Owned) -> bool:
        """Whether the vendor's kernel takes this layer's sinks; otherwise they are applied to what it returns."""
        return False

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
        """Return a zeroed tensor (device None: the current GPU; "cpu": pinned memory, to swap blocks to)."""
        import torch

        with torch.inference_mode(False):
            where = torch.device(device) if device else self.default_device()
            pinned = where.type == "cpu" and torch.cuda.is_available()
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=where, pin_memory=pinned)

    def default_device(self) -> torch.device:
        """Return the current GPU.

        Raises:
            CacheError: torch finds none.
        """
        import torch

        if not torch.cuda.is_available():
            raise CacheError("torch finds no GPU here: name a device, or see attn-dispatch doctor")
        return torch.device("cuda", torch.cuda.current_device())

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache."""
        cache = super().allocate(spec, num_blocks, device)
        cache.device = str(cache.key.device)
        return cache

    def indexable_view(self, array: torch.Tensor) -> torch.Tensor:
        """Return fp8 as its bytes: not every operation indexes fp8."""
        import torch

        return array.view(torch.uint8) if array.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else array

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Any, dst: Any) -> None:
        """Copy blocks into another cache. Between a GPU and pinned memory nothing waits: neighbours go in one copy."""
        for name, array in cache.arrays.items():
            axis, target = cache.layout.block_axis(name), self.indexable_view(other.arrays_as("torch")[name])
            source = self.indexable_view(array)
            for first, to, count in neighbours(src, dst):
                target.narrow(axis, to, count).copy_(source.narrow(axis, first, count), non_blocking=True)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> CudaPlan:
        """Cut the batch for the vendor's kernels and bring it to the current GPU, in one copy."""
        plan = CudaPlan(spec=spec, view=metadata.view(spec.kind))
        if plan.num_tokens or plan.num_new:
            self._step_on(plan, self.default_device(), paged=spec.kind != "encoder" or plan.view.side.has_blocks)
        return plan

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> CudaPlan:
        """Prepare a step whose buffers stay: captured once in a CUDA graph, replayed after `plan.renew(metadata)`.

        Args:
            spec: the layers.
            metadata: a batch of the shape that all others will have (padding included).
            max_seq_len: the most tokens that a sequence will ever have.

        Raises:
            PlanError: the batch does not fit, or the layer's keys are not in a cache.
        """
        plan = CudaPlan(spec=spec, view=metadata.view(spec.kind), capacity=max_seq_len)
        self._step_on(plan, self.default_device(), paged=spec.kind != "encoder" or plan.view.side.has_blocks)
        return plan

    def _step_on(self, plan: CudaPlan, device: torch.device, *, paged: bool) -> Step:
        step = self.step(plan.spec, plan, device, paged=paged, capacity=plan.capacity)
        plan.steps[device, paged] = step
        return step

    def run(self, call: Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values, then attend.

        Raises:
            ArrayError: arrays on different devices, or not on a GPU. Nothing has been written.
        """
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out, return_lse = call.cache, call.layer, call.out, call.return_lse
        from . import layer as layers

        assert isinstance(plan, CudaPlan)
        device = q.device
        store: Store | None = None
        if cache is not None:
            store = cache.backend_state.get(self.name) or self._bind(cache)  # type: ignore[assignment]
            if store.device != device:  # type: ignore[union-attr]
                raise ArrayError(
                    f"q is on {device}, the cache on {cache.device}: allocate(..., device={str(device)!r}), or move q"
                )
        if any(x is not None and x.device != device for x in (k, v, out)):
            raise _elsewhere(q, k, v, out)
        if device.type != self.device_type:
            raise ArrayError(f"q is on {device}: {self.name} computes on NVIDIA GPUs, and so must its arrays be")
        if not (plan.num_tokens or plan.num_new):
            return layers.nothing(plan.spec, q, out, return_lse)
        step = plan.steps.get((device, store is not None))
        if step is None:
            step = self._step_on(plan, device, paged=store is not None)
        owned: Owned = layer.memoize((self.name, device), lambda: layers.owned(layer, device))
        return layers.run(self, step, q, k, v, store, owned, out, return_lse=return_lse)

    def _bind(self, cache: KVCache) -> Store:
        from .store import Store

        store = cache.backend_state[self.name] = Store(cache)
        return store


def neighbours(src: Any, dst: Any) -> list[tuple[int, int, int]]:
    """Return (first source, first target, count) of runs of blocks that lie one after the other on both sides."""
    if not len(src):
        return []
    ends = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    starts = np.concatenate([[0], ends])
    counts = np.diff(np.concatenate([starts, [len(src)]]))
    return [(int(src[i]), int(dst[i]), int(n)) for i, n in zip(starts, counts, strict=True)]


def _elsewhere(*arrays: Any) -> ArrayError:
    places = ", ".join(dict.fromkeys(str(array.device) for array in arrays if array is not None))
    return ArrayError(f"q, k, v and out lie on {places}: a step's arrays must be on one device, where the cache is")
