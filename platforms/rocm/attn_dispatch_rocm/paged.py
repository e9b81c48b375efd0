"""What the backends of this folder have in common: paged caches on AMD GPUs, and the steps around a vendor's call.

torch calls AMD's GPUs "cuda", and so does this.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import attn_dispatch
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Refusal, Verdict
from attn_dispatch.contract import NHD, AttentionMetadata, AttentionSpec, CacheLayout, KVCache
from attn_dispatch.errors import ArrayError, CacheError

from . import layouts
from .machine import Machine

if TYPE_CHECKING:
    import torch

    from .layer import Owned
    from .step import RocmPlan, Step
    from .store import Store

__all__ = ["ELSEWHERE", "UNTRIED", "PagedRocmBackend", "plain_refusals"]

UNTRIED = "by the vendor's sources; never run on an AMD GPU by this project"
ELSEWHERE = "Ask for triton/paged or torch/sdpa"

KNOWN_LAYOUTS = (layouts.VLLM_X4, layouts.VLLM_X8, layouts.VLLM_X16)
"""Named with the backends, so that a cache of theirs can be converted once one of them is loaded."""


def plain_refusals(spec: AttentionSpec, vendor: str) -> list[Refusal]:
    """Refuse what no vendor here computes."""
    if spec.dtype in ("float16", "bfloat16"):
        return []
    accepts = f"{vendor} computes in float16 and bfloat16"
    return [Refusal("dtype", spec.dtype, accepts, f"Ask for bfloat16, or {ELSEWHERE[0].lower()}{ELSEWHERE[1:]}")]


class PagedRocmBackend(Backend):
    """A vendor's attention over a paged cache on an AMD GPU."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",))
    device_type: ClassVar[str] = "cuda"

    def __init__(self, name: str, machine: Machine | None = None) -> None:
        super().__init__(name)
        self._given = machine

    @cached_property
    def machine(self) -> Machine:
        """The machine that `probe` and `verdict` speak of: this one, unless another was given."""
        return self._given or Machine(attn_dispatch.platform)

    @abstractmethod
    def probe(self) -> Availability:
        """See `Backend.probe`."""

    @abstractmethod
    def verdict(self, spec: AttentionSpec) -> Verdict:
        """See `Backend.verdict`."""

    @abstractmethod
    def step(self, spec: AttentionSpec, plan: RocmPlan, device: torch.device, *, paged: bool) -> Step:
        """Return the plan's batch on a device, with what will be called for it."""

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

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

    def target_of(self, device: torch.device) -> str:
        """Return a GPU's target: the machine's, or of several what torch says of this one."""
        import torch

        targets = self.machine.targets
        if len(targets) == 1 or device.type != "cuda":
            return targets[0] if targets else ""
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache."""
        cache = super().allocate(spec, num_blocks, device)
        cache.device = str(cache.key.device)
        return cache

    def indexable_view(self, array: torch.Tensor) -> torch.Tensor:
        """Return fp8 as its bytes: not every operation indexes fp8."""
        import torch

        return array.view(torch.uint8) if array.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else array

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> RocmPlan:
        """Cut the batch for the vendor's kernels and bring it to the current GPU, in one copy."""
        from .step import RocmPlan

        plan = RocmPlan(spec=spec, view=metadata.view(spec.kind))
        if plan.num_tokens or plan.num_new:
            self._step_on(plan, self.default_device(), paged=spec.kind != "encoder" or plan.view.side.has_blocks)
        return plan

    def _step_on(self, plan: RocmPlan, device: torch.device, *, paged: bool) -> Step:
        step = plan.steps[device, paged] = self.step(plan.spec, plan, device, paged=paged)
        return step

    def run(self, call: Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values, then attend.

        Raises:
            ArrayError: arrays on different devices, or not on a GPU. Nothing has been written.
        """
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out, return_lse = call.cache, call.layer, call.out, call.return_lse
        from . import layer as layers
        from .step import RocmPlan

        assert isinstance(plan, RocmPlan)
        device = q.device
        store: Store | None = None
        if cache is not None:
            store = cache.backend_state.get(self.name) or self._bind(cache)  # type: ignore[assignment]
            if store.device != device:  # type: ignore[union-attr]
                raise ArrayError(
                    f"q is on {device}, the cache on {cache.device}: allocate(..., device={str(device)!r}), or move q"
                )
        if any(x is not None and x.device != device for x in (k, v, out)):
            places = ", ".join(dict.fromkeys(str(x.device) for x in (q, k, v, out) if x is not None))
            raise ArrayError(f"q, k, v and out lie on {places}: a step's arrays must be on one device")
        if device.type != self.device_type:
            raise ArrayError(f"q is on {device}: {self.name} computes on AMD GPUs, and so must its arrays be")
        if not (plan.num_tokens or plan.num_new):
            return layers.nothing(plan.spec, q, out, return_lse)
        step = plan.steps.get((device, store is not None))
        if step is None:
            step = self._step_on(plan, device, paged=store is not None)
        owned: Owned = layer.memoize((self.name, device), lambda: layers.owned(layer, device))
        return layers.run(step, q, k, v, store, owned, out, return_lse=return_lse)

    def _bind(self, cache: KVCache) -> Store:
        from .store import Store

        store = cache.backend_state[self.name] = Store(cache)
        return store
