"""A call as IPEX's ragged op for Intel GPUs takes it. Imports torch and IPEX."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.adapters.torch.layer_pass import DeviceCall

from .availability import INSTALL_XPU, load

__all__ = ["arguments", "attend"]

_PAGED: Any = load("intel_extension_for_pytorch", INSTALL_XPU).llm.modules.PagedAttention


def attend(call: DeviceCall) -> torch.Tensor:
    """Attend; return the output [T, H, D]."""
    out = call.output()
    positional, named = arguments(call, out)
    _PAGED.flash_attn_varlen_func(*positional, **named)
    return out


def arguments(call: DeviceCall, out: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `flash_attn_varlen_func` is given: by position what IPEX's two builds name differently."""
    spec, batch = call.spec, call.batch
    lengths = (batch.query_start, batch.key_start, batch.host.max_query, batch.host.max_keys)
    positional = (out, call.q, call.key, call.value, *lengths, spec.scale, spec.causal, batch.tables, None)
    named = {
        "window_size_left": spec.window[0],
        "window_size_right": spec.window[1],
        "softcap": spec.logits_soft_cap or -1.0,
    }
    return positional, named
