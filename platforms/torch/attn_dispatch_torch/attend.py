"""Attention of torch tensors: the computation of `torch/sdpa`.

torch's CPU flash kernel returns the log-sum-exp beside the output, takes additive masks and strided inputs, and is
used for everything that it can do. What it cannot (soft-cap; other devices when the LSE is wanted) is written out in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from attn_dispatch import AttentionSpec, LayerParameters, Plan
from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised
from attn_dispatch.errors import ArrayError

from .grouping import CHUNK_TOKENS, Group, OnDevice, SdpaPlan

__all__ = ["run"]

Pages = Mapping[str, torch.Tensor]


def run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pages: Pages | None,
    layer: LayerParameters,
    out: torch.Tensor | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write k [rows, K, D] and v [rows, K, Dv] into pages [N, K, B, ...], then attend for q [T, H, D].

    Raises:
        ArrayError: q and the cache are on different devices. Nothing has been written.
    """
    assert isinstance(plan, SdpaPlan)
    spec = plan.spec
    if pages is not None and pages["key"].device != q.device:
        there = pages["key"].device
        raise ArrayError(f"q is on {q.device}, the cache on {there}: allocate(..., device={str(q.device)!r})")
    here = plan.on_device.get(q.device)
    if here is None:
        here = plan.on_device[q.device] = _prepare(plan, q)
    if out is None:
        out = q.new_empty((plan.num_tokens, spec.num_heads, spec.value_head_size))
    wants_lse = return_lse or spec.sinks
    lse = q.new_empty((plan.num_tokens, spec.num_heads), dtype=torch.float32) if return_lse else None
    with torch.no_grad():
        if pages is not None and k is not None and v is not None and plan.view.pages.writes:
            _write(pages["key"], k, here, layer.k_scale)
            _write(pages["value"], v, here, layer.v_scale)
        scaled = pages is not None and is_quantised(spec.kv_cache_dtype)
        scales = (layer.k_scale, layer.v_scale) if scaled else (1.0, 1.0)
        for group, prepared in zip(plan.groups, here.groups, strict=True):
            assert pages is not None
            part, part_lse = _attend_group(spec, group, prepared, q, pages, layer, scales, wants_lse)
            out[prepared["rows"]] = part
            if lse is not None and part_lse is not None:
                lse[prepared["rows"]] = part_lse
        for s in plan.alone:
            _attend_alone(plan, s, q, k, v, pages, layer, scales, out, lse, wants_lse)
        for s in plan.nothing:
            rows = slice(*plan.view.query_start_loc[s : s + 2].tolist())
            out[rows] = 0
            if lse is not None:
                lse[rows] = -torch.inf if layer.sinks is None else _on(layer, "sinks", q.device)
    return (out, lse) if lse is not None else out


def _prepare(plan: SdpaPlan, q: torch.Tensor) -> OnDevice:
    """Copy a plan's indices to a device and make its masks there."""
    spec, view = plan.spec, plan.view
    here = OnDevice()
    pages = view.pages
    if pages.writes:
        used = np.flatnonzero(pages.slot_mapping >= 0)
        block, offset = np.divmod(pages.slot_mapping[used], pages.block_size)
        heads = np.arange(spec.num_kv_heads)
        rows = (block[:, None] * spec.num_kv_heads + heads) * pages.block_size + offset[:, None]
        here.write_rows = torch.from_numpy(rows.ravel()).to(q.device)
        here.written = None if pages.writes_all else torch.from_numpy(used).to(q.device)
    for group in plan.groups:
        blocks = group.blocks[:, None, :] * spec.num_kv_heads + np.arange(spec.num_kv_heads)[:, None]
        rows_of = group.rows if isinstance(group.rows, slice) else torch.from_numpy(group.rows).to(q.device)
        entry: dict[str, Any] = {"rows": rows_of, "index": torch.from_numpy(blocks.ravel()).to(q.device)}
        if len(group.padding):
            width = group.blocks.shape[1] * pages.block_size
            seq, token = np.divmod(group.padding, width)
            flat = (seq[:, None] * spec.num_kv_heads + np.arange(spec.num_kv_heads)) * width + token[:, None]
            entry["padding"] = torch.from_numpy(flat.ravel()).to(q.device)
        if group.masked or spec.alibi:
            query_at, key_at = _positions(group, pages.block_size)
            entry["mask"] = _mask(spec, query_at, key_at, group.lens, q) if group.masked else None
            entry["distance"] = torch.from_numpy(np.abs(query_at - key_at)).to(q.device) if spec.alibi else None
        here.groups.append(entry)
    return here


