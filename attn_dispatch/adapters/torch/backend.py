"""The base classes of backends whose arrays are torch's. Importing this imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from attn_dispatch.adapters.batch import check_renewable
from attn_dispatch.adapters.torch.plan import DevicePlan, Renewable
from attn_dispatch.backend import Backend, Call, Capabilities
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.errors import ArrayError, CacheError, PlanError

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
    from attn_dispatch.adapters.torch.layer_pass import DeviceCall
    from attn_dispatch.adapters.torch.layer_tensors import LayerTensors

__all__ = ["TorchBackend", "VendorBackend", "contiguous_runs"]

Ids = npt.NDArray[np.int64]


class TorchBackend(Backend):
    """A backend whose arrays are torch's: it adds a kind of device batch, and how one layer runs."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), fixed_plans=True)

    @property
    @abstractmethod
    def device_type(self) -> str:
        """What torch calls the devices that it computes on: "cuda" (AMD's GPUs too), "xpu", "cpu"."""

    @abstractmethod
    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> Renewable:
        """Return the plan's batch on a device, which is the current one.

        Args:
            plan: `spec`, `view` and, of a fixed plan, `max_seq_len`.
            device: where.
            paged: keys are in a cache.
        """

    @abstractmethod
    def run_layer(self, call: Call, batch: Any, cache: CacheTensors | None, layer: LayerTensors) -> Any:
        """Write the new keys and values, then attend; see `Backend.run`. All arrays have been checked.

        Args:
            call: of arrays on one device.
            batch: what `device_batch` returned for that device.
            cache: the cache's arrays; None: k and v are attended to.
            layer: slopes, sinks, scales on the device.
        """

    def computes_on(self, device: torch.device) -> bool:
        """Whether arrays may be on a device."""
        return bool(device.type == self.device_type)

    def default_device(self) -> torch.device:
        """Return the current device of `device_type`.

        Raises:
            CacheError: torch finds none.
        """
        import torch

        kind = self.device_type
        if kind == "cpu":
            return torch.device(kind)
        runtime = getattr(torch, kind)
        if not runtime.is_available():
            raise CacheError(f"torch finds no {kind} device here: name a device, or see attn-dispatch doctor")
        return torch.device(kind, runtime.current_device())

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
        """Return a zeroed tensor (device None: the current one; "cpu": pinned memory, to swap blocks to)."""
        import torch

        where = torch.device(device) if device else self.default_device()
        kind = self.device_type
        pinned = where.type == "cpu" and kind != "cpu" and getattr(torch, kind).is_available()
        # Made in an inference_mode block, a cache could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=where, pin_memory=pinned)

    def indexable_view(self, array: torch.Tensor) -> torch.Tensor:
        """Return fp8 as its bytes: not every device indexes fp8."""
        from attn_dispatch.adapters.torch.cache_tensors import as_bytes

        return as_bytes(array)

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks into another cache; neighbours go in one copy. Only what goes to the host is waited for."""
        import torch

        for name, array in cache.arrays.items():
            axis, target = cache.layout.block_axis(name), self.indexable_view(other.arrays_as("torch")[name])
            source = self.indexable_view(array)
            for first, to, count in contiguous_runs(src, dst):
                target.narrow(axis, to, count).copy_(source.narrow(axis, first, count), non_blocking=True)
        device = source.device
        if device.type != "cpu" and target.device.type == "cpu":
            getattr(torch, device.type).current_stream(device).synchronize()

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> DevicePlan:
        """Prepare a step. On a machine with one device the batch is brought there now, else when it first runs."""
        plan = DevicePlan(spec=spec, view=metadata.view(spec.kind), backend=self.name)
        self._bring_ahead(plan)
        return plan

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> DevicePlan:
        """Prepare a step whose buffers stay; see `Backend.fixed_plan`. On several devices it is brought by warming up.

        Raises:
            PlanError: the backend has none, the batch does not fit, or the layer's keys are not in a cache.
        """
        if not self.capabilities.fixed_plans:
            Backend.fixed_plan(self, spec, metadata, max_seq_len)
        plan = DevicePlan(spec=spec, view=metadata.view(spec.kind), backend=self.name, max_seq_len=max_seq_len)
        if not plan.view.side.has_blocks:
            raise PlanError("a fixed plan is for layers with a cache: the keys of this one are the batch's own")
        check_renewable(plan.view, plan.view, max_seq_len)
        self._bring_ahead(plan)
        return plan

    def _bring_ahead(self, plan: DevicePlan) -> None:
        """Bring the batch to the device that all layers are on, if there is only one that they can be on."""
        import torch

        kind = self.device_type
        if (plan.num_tokens or plan.num_new) and (kind == "cpu" or getattr(torch, kind).device_count() == 1):
            paged = plan.spec.kind != "encoder" or plan.view.side.has_blocks
            self._batch_on(plan, self.default_device(), paged)

    def _batch_on(self, plan: DevicePlan, device: torch.device, paged: bool) -> Renewable:
        from attn_dispatch.adapters.torch.device_batch import planning_on

        with planning_on(device):
            batch = plan.batches[device, paged] = self.device_batch(plan, device, paged=paged)
        return batch

    def run(self, call: Call) -> Any:
        """Write the new keys and values, then attend.

        Raises:
            ArrayError: arrays on different devices, or not where the backend computes. Nothing has been written.
        """
        from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
        from attn_dispatch.adapters.torch.layer_tensors import LayerTensors

        plan, device = call.plan, call.q.device
        assert isinstance(plan, DevicePlan)
        cache = None if call.cache is None else CacheTensors.of(call.cache)
        self._check_devices(call, cache)
        if not (plan.num_tokens or plan.num_new):
            from attn_dispatch.adapters.torch.layer_pass import empty_result

            return empty_result(call)
        batch = plan.batches.get((device, cache is not None))
        if batch is None:
            batch = self._batch_on(plan, device, cache is not None)
        return self.run_layer(call, batch, cache, LayerTensors.of(call.layer, device))

    def _check_devices(self, call: Call, cache: CacheTensors | None) -> None:
        device = call.q.device
        if cache is not None and cache.device != device:
            raise ArrayError(
                f"q is on {device}, the cache on {cache.device}: allocate(..., device={str(device)!r}), or move q"
            )
        for array in (call.k, call.v, call.out):
            if array is not None and array.device != device:
                arrays = (call.q, call.k, call.v, call.out)
                devices = ", ".join(dict.fromkeys(str(x.device) for x in arrays if x is not None))
                raise ArrayError(f"q, k, v and out lie on {devices}: a step's arrays must be on one device")
        if not self.computes_on(device):
            raise ArrayError(f"q is on {device}: {self.name} computes on {self.device_type} devices, move its arrays")


class VendorBackend(TorchBackend):
    """A backend that is one vendor's function over a paged cache; what surrounds the function is done here."""

    contiguous_rows = False
    """Its functions know no strides: q, k and v are given contiguous."""

    @abstractmethod
    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [T, H, Dv], and when wanted the LSE, natural, f32[T, H]; see `layer_pass.Vendor`."""

    def sinks_inside(self, call: DeviceCall) -> bool:
        """Whether the vendor's function takes this layer's sinks; otherwise they are added to what it returns."""
        return False

    def write(self, call: DeviceCall) -> None:
        """Store the new keys and values."""
        assert call.cache is not None
        assert call.k is not None
        assert call.v is not None
        call.cache.write(call.batch.writes, call.k, call.v, call.layer)

    def run_layer(self, call: Call, batch: Any, cache: CacheTensors | None, layer: LayerTensors) -> Any:
        """Write, attend, add sinks, clear rows that attend to nothing."""
        from attn_dispatch.adapters.torch.layer_pass import run_pass

        return run_pass(self, call, batch, cache, layer)


def contiguous_runs(src: Ids, dst: Ids) -> list[tuple[int, int, int]]:
    """Return (first source, first target, count) of runs of blocks that lie one after the other on both sides."""
    if not len(src):
        return []
    ends = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    starts = np.concatenate([[0], ends])
    counts = np.diff(np.concatenate([starts, [len(src)]]))
    return [(int(src[i]), int(dst[i]), int(n)) for i, n in zip(starts, counts, strict=True)]
