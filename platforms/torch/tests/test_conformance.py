"""The kit against torch/sdpa: on this machine's device, and by the code that other devices run, on CPU tensors."""

from __future__ import annotations

from typing import Any

from attn_dispatch.conformance import BackendConformance
from attn_dispatch_torch.plan import SdpaPlan
from attn_dispatch_torch.sdpa import SdpaBackend
from attn_dispatch_torch.step import Step, make_step


class TestSdpa(BackendConformance):
    backend = "torch/sdpa"


class Portable(SdpaBackend):
    """Takes the path of CUDA, ROCm, XPU and MPS: `scaled_dot_product_attention`, boolean masks, no scratch memory."""

    def _step_on(self, plan: SdpaPlan, device: Any, return_lse: bool) -> Step:
        step = make_step(plan.spec, plan.view, device, return_lse or plan.spec.sinks, cpu=False)
        return plan.steps.setdefault((device, return_lse), step)


class TestPortable(BackendConformance):
    backend = Portable("torch/portable")
    examples = 30
