"""`triton/paged`: one portable pair of Triton kernels over paged caches, for GPUs where no vendor's wheel is installed.

Loading this imports neither torch nor triton. What computes is in `launch` and `kernels`.

`ATTN_DISPATCH_TRITON_FIXED_MAXIMUM=<number>`, read when a step is planned, is FlashDecoding++ for decodes whose keys
are split: weights relative to that natural exponent, with a running maximum for tiles that have a row whose largest
score is too far from it (float16: over 2.7 below or 10.3 above; bfloat16 and float32: over 27 either way). Results stay
inside the same tolerance. It is off by default: no GPU has measured whether it is faster, and on RDNA it spills
registers (the compile cell says how many). See `fixed_maximum`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from attn_dispatch import (
    AttentionMetadata,
    AttentionSpec,
    Availability,
    Backend,
    Call,
    Capabilities,
    KVCache,
    Plan,
    Refusal,
    Verdict,
    platform,
)
from attn_dispatch.errors import ArrayError, PlanError
from attn_dispatch.hardware import by_name

from .constants import compute_type
from .planning import fits_into
from .targets import LARGEST_EXACT_HEAD, LARGEST_HEAD

if TYPE_CHECKING:
    import torch

    from .launch import Step, Store

__all__ = ["PagedBackend", "PagedPlan", "interpreted"]

_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "pytorch-triton")
_WIDE = ("float64", "uint8", "uint4")


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels; it reads this when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@dataclass(slots=True, eq=False, kw_only=True)
class PagedPlan(Plan):
    """A batch for every layer of a spec.

    Attributes:
        steps: what is on a device, by (device, whether there is a cache): made when first wanted there.
        capacity: keys that a sequence of a fixed plan can have at most (None: the plan is for its batch alone).
    """

    steps: dict[tuple[Any, bool], Step] = field(default_factory=dict)
    capacity: int | None = None

    def renew(self, metadata: AttentionMetadata) -> None:
        """Bring another batch into the buffers of a fixed plan, so that a captured graph computes it when replayed.

        Each sequence has as many new tokens as before; those that are over are padding (length 0, slots of -1). Costs
        one copy to each device that the plan is on, and no synchronisation.

        Raises:
            PlanError: the plan is not a fixed one, or the batch does not fit into it. Nothing has been changed.
        """
        if self.capacity is None:
            raise PlanError("only a fixed plan can be renewed: make it with the backend's fixed_plan")
        if metadata.block_size != self.spec.block_size:
            raise PlanError(f"the batch has block_size={metadata.block_size}, the plan {self.spec.block_size}")
        view = metadata.view(self.spec.kind)
        fits_into(self.view, view, self.capacity)
        for step in self.steps.values():
            step.renew(view)
        self.view, self.highest_block = view, view.side.highest_block


class PagedBackend(Backend):
    """Paged attention in Triton: what a GPU runs where nothing of its vendor's is installed."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True, fixed_plans=True)

    def probe(self) -> Availability:
        """Look for torch, Triton and a GPU that torch was built for; on a CPU, for Triton's interpreter variable."""
        for package in ("torch", "triton"):
            if find_spec(package) is None:
                return Availability(False, f"{package} is not installed", f"pip install {package}")
        found = _triton_version()
        if interpreted():
            reason = "TRITON_INTERPRET is set: kernels run in Triton's interpreter, on the CPU"
            return Availability(True, reason, version=found, evidence="simulated on CPU")
        hardware = by_name(platform.name)
        if hardware.torch_device == "cpu":
            reason = "no GPU here that Triton compiles for (NVIDIA, AMD, Intel)"
            remedy = "TRITON_INTERPRET=1 interprets the kernels on the CPU: for checking, not for speed"
            return Availability(False, reason, remedy, found)
        if platform.torch_device == "cpu":
            build = platform.facts.get("torch_flavor")
            reason = f"the installed torch ({build}) computes on the CPU, the machine has {platform.description}"
            remedy = f"Install torch's {hardware.torch_build} build, and ask for access to the device"
            return Availability(False, reason, remedy, found)
        return Availability(True, f"Triton {found} on {platform.description}", version=found)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but float64, the vendors' packed cache types, and heads that no tile holds."""
        found = []
        if spec.dtype == "float64":
            found.append(Refusal("dtype", spec.dtype, "sums are kept in float32", "Ask for float32, or for torch/sdpa"))
        if spec.kv_cache_dtype in _WIDE:
            accepts = "a cache of 16 or 32 bits, int8 or fp8"
            found.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for one of these"))
        largest = LARGEST_EXACT_HEAD if "float32" in (spec.dtype, compute_type(spec, True)) else LARGEST_HEAD
        for name in ("head_size", "value_head_size"):
            if getattr(spec, name) > largest:
                accepts = f"at most {largest}: a wider tile fits in no GPU's registers and shared memory"
                found.append(Refusal(name, getattr(spec, name), accepts, "Ask for torch/sdpa"))
        if found:
            return self.refuse(*found)
        return self.accept("runs in Triton's interpreter: for checking, not for speed" if interpreted() else "")

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
        """Return a zeroed tensor (device None: the platform's current one)."""
        import torch

        # A cache that was made in an inference_mode block could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=device or _default_device())

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache (device None: the platform's current one)."""
        cache = super().allocate(spec, num_blocks, device)
        cache.device = str(cache.key.device)
        return cache

    def indexable_view(self, array: torch.Tensor) -> torch.Tensor:
        """Return fp8 as its bytes: not every device can index fp8."""
        import torch

        return array.view(torch.uint8) if array.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else array

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> PagedPlan:
        """Cut the batch into tiles and bring them to the platform's current device, in one copy."""
        from .launch import step_on

        plan = PagedPlan(spec=spec, view=metadata.view(spec.kind))
        device, paged = _default_device(), spec.kind != "encoder" or plan.view.side.has_blocks
        plan.steps[device, paged] = step_on(spec, plan.view, device, paged)
        return plan

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> PagedPlan:
        """Prepare a step whose buffers stay: captured once in a graph, replayed after `plan.renew(metadata)`.

        Args:
            spec: the layers; their keys are in a cache.
            metadata: a batch of the shape that all others will have (padding included).
            max_seq_len: the most tokens that a sequence will ever have.

        Raises:
            PlanError: the batch does not fit, or the layer's keys are not in a cache.
        """
        from .launch import step_on

        plan = PagedPlan(spec=spec, view=metadata.view(spec.kind), capacity=max_seq_len)
        if not plan.view.side.has_blocks:
            raise PlanError("a fixed plan is for layers with a cache: the keys of this one are the batch's own")
        fits_into(plan.view, plan.view, max_seq_len)
        device = _default_device()
        plan.steps[device, True] = step_on(spec, plan.view, device, True, max_seq_len)
        return plan

    def run(self, call: Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values, then attend.

        Raises:
            ArrayError: arrays on different devices, or where Triton has none. Nothing has been written.
        """
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out, return_lse = call.cache, call.layer, call.out, call.return_lse
        from . import launch

        assert isinstance(plan, PagedPlan)
        device = q.device
        store: Store | None = None
        if cache is not None:
            bound = cache.backend_state.get(self.name)
            if bound is None:
                bound = cache.backend_state[self.name] = launch.Store(cache)
            assert isinstance(bound, launch.Store)
            store = bound
        arrays = (q, k, v, out, None if store is None else store.key)
        places = {x.device for x in arrays if x is not None}
        if len(places) > 1:
            listed = ", ".join(sorted(map(str, places)))
            raise ArrayError(f"q, k, v, out and the cache lie on {listed}: a step's arrays must be on one device")
        if device.type == "cpu" and not launch.INTERPRETED:
            raise ArrayError(f"q is on the CPU: {self.name} runs on GPUs (there only with TRITON_INTERPRET=1)")
        step = plan.steps.get((device, store is not None))
        if step is None:
            step = launch.step_on(plan.spec, plan.view, device, store is not None, plan.capacity)
            plan.steps[device, store is not None] = step
        owned = layer.memoize((self.name, device), lambda: launch.owned(plan.spec, layer, device))
        return launch.run(step, q, k, v, store, owned, out, return_lse=return_lse)


def _triton_version() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _default_device() -> torch.device:
    import torch

    kind = platform.torch_device
    if kind != "cpu" and getattr(torch, kind).is_available():
        return torch.device(kind, getattr(torch, kind).current_device())
    default: torch.device = torch.get_default_device()
    return default
