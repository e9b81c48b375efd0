"""`torch/sdpa`: scaled-dot-product attention over gathered pages, on whatever device torch has.

Loading this imports no torch. What computes is in `sdpa_call`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from attn_dispatch import AttentionSpec, Availability, Call, Capabilities, Refusal, Verdict, platform
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.adapters.torch.backend import TorchBackend
from attn_dispatch.hardware import by_name

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
    from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
    from attn_dispatch.adapters.torch.plan import DevicePlan

    from .launch_plan import SdpaBatch

__all__ = ["SdpaBackend"]


class SdpaBackend(TorchBackend):
    """The portable fallback: right on every device, as fast as torch's fused kernels over a gathered copy can be."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)

    def probe(self) -> Availability:
        """Say whether torch is installed, and whether this build of it is one for this machine's accelerator."""
        packages = Packages()
        if not packages.folders("torch"):
            return Availability(False, "torch is not installed", "pip install torch")
        version = packages.version("torch") or "unknown"  # a build from source need not have metadata
        what = "torch's scaled-dot-product attention over a gathered copy of the pages"
        hardware = by_name(platform.name)
        if platform.torch_device != hardware.torch_device:
            what += f"; this torch computes on the CPU, the machine has a device ({platform.name})"
            remedy = f"Install torch's {hardware.torch_build} build, and ask for access to the device"
            return Availability(True, what, remedy, version, "ran on CPU")
        return Availability(True, what, version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but the vendors' packed cache types."""
        if spec.kv_cache_dtype in ("uint8", "uint4"):
            accepts = "asymmetric integers have no layout here, only in a vendor's cache"
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for int8 or fp8"))
        if spec.dtype == "float64" and spec.kv_cache_dtype in ("float16", "bfloat16"):
            accepts = "torch rounds float64 to it by way of float32, which is another number at times"
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for float64 or float32"))
        return self.accept()

    @property
    def device_type(self) -> str:
        """The platform's device, if this torch has it."""
        return platform.torch_device

    def computes_on(self, device: torch.device) -> bool:
        """Torch's own kernels are on every device."""
        return True

    def default_device(self) -> torch.device:
        """Return the platform's current device, if torch can use it (torch's default is the user's to set)."""
        import torch

        kind = self.device_type
        if kind != "cpu" and getattr(torch, kind).is_available():
            return torch.device(kind, getattr(torch, kind).current_device())
        return torch.device("cpu")

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> SdpaBatch:
        """Group the batch's sequences into calls, and bring their indices and masks to a device."""
        from .launch_plan import SdpaBatch

        return SdpaBatch(plan.spec, plan.view, device)

    def run_layer(self, call: Call, batch: SdpaBatch, cache: CacheTensors | None, layer: LayerTensors) -> Any:
        """Write, gather and attend; see `sdpa_call.attend`."""
        import torch

        from .gathering import CacheRows
        from .sdpa_call import LayerInputs, attend

        rows: Any = None
        if call.cache is not None and cache is not None:
            state = call.cache.backend_state
            rows = state.get(self.name) or state.setdefault(self.name, CacheRows(cache.key, cache.value))
        inputs = call.layer.memoize((self.name, call.q.device), lambda: LayerInputs.of(layer))
        launch = batch.launch(call.return_lse)
        with torch.no_grad():
            return attend(launch, call.q, call.k, call.v, rows, inputs, call.out, return_lse=call.return_lse)
