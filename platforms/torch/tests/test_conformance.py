"""The kit against torch/sdpa: on this machine's device, and by the code that other devices run, on CPU tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_dispatch.conformance import BackendConformance
from attn_dispatch_torch.launch_plan import SdpaBatch
from attn_dispatch_torch.sdpa import SdpaBackend


class TestSdpa(BackendConformance):
    backend = "torch/sdpa"
    evidence = Path(__file__).parents[3] / "docs" / "evidence" / "torch-sdpa.json"


class Portable(SdpaBackend):
    """Takes the path of CUDA, ROCm, XPU and MPS: `scaled_dot_product_attention`, boolean masks, no scratch memory."""

    def device_batch(self, plan: Any, device: Any, *, paged: bool) -> SdpaBatch:
        return SdpaBatch(plan.spec, plan.view, device, cpu=False)


class TestPortable(BackendConformance):
    backend = Portable("torch/portable")
    examples = 30
