"""Tensors of one layer on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.contract import LayerParameters

__all__ = ["LayerTensors"]


@dataclass(frozen=True, eq=False, slots=True)
class LayerTensors:
    """Tensors of one layer on a device: ALiBi slopes, sinks, scales.

    Attributes:
        parameters: the same on the host.
        slopes: f32[H], or None.
        sinks: f32[H], or None.
        k_scale, v_scale: per-tensor scales of a quantised cache, as numbers.
        k_scale_dev, v_scale_dev: the same as f32[].
    """

    parameters: LayerParameters
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    k_scale: float
    v_scale: float
    k_scale_dev: torch.Tensor
    v_scale_dev: torch.Tensor

    @classmethod
    def of(cls, parameters: LayerParameters, device: torch.device) -> LayerTensors:
        """Return a layer's tensors on a device: brought there once per layer, not once per step."""
        tensors: LayerTensors = parameters.memoize((cls, device), lambda: cls._make(parameters, device))
        return tensors

    @classmethod
    def _make(cls, parameters: LayerParameters, device: torch.device) -> LayerTensors:
        def to_device(value: Any) -> torch.Tensor:
            return torch.tensor(value, dtype=torch.float32, device=device)

        slopes, sinks = parameters.alibi_slopes, parameters.sinks
        # Made in an inference_mode block, tensors could not be used outside of it: a layer outlives the block.
        with torch.inference_mode(False):
            return cls(
                parameters,
                None if slopes is None else to_device(slopes),
                None if sinks is None else to_device(sinks),
                parameters.k_scale,
                parameters.v_scale,
                to_device(parameters.k_scale),
                to_device(parameters.v_scale),
            )
