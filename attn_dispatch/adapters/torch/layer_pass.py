"""One layer's pass around a vendor's function: write, attend, sinks, and rows that attend to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
from attn_dispatch.adapters.torch.device_batch import on_device
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
from attn_dispatch.backend import Call
from attn_dispatch.contract import AttentionSpec

__all__ = ["DeviceCall", "Vendor", "add_sinks", "empty_result", "run_pass"]


@dataclass(slots=True, eq=False)
class DeviceCall:
    """One layer's call, on one device, as a vendor's function is given it.

    Attributes:
        batch: the backend's `DeviceBatch`.
        q: [T, H, D], elements of a row lie together.
        k, v: [rows, K, D], likewise; None when nothing is written.
        cache: the cache's arrays; None: k and v are attended to.
        layer: slopes, sinks, scales.
        out: [T, H, Dv], contiguous, to write into; None: the function makes its output.
        return_lse: the LSE is wanted.
    """

    batch: Any
    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    cache: CacheTensors | None
    layer: LayerTensors
    out: torch.Tensor | None
    return_lse: bool

    @property
    def spec(self) -> AttentionSpec:
        """The layer's spec."""
        spec: AttentionSpec = self.batch.spec
        return spec

    @property
    def key(self) -> torch.Tensor:
        """The keys that are attended to: the cache's, in its layout, or rows [rows, K, D]."""
        key = self.k if self.cache is None else self.cache.key
        assert key is not None
        return key

    @property
    def value(self) -> torch.Tensor:
        """The values; see `key`."""
        value = self.v if self.cache is None else self.cache.value
        assert value is not None
        return value

    def output(self) -> torch.Tensor:
        """Return `out`, or an output of its shape."""
        if self.out is not None:
            return self.out
        return self.q.new_empty((self.q.shape[0], self.spec.num_heads, self.spec.value_head_size))


class Vendor(Protocol):
    """A vendor's functions, in the contract's terms."""

    contiguous_rows: bool
    """Its functions know no strides: q, k and v are given contiguous."""

    def write(self, call: DeviceCall) -> None:
        """Store `call.k` and `call.v` in the slots of the batch."""

    def sinks_inside(self, call: DeviceCall) -> bool:
        """Whether its function takes this layer's sinks; otherwise they are added to what it returns."""

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [T, H, Dv], and when wanted the LSE, natural, f32[T, H] (f64 of a float64 layer)."""


def empty_result(call: Call) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the result of a step without query rows."""
    spec, q = call.plan.spec, call.q
    result = q.new_empty((0, spec.num_heads, spec.value_head_size)) if call.out is None else call.out
    return (result, q.new_empty((0, spec.num_heads), dtype=torch.float32)) if call.return_lse else result


def run_pass(
    vendor: Vendor, call: Call, batch: Any, cache: CacheTensors | None, layer: LayerTensors
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write the new keys and values, then attend; nothing waits for the device."""
    out = call.out
    with torch.no_grad(), on_device(call.q.device):
        q, k, v = (None if x is None else _rows(x, vendor.contiguous_rows) for x in (call.q, call.k, call.v))
        direct = out if out is not None and out.is_contiguous() and not out.requires_grad else None
        on = DeviceCall(batch, q, k, v, cache, layer, direct, call.return_lse)
        if cache is not None and k is not None and batch.writes is not None:
            vendor.write(on)
        if not batch.host.num_tokens:  # an encoder's keys may come in a step without queries
            return empty_result(call)
        sinks = layer.sinks
        inside = sinks is not None and vendor.sinks_inside(on)
        on.return_lse = call.return_lse or (sinks is not None and not inside)
        result, lse = vendor.attend(on)
        if batch.idle is not None and lse is not None:
            lse = torch.where(batch.idle, sinks, lse) if inside else lse.masked_fill(batch.idle, -torch.inf)
        if sinks is not None and not inside:
            assert lse is not None
            lse = add_sinks(result, lse, sinks)
        if batch.idle is not None:
            result.masked_fill_(batch.idle.unsqueeze(-1), 0)
        if out is not None and result is not out:
            out.copy_(result)
            result = out
    if not call.return_lse:
        return result
    assert lse is not None
    return result, lse.float()


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Put one more logit per head into the denominators of an output, in place; return the LSE with it.

    softmax with a sink is softmax without one, times exp(lse) / (exp(lse) + exp(sink)).

    Args:
        out: [T, H, Dv], changed.
        lse: f32[T, H], without the sink.
        sinks: f32[H].
    """
    out.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1))
    return torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))


def _rows(array: torch.Tensor, contiguous: bool) -> torch.Tensor:
    """Return rows whose elements lie together and that are no part of a graph."""
    rows = array.detach()
    return rows.contiguous() if contiguous or rows.stride(2) != 1 else rows
