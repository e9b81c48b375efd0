"""A call as the ragged function of vllm-xpu-kernels takes it. Imports torch and the vendor."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.adapters.torch.layer_pass import DeviceCall

from .availability import INSTALL_VLLM_XPU, load

__all__ = ["arguments", "attend"]

_interface: Any = load("vllm_xpu_kernels.flash_attn_interface", INSTALL_VLLM_XPU)


def attend(call: DeviceCall) -> torch.Tensor:
    """Attend; return the output [T, H, D]."""
    out = call.output()
    _interface.flash_attn_varlen_func(**arguments(call, out))
    return out


def arguments(call: DeviceCall, out: torch.Tensor) -> dict[str, Any]:
    """Return what `flash_attn_varlen_func` is given. Sinks are of the query's type."""
    spec, batch, q, sinks = call.spec, call.batch, call.q, call.layer.sinks
    return {
        "q": q,
        "k": call.key,
        "v": call.value,
        "max_seqlen_q": batch.host.max_query,
        "cu_seqlens_q": batch.query_start,
        "max_seqlen_k": batch.host.max_keys,
        "seqused_k": batch.lens,
        "softmax_scale": spec.scale,
        "causal": spec.causal,
        "window_size": list(spec.window),
        "block_table": batch.tables,
        "s_aux": None if sinks is None else sinks.to(q.dtype),
        "out": out,
    }