def _positions(group: Group, block_size: int) -> tuple[Any, Any]:
    """Return the positions of queries [G, n, 1] and of the keys that are used [G, 1, L]."""
    query_at = (group.lens[:, None] - group.num_queries + np.arange(group.num_queries))[:, :, None]
    key_at = (group.first[:, None] + np.arange(group.begin, group.end))[:, None, :]
    return query_at, key_at


def _visible(spec: AttentionSpec, query_at: Any, key_at: Any) -> Any:
    ahead = key_at - query_at
    left, right = spec.window
    visible = np.ones(ahead.shape, dtype=bool)
    if spec.causal:
        visible &= ahead <= 0
    if left >= 0:
        visible &= ahead >= -left
    if right >= 0:
        visible &= ahead <= right
    return visible


def _mask(spec: AttentionSpec, query_at: Any, key_at: Any, lens: Any, q: torch.Tensor) -> torch.Tensor:
    """Return an additive mask [G, 1, n * g, L] of q's type: 0 where a key is seen, else -inf."""
    visible = _visible(spec, query_at, key_at) & (key_at < lens[:, None, None])
    seen = torch.from_numpy(visible).to(q.device)
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat_interleave(spec.group_size, dim=1)[:, None]


def _write(blocks: torch.Tensor, new: torch.Tensor, here: OnDevice, scale: float) -> None:
    rows = new if here.written is None else new.index_select(0, here.written)
    name = str(blocks.dtype).removeprefix("torch.")
    if is_quantised(name):
        limit = FINITE_MAX[name]
        rows = (rows.float() / scale).clamp_(-limit, limit)
        rows = (rows.round_() if name == "int8" else rows).to(blocks.dtype)
    else:
        rows = rows.to(blocks.dtype)
    flat, rows = _bytes(blocks).view(-1, blocks.shape[-1]), _bytes(rows.contiguous())
    flat.index_copy_(0, here.write_rows, rows.view(-1, rows.shape[-1]))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else x


