"""The computation of `torch/sdpa`: write, gather, attend.

torch's CPU flash kernel returns the log-sum-exp beside the output, takes additive masks, strided inputs and grouped
heads, and is used for everything that it can do. What it cannot do (soft-cap), and the LSE on other devices, is written
out in float32.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attn_dispatch.adapters.torch.layer_tensors import LayerTensors

from .gathering import CacheRows, gather
from .launch_plan import DecodeLaunch, LaunchPlan, PrefillLaunch, TileLaunch

__all__ = ["LayerInputs", "attend"]


def _compute_on_one_thread() -> None:
    """OpenMP's threads are the parent's: a child that asked for theirs would wait for ever. One thread needs none."""
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_on_one_thread)


class LayerInputs(NamedTuple):
    """Tensors of one layer on its device: f32[H] slopes and sinks, and the scales of a quantised cache (None for 1)."""

    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    k_scale_dev: torch.Tensor | None = None
    v_scale_dev: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: LayerTensors) -> LayerInputs:
        """Return a layer's tensors, without scales that are 1."""
        k_scale, v_scale = (
            None if scale == 1 else tensor
            for scale, tensor in ((layer.k_scale, layer.k_scale_dev), (layer.v_scale, layer.v_scale_dev))
        )
        return cls(layer.slopes, layer.sinks, layer.k_scale, layer.v_scale, k_scale, v_scale)


_NO_TENSORS = LayerInputs()


