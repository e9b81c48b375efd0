"""One layer's pass around the vendor's call: write, attend, sinks, and rows that attend to nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.contract import AttentionSpec, LayerParameters

from .step import Step
from .store import Store

__all__ = ["Owned", "nothing", "owned", "run", "with_sinks"]


@dataclass(frozen=True, eq=False, slots=True)
class Owned:
    """What a layer owns, on a device.

    Attributes:
        slopes: f32[H].
        sinks: f32[H].
        k_scale: f32[], None for 1; v_scale likewise.
        v_scale: see k_scale.
        one: f32[], 1.
    """

    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    one: torch.Tensor


def owned(layer: LayerParameters, device: torch.device) -> Owned:
    """Bring what a layer owns to a device: once per layer, not once per step."""

    def there(value: Any) -> torch.Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.float32, device=device)

    with torch.inference_mode(False):
        return Owned(
            there(layer.alibi_slopes),
            there(layer.sinks),
            there(layer.k_scale) if layer.k_scale != 1 else None,
            there(layer.v_scale) if layer.v_scale != 1 else None,
            torch.ones((), dtype=torch.float32, device=device),
        )


def nothing(
    spec: AttentionSpec, q: torch.Tensor, out: torch.Tensor | None, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the result of a step without rows."""
    result = q.new_empty((0, spec.num_heads, spec.value_head_size)) if out is None else out
    return (result, q.new_empty((0, spec.num_heads), dtype=torch.float32)) if return_lse else result


def run(
    step: Step,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    store: Store | None,
    layer: Owned,
    out: torch.Tensor | None,
    *,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write the new keys and values, then attend; nothing waits for the device."""
    spec, call = step.spec, step.call
    call.check(step)
    with torch.no_grad(), on(q.device):
        keys, values = (None if x is None else _rows(x) for x in (k, v))
        if store is not None and keys is not None and values is not None:
            step.write(store, keys, values, layer.k_scale, layer.v_scale)
        if not step.batch.num_tokens:  # an encoder's keys may come in a step without queries
            return nothing(spec, q, out, return_lse)
        key, value = (keys, values) if store is None else (store.key, store.value)
        assert key is not None
        assert value is not None
        direct = out if out is not None and out.is_contiguous() and not out.requires_grad else None
        target = q.new_empty((len(q), spec.num_heads, spec.value_head_size)) if direct is None else direct
        outside = layer.sinks is not None and not call.sinks_inside(step)
        result, lse = call.attend(step, _rows(q), key, value, layer, target, lse=return_lse or outside)
        if step.idle is not None and lse is not None:
            lse = lse.masked_fill(step.idle, -torch.inf)
        if outside:
            assert lse is not None
            assert layer.sinks is not None
            lse = with_sinks(result, lse, layer.sinks)
        if step.idle is not None:
            result.masked_fill_(step.idle.unsqueeze(-1), 0)
        if out is not None and result is not out:
            out.copy_(result)
            result = out
    if not return_lse:
        return result
    assert lse is not None
    return result, lse


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Put one more logit per head into the denominators of an output, in place; return the LSE with it.

    softmax with a sink is softmax without one, times exp(lse) / (exp(lse) + exp(sink)).

    Args:
        out: [T, H, Dv], changed.
        lse: f32[T, H], without the sink.
        sinks: f32[H].
    """
    out.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1))
    return torch.logaddexp(lse, sinks.expand_as(lse))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, if it is not: vendors launch on the current stream of the current GPU."""
    if device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    context: AbstractContextManager[Any] = torch.cuda.device(device)
    return context


def _rows(array: torch.Tensor) -> torch.Tensor:
    """Return rows that lie together and are no part of a graph: some of the kernels know one stride only."""
    return array.detach().contiguous()
