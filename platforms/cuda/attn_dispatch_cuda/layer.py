"""One layer's pass, around the vendor's call: write, attend, sinks, and rows that attend to nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch.contract import AttentionSpec, LayerParameters

from .step import Step
from .store import Store

if TYPE_CHECKING:
    from .paged import PagedCudaBackend

__all__ = ["Owned", "nothing", "owned", "run", "with_sinks"]


@dataclass(frozen=True, eq=False, slots=True)
class Owned:
    """What a layer owns, on a device.

    Attributes:
        slopes: f32[H].
        sinks: f32[H].
        sinks_bf16: the same as bfloat16, where that loses nothing.
        k_scale, v_scale: as numbers.
        k_scale_there, v_scale_there: as f32[], where not 1.
    """

    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    sinks_bf16: torch.Tensor | None
    k_scale: float
    v_scale: float
    k_scale_there: torch.Tensor | None
    v_scale_there: torch.Tensor | None


def owned(layer: LayerParameters, device: torch.device) -> Owned:
    """Bring what a layer owns to a device."""

    def there(value: Any) -> torch.Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.float32, device=device)

    with torch.inference_mode(False):
        narrow = None
        if layer.sinks is not None:
            host = torch.tensor(layer.sinks)
            narrow = host.bfloat16() if torch.equal(host.bfloat16().float(), host) else None
        return Owned(
            there(layer.alibi_slopes),
            there(layer.sinks),
            None if narrow is None else narrow.to(device),
            layer.k_scale,
            layer.v_scale,
            there(layer.k_scale) if layer.k_scale != 1 else None,
            there(layer.v_scale) if layer.v_scale != 1 else None,
        )


def nothing(
    spec: AttentionSpec, q: torch.Tensor, out: torch.Tensor | None, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the result of a step without rows."""
    result = q.new_empty((0, spec.num_heads, spec.value_head_size)) if out is None else out
    return (result, q.new_empty((0, spec.num_heads), dtype=torch.float32)) if return_lse else result


def run(
    backend: PagedCudaBackend,
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
    with torch.no_grad(), on(q.device):
        keys, values = (None if x is None else _rows(x) for x in (k, v))
        if store is not None and keys is not None and values is not None:
            step.write(store, keys, values, layer)
        if not step.batch.num_tokens:  # an encoder's keys may come in a step without queries
            return nothing(step.spec, q, out, return_lse)
        inside = layer.sinks is not None and backend.sinks_inside(step, layer)
        outside = layer.sinks is not None and not inside
        direct = out if out is not None and out.is_contiguous() and not out.requires_grad else None
        result, lse = backend.attend(
            step, _rows(q), keys, values, store, layer, direct, wants_lse=return_lse or outside
        )
        if step.idle is not None and lse is not None:
            assert layer.sinks is not None or not inside
            lse = torch.where(step.idle, layer.sinks, lse) if inside else lse.masked_fill(step.idle, -torch.inf)
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
    return torch.logaddexp(lse, sinks)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, if it is not: vendors launch on the current stream of the current GPU."""
    if device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    context: AbstractContextManager[Any] = torch.cuda.device(device)
    return context


def _rows(array: torch.Tensor) -> torch.Tensor:
    """Return rows whose elements lie together and that are no part of a graph."""
    plain = array.detach()
    return plain if plain.stride(2) == 1 else plain.contiguous()
