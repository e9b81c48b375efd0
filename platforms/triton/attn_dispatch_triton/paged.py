"""`triton/paged`: one portable pair of Triton kernels over paged caches, for GPUs where no vendor's wheel is installed.

Loading this imports neither torch nor triton. What computes is in `launch` and `kernels`.

`ATTN_DISPATCH_TRITON_FIXED_MAXIMUM=<number>`, read when a step is planned, is FlashDecoding++ for decodes whose keys
are split: weights relative to that natural exponent, with a running maximum for tiles that have a row whose largest
score is too far from it (float16: over 2.7 below or 10.3 above; bfloat16 and float32: over 27 either way). Results stay
inside the same tolerance. It is off by default: no GPU has measured whether it is faster, and on RDNA it spills
registers (the compile check says how many). See `fixed_maximum`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attn_dispatch import AttentionSpec, Availability, Call, Capabilities, Refusal, Verdict, platform
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.adapters.torch.backend import TorchBackend
from attn_dispatch.hardware import by_name

from .constants import compute_type
from .targets import LARGEST_EXACT_HEAD, LARGEST_HEAD

if TYPE_CHECKING:
    import torch

    from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
    from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
    from attn_dispatch.adapters.torch.plan import DevicePlan

    from .paged_call import PagedBatch

__all__ = ["PagedBackend", "interpreted"]

_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "pytorch-triton")
_UNSTORED = ("float64", "uint8", "uint4")


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels; it reads this when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class PagedBackend(TorchBackend):
    """Paged attention in Triton: what a GPU runs where nothing of its vendor's is installed."""

    capabilities = Capabilities(libraries=("torch",), nan_safe=True, fixed_plans=True)

    def probe(self) -> Availability:
        """Look for torch, Triton and a GPU that torch was built for; on a CPU, for Triton's interpreter variable."""
        for package in ("torch", "triton"):
            if find_spec(package) is None:
                return Availability(False, f"{package} is not installed", f"pip install {package}")
        version = Packages().version(*_DISTRIBUTIONS)
        if interpreted():
            reason = "TRITON_INTERPRET is set: kernels run in Triton's interpreter, on the CPU"
            return Availability(True, reason, version=version, evidence="simulated on CPU")
        hardware = by_name(platform.name)
        if hardware.torch_device == "cpu":
            reason = "no GPU here that Triton compiles for (NVIDIA, AMD, Intel)"
            remedy = "TRITON_INTERPRET=1 interprets the kernels on the CPU: for checking, not for speed"
            return Availability(False, reason, remedy, version)
        if platform.torch_device == "cpu":
            build = platform.facts.get("torch_flavor")
            reason = f"the installed torch ({build}) computes on the CPU, the machine has {platform.description}"
            remedy = f"Install torch's {hardware.torch_build} build, and ask for access to the device"
            return Availability(False, reason, remedy, version)
        return Availability(True, f"Triton {version} on {platform.description}", version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but float64, the vendors' packed cache types, and heads that no tile holds."""
        refusals = []
        if spec.dtype == "float64":
            refusals.append(Refusal("dtype", spec.dtype, "sums are kept in float32", "Ask for float32, or torch/sdpa"))
        if spec.kv_cache_dtype in _UNSTORED:
            accepts = "a cache of 16 or 32 bits, int8 or fp8"
            refusals.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for one of these"))
        largest = LARGEST_EXACT_HEAD if "float32" in (spec.dtype, compute_type(spec, True)) else LARGEST_HEAD
        for name in ("head_size", "value_head_size"):
            if getattr(spec, name) > largest:
                accepts = f"at most {largest}: a wider tile fits in no GPU's registers and shared memory"
                refusals.append(Refusal(name, getattr(spec, name), accepts, "Ask for torch/sdpa"))
        if refusals:
            return self.refuse(*refusals)
        return self.accept("runs in Triton's interpreter: for checking, not for speed" if interpreted() else "")

    @property
    def device_type(self) -> str:
        """What torch calls this machine's GPUs; "cpu" for the interpreter."""
        if interpreted():
            return "cpu"
        return "cuda" if platform.torch_device == "cpu" else platform.torch_device

    def device_batch(self, plan: DevicePlan, device: torch.device, *, paged: bool) -> PagedBatch:
        """Return the plan's batch on a device, cut into tiles."""
        from .paged_call import PagedBatch

        return PagedBatch(plan, device, paged=paged)

    def run_layer(self, call: Call, batch: Any, cache: CacheTensors | None, layer: LayerTensors) -> Any:
        """Write the new keys and values, then attend."""
        from .paged_call import run_layer

        return run_layer(call, batch, cache, layer)