def _gather(blocks: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows [len(index), B, D] of the pages [N, K, B, D] seen as [N * K, B, D], in a type to compute with."""
    size, width = blocks.shape[2:]
    picked = _bytes(blocks).view(-1, size * width).index_select(0, index)
    # Quantised types are exact in every type that attention is computed in; their scales are applied elsewhere.
    return picked.view(blocks.dtype).to(dtype).view(-1, size, width)


def _attend_group(
    spec: AttentionSpec,
    group: Group,
    prepared: dict[str, Any],
    q: torch.Tensor,
    pages: Pages,
    layer: LayerParameters,
    scales: tuple[float, float],
    wants_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    size, heads, n = len(group.sequences), spec.num_kv_heads, group.num_queries
    keys, values = (
        _gather(pages[name], prepared["index"], q.dtype).view(size, heads, -1, pages[name].shape[3])
        for name in ("key", "value")
    )
    if "padding" in prepared:
        # A masked key still counts if it is NaN.
        for gathered in (keys, values):
            gathered.view(-1, gathered.shape[3]).index_fill_(0, prepared["padding"], 0)
    keys, values = keys[:, :, group.begin : group.end], values[:, :, group.begin : group.end]
    rows = q[prepared["rows"]].view(size, n, heads, spec.group_size, spec.head_size)
    folded = rows.transpose(1, 2).reshape(size, heads, n * spec.group_size, spec.head_size)
    mask = prepared.get("mask")
    if spec.alibi:
        slopes = _on(layer, "alibi_slopes", q.device).view(1, heads, 1, spec.group_size, 1)
        bias = -slopes * prepared["distance"][:, None, :, None, :]
        bias = bias.flatten(2, 3).to(q.dtype)
        mask = bias if mask is None else bias + mask
    result, lse = _softmax(spec, folded, keys, values, mask, False, scales, wants_lse)
    sinks = None if layer.sinks is None else _on(layer, "sinks", q.device).view(1, heads, 1, spec.group_size)
    shape = (size, heads, n, spec.group_size)
    result = result.view(*shape, -1)
    lse = None if lse is None else lse.view(shape)
    if sinks is not None:
        result, lse = _with_sink(result, lse, sinks)
    result = result.transpose(1, 2).reshape(size * n, spec.num_heads, -1)
    return result, None if lse is None else lse.transpose(1, 2).reshape(size * n, spec.num_heads)


def _attend_alone(
    plan: SdpaPlan,
    s: int,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pages: Pages | None,
    layer: LayerParameters,
    scales: tuple[float, float],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    wants_lse: bool,
) -> None:
    """Attend for one sequence of many tokens, in chunks of queries; a chunk looks at the keys that it can see only."""
    spec, view = plan.spec, plan.view
    begin, stop = view.query_start_loc[s : s + 2].tolist()
    length = int(view.kv_lens[s])
    heads, group = spec.num_kv_heads, spec.group_size
    before = length - (stop - begin)
    # The first token that anyone sees, in whole blocks.
    left, right = spec.window
    if pages is None:
        assert k is not None
        assert v is not None
        new = slice(*view.new_start_loc[s : s + 2].tolist())
        first, keys, values = 0, k[new].transpose(0, 1), v[new].transpose(0, 1)
    else:
        size = view.pages.block_size
        block = max(before - left, 0) // size if left >= 0 else 0
        first = block * size
        table = view.pages.block_table[s, block : -(-length // size)].astype(np.int64)
        index = torch.from_numpy((table * heads + np.arange(heads)[:, None]).ravel()).to(q.device)
        keys, values = (
            _gather(pages[name], index, q.dtype).view(heads, -1, pages[name].shape[3])[:, : length - first]
            for name in ("key", "value")
        )
    sinks = None if layer.sinks is None else _on(layer, "sinks", q.device).view(heads, group, 1)
    for a in range(begin, stop, CHUNK_TOKENS):
        b = min(a + CHUNK_TOKENS, stop)
        query_at = np.arange(a - begin, b - begin) + before
        last = length
        if spec.causal:
            last = int(query_at[-1]) + 1
        elif right >= 0:
            last = min(length, int(query_at[-1]) + 1 + right)
        start = max(first, int(query_at[0]) - left) if left >= 0 else first
        part_k, part_v = keys[:, start - first : last - first], values[:, start - first : last - first]
        # [K, g, n, D]: the group is a batch axis along which the keys do not move.
        part_q = q[a:b].view(b - a, heads, group, -1).permute(1, 2, 0, 3)
        key_at = np.arange(start, last)
        square = spec.causal and not spec.has_window and a == begin and before == 0 and not spec.alibi
        mask = None
        if not square:
            visible = _visible(spec, query_at[:, None], key_at[None, :])
            if not visible.all():
                seen = torch.from_numpy(visible).to(q.device)
                mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
            if spec.alibi:
                distance = torch.from_numpy(np.abs(query_at[:, None] - key_at[None, :])).to(q.device)
                bias = (-_on(layer, "alibi_slopes", q.device).view(heads, group, 1, 1) * distance).to(q.dtype)
                mask = bias if mask is None else bias + mask
        wide_k, wide_v = (x[:, None].expand(heads, group, *x.shape[1:]) for x in (part_k, part_v))
        result, part_lse = _softmax(spec, part_q, wide_k, wide_v, mask, square, scales, wants_lse)
        if sinks is not None:
            result, part_lse = _with_sink(result, part_lse, sinks)
        out[a:b] = result.permute(2, 0, 1, 3).reshape(b - a, spec.num_heads, -1)
        if lse is not None and part_lse is not None:
            lse[a:b] = part_lse.permute(2, 0, 1).reshape(b - a, spec.num_heads)


def _softmax(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scales: tuple[float, float],
    wants_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return softmax(scores) v and, if wanted, the LSE in float32. q [b, h, n, D], k [b, h, L, D], v [b, h, L, Dv]."""
    scale = spec.scale * scales[0]
    if spec.logits_soft_cap is None and (q.device.type == "cpu" or not wants_lse):
        width, value_width = q.shape[-1], v.shape[-1]
        # The fused kernels want one head size: zeros change neither scores nor the columns that are kept.
        if width < value_width:
            q, k = (F.pad(x, (0, value_width - width)) for x in (q, k))
        elif value_width < width:
            v = F.pad(v, (0, width - value_width))
        lse = None
        if q.device.type == "cpu":
            whole = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=whole, scale=scale
            )
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
        out = out[..., :value_width]
        return (out * scales[1] if scales[1] != 1.0 else out), lse if lse is None else lse.float()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
    if mask is not None:
        scores = scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1), -torch.inf)
    logsum = torch.logsumexp(scores, dim=-1)
    out = (torch.exp(scores - logsum[..., None]) @ v.to(wide)) * scales[1]
    return out.to(q.dtype), logsum.float()


def _with_sink(out: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sink takes its share of the softmax and gives nothing: the rest shrinks by what it takes."""
    assert lse is not None
    total = torch.logaddexp(lse, sinks)
    return (out.to(total.dtype) * torch.exp(lse - total)[..., None]).to(out.dtype), total


def _on(layer: LayerParameters, name: str, device: torch.device) -> torch.Tensor:
    """Return a layer's slopes or sinks on a device."""
    return layer.made((name, device), lambda: torch.tensor(getattr(layer, name), device=device))
