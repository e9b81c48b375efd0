"""`torch/sdpa`: scaled-dot-product attention over gathered pages, on whatever device torch has.

Loading this imports no torch. What computes is in `attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
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
    LayerParameters,
    Refusal,
    Verdict,
    platform,
)
from attn_dispatch.errors import ArrayError
from attn_dispatch.hardware import by_name

from .plan import SdpaPlan

if TYPE_CHECKING:
    import torch

    from .attend import Owned
    from .step import Step
    from .store import Store

__all__ = ["SdpaBackend"]


class SdpaBackend(Backend):
    """The portable fallback: right on every device, as fast as torch's fused kernels over a gathered copy can be."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)

    def probe(self) -> Availability:
        """Say whether torch is installed, and whether this build of it is one for this machine's accelerator."""
        if find_spec("torch") is None:
            return Availability(False, "torch is not installed", "pip install torch")
        try:
            found = version("torch")
        except PackageNotFoundError:  # a build from source need not have metadata
            found = "unknown"
        what = "torch's scaled-dot-product attention over a gathered copy of the pages"
        hardware = by_name(platform.name)
        if platform.torch_device != hardware.torch_device:
            what += f"; this torch computes on the CPU, the machine has a device ({platform.name})"
            remedy = f"Install torch's {hardware.torch_build} build, and ask for access to the device"
            return Availability(True, what, remedy, found, "ran on CPU")
        return Availability(True, what, version=found)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but the vendors' packed cache types."""
        if spec.kv_cache_dtype in ("uint8", "uint4"):
            accepts = "asymmetric integers have no layout here, only in a vendor's cache"
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for int8 or fp8"))
        return self.accept()

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
        """Return a zeroed tensor."""
        import torch

        # A cache that was made in an inference_mode block could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=device or _default_device())

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache (device None: the platform's, if this torch has it; else torch's default)."""
        cache = super().allocate(spec, num_blocks, device)
        cache.device = str(cache.key.device)
        return cache

    def indexable_view(self, array: torch.Tensor) -> torch.Tensor:
        """Return fp8 as its bytes: not every device can index fp8."""
        import torch

        return array.view(torch.uint8) if array.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else array

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> SdpaPlan:
        """Prepare a step. On a machine with a CPU alone all of it is done here, else at the first run on a device."""
        plan = SdpaPlan(spec=spec, view=metadata.view(spec.kind))
        if platform.torch_device == "cpu":
            self._step_on(plan, _default_device(), spec.returns_lse)
        return plan

    def run(self, call: Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write, gather and attend; see `attend.attend`.

        Raises:
            ArrayError: arrays on different devices. Nothing has been written.
        """
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out, return_lse = call.cache, call.layer, call.out, call.return_lse
        assert isinstance(plan, SdpaPlan)
        device = q.device
        store: Store | None = None
        if cache is not None:
            store = cache.backend_state.get(self.name) or self._bind(cache)  # type: ignore[assignment]
            if store.device != device:  # type: ignore[union-attr]
                raise ArrayError(
                    f"q is on {device}, the cache on {cache.device}: allocate(..., device={str(device)!r}), or move q"
                )
        if k is not None and (k.device != device or v.device != device):  # type: ignore[union-attr]
            raise _elsewhere(q, k, v)
        if out is not None and out.device != device:
            raise _elsewhere(q, out)
        if q.requires_grad or (k is not None and (k.requires_grad or v.requires_grad)):  # type: ignore[union-attr]
            # Attention over a cache has no gradient, and the cache must not become part of a graph.
            q, k, v = (None if x is None else x.detach() for x in (q, k, v))
        step = plan.steps.get((device, return_lse))
        if step is None:
            step = self._step_on(plan, device, return_lse)
        owned = layer.memoize((self.name, device), lambda: _owned(layer, device))
        return self._attend(step, q, k, v, store, owned, out, return_lse=return_lse)

    @cached_property
    def _attend(self) -> Callable[..., Any]:
        from .attend import attend

        return attend

    @cached_property
    def _step_on(self) -> Callable[..., Step]:
        from .step import step_on

        return step_on

    def _bind(self, cache: KVCache) -> Store:
        from .store import Store

        arrays = cache.arrays_as("torch")
        store = cache.backend_state[self.name] = Store(arrays["key"], arrays["value"])
        return store


def _elsewhere(*arrays: Any) -> ArrayError:
    places = ", ".join(dict.fromkeys(str(array.device) for array in arrays))
    return ArrayError(f"q, k, v and out lie on {places}: a step's arrays must be on one device, where the cache is")


def _default_device() -> torch.device:
    import torch

    kind = platform.torch_device
    if kind != "cpu" and getattr(torch, kind).is_available():
        return torch.device(kind, getattr(torch, kind).current_device())
    return torch.device("cpu")  # not torch's default device, which is the user's to set


def _owned(layer: LayerParameters, device: torch.device) -> Owned:
    """Return what a layer owns as tensors on a device."""
    import torch

    from .attend import Owned

    def there(value: Any) -> torch.Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.float32, device=device)

    with torch.inference_mode(False):
        return Owned(
            slopes=there(layer.alibi_slopes),
            sinks=there(layer.sinks),
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            k_scale_there=there(layer.k_scale) if layer.k_scale != 1 else None,
            v_scale_there=there(layer.v_scale) if layer.v_scale != 1 else None,
        )