def attend(
    launch: LaunchPlan,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheRows | None,
    layer: LayerInputs = _NO_TENSORS,
    out: torch.Tensor | None = None,
    *,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write the new keys and values, then attend.

    Args:
        launch: the batch, on q's device.
        q: [T, H, D].
        k: [rows, K, D].
        v: [rows, K, Dv].
        cache: None: attend to k and v.
        layer: slopes, sinks and scales.
        out: [T, H, Dv] to write into.
        return_lse: also return f32[T, H].
    """
    if cache is not None and k is not None and v is not None and launch.write_rows is not None:
        cache.key.write(launch, k, layer.k_scale_dev)
        cache.value.write(launch, v, layer.v_scale_dev)
    if cache is None:
        layer = layer._replace(k_scale=1.0, v_scale=1.0)  # they belong to what is stored
    wants_lse = return_lse or layer.sinks is not None
    if launch.single_group and out is None:
        result, lse = _attend_decodes(launch, launch.decodes[0], q, cache, layer, wants_lse)
        return (result, lse) if return_lse else result
    spec = launch.spec
    if out is None:
        out = q.new_empty((launch.num_tokens, spec.num_heads, spec.value_head_size))
    lses = q.new_empty((launch.num_tokens, spec.num_heads), dtype=torch.float32) if return_lse else None
    for decode in launch.decodes:
        rows = decode.rows
        picked = q[rows] if isinstance(rows, slice) else q.index_select(0, rows)
        result, lse = _attend_decodes(launch, decode, picked, cache, layer, wants_lse)
        _put(out, rows, result)
        if lses is not None and lse is not None:
            _put(lses, rows, lse)
    for prefill in launch.prefills:
        _attend_prefill(launch, prefill, q, k, v, cache, layer, out, lses)
    for rows in launch.rows_without_keys:
        out[rows] = 0
        if lses is not None:
            # The sum of what such a row attends to is its sink alone.
            lses[rows] = -torch.inf if layer.sinks is None else layer.sinks
    return out if lses is None else (out, lses)


def _put(target: torch.Tensor, rows: slice | torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] = values
    else:
        target.index_copy_(0, rows, values)


def _attend_decodes(
    launch: LaunchPlan,
    decode: DecodeLaunch,
    q: torch.Tensor,
    cache: CacheRows | None,
    layer: LayerInputs,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend for q [G * n, H, D]; return [G * n, H, Dv] in q's type, and f32[G * n, H]."""
    spec, size, n = launch.spec, decode.size, decode.queries
    heads, group = spec.num_kv_heads, spec.group_size
    assert cache is not None
    key, value = gather(launch, decode, cache)
    if n > 1:
        q = q.reshape(size, n, heads, group, -1).transpose(1, 2)
    bias = decode.mask
    if decode.distance is not None:
        assert layer.slopes is not None
        slopes = layer.slopes.view(1, heads, 1, group, 1)
        distance = (decode.distance * -slopes).view(size, heads, n * group, -1)
        bias = distance if bias is None else distance.add_(bias)
    result, lse = _softmax(launch, q.reshape(*decode.shape, n * group, -1), key, value, bias, False, layer, return_lse)
    if n > 1:
        result = result.view(size, heads, n, group, -1).transpose(1, 2)
        lse = None if lse is None else lse.view(size, heads, n, group).transpose(1, 2)
    result = result.reshape(size * n, spec.num_heads, -1)
    lse = None if lse is None else lse.reshape(size * n, spec.num_heads)
    return _finish(result, lse, q.dtype, layer)


def _attend_prefill(
    launch: LaunchPlan,
    prefill: PrefillLaunch,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheRows | None,
    layer: LayerInputs,
    out: torch.Tensor,
    lses: torch.Tensor | None,
) -> None:
    """Attend for one sequence, tile by tile, into out [T, H, Dv] and lses f32[T, H]."""
    spec = launch.spec
    heads = spec.num_kv_heads
    if prefill.index is None:
        assert k is not None
        assert v is not None
        key, value = (_dense(x[prefill.new].to(launch.compute).transpose(0, 1)) for x in (k, v))
    else:
        assert cache is not None
        key, value = gather(launch, prefill, cache)
    wants_lse = lses is not None or layer.sinks is not None
    for tile in prefill.tiles:
        rows = q[tile.rows]
        part_k, part_v = key[:, tile.low : tile.high], value[:, tile.low : tile.high]
        if launch.cpu and not launch.materialise_scores:
            # The CPU kernel knows grouped heads: [1, H, t, D] on [1, K, w, D].
            queries = rows.transpose(0, 1)[None]
            part_k, part_v = part_k[None], part_v[None]
        else:
            # [K, g, t, D] on [K, g, w, D]: the group is an axis along which keys and values do not move.
            queries = rows.view(-1, heads, spec.group_size, spec.head_size).permute(1, 2, 0, 3)
            part_k, part_v = part_k[:, None], part_v[:, None]
        bias = _tile_bias(tile, queries, layer)
        result, lse = _softmax(launch, queries, part_k, part_v, bias, tile.causal, layer, wants_lse)
        result = result.flatten(0, 1).transpose(0, 1)
        lse = None if lse is None else lse.flatten(0, 1).transpose(0, 1)
        result, lse = _finish(result, lse, q.dtype, layer)
        out[tile.rows] = result
        if lses is not None:
            lses[tile.rows] = lse


def _tile_bias(tile: TileLaunch, queries: torch.Tensor, layer: LayerInputs) -> torch.Tensor | None:
    mask = None if tile.mask is None else tile.mask[None, None]
    if tile.distance is None:
        return mask
    assert layer.slopes is not None
    distance = tile.distance * -layer.slopes.view(*queries.shape[:2], 1, 1)
    return distance if mask is None else distance.add_(mask)


def _softmax(
    launch: LaunchPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    layer: LayerInputs,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return softmax(scores) v [b, h, t, Dv] and their LSE [b, h, t], sinks and the values' scale left out.

    Args:
        launch: says which kernel, and the scale.
        q: [b, h, t, D].
        k: [b, h or fewer, w, D], of the type that is computed with.
        v: [b, h or fewer, w, Dv].
        bias: broadcasts to [b, h, t, w]: what is added to the scores, or (other devices' fused kernels) who sees whom.
        causal: a lower triangle; t == w.
        layer: slopes, sinks and scales.
        return_lse: the LSE is wanted.
    """
    spec = launch.spec
    q = q.to(k.dtype)
    scale = spec.scale * layer.k_scale
    if launch.materialise_scores:
        return _materialised(q, k, v, bias, scale, spec.logits_soft_cap)
    if not launch.cpu:
        if k.shape[1] != q.shape[1]:
            k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale), None
    width, value_width = q.shape[-1], v.shape[-1]
    # The kernel wants one head size. Zeros change neither the scores nor the columns that are kept.
    if width < value_width:
        q, k = F.pad(q, (0, value_width - width)), F.pad(k, (0, value_width - width))
    elif value_width < width:
        v = F.pad(v, (0, width - value_width))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        _dense(q), k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    if value_width < width:
        out = out[..., :value_width]
    return out, lse if return_lse else None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return an array whose last axis is dense: the CPU's kernel does not look, and reads past its end if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _materialised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same, written out, with one matrix product for all the queries of a key/value head."""
    b, h, t, _ = q.shape
    shared, w = k.shape[1], k.shape[2]
    keys, values = k.reshape(b * shared, w, -1), v.reshape(b * shared, w, -1)
    scores = torch.bmm(q.reshape(b * shared, h // shared * t, -1), keys.transpose(1, 2)).view(b, h, t, w)
    if cap is None:
        scores.mul_(scale)
    else:
        scores.mul_(scale / cap).tanh_().mul_(cap)
    if bias is not None:
        scores.add_(bias)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights.view(b * shared, h // shared * t, w), values).view(b, h, t, -1)
    return out.div_(total), total.log_().add_(peak).squeeze(-1)


def _finish(
    result: torch.Tensor, lse: torch.Tensor | None, dtype: torch.dtype, layer: LayerInputs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply to [rows, H, Dv] and [rows, H] what comes after the softmax: sinks, the values' scale, the type."""
    if layer.v_scale != 1.0:
        result = result * layer.v_scale
    if layer.sinks is not None:
        assert lse is not None
        # A sink takes its share of the softmax and gives nothing: the rest shrinks by what it takes.
        result = result * torch.sigmoid(lse - layer.sinks).unsqueeze(-1).to(result.dtype)
        lse = torch.logaddexp(lse, layer.sinks.to(lse.dtype))
    if lse is not None:
        lse = lse.float()
    return result.to(dtype), lse
