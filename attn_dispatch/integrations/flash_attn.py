"""FlashAttention's two functions over any backend: what engines call that were written for `flash_attn`.

    from attn_dispatch.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Shapes are FlashAttention's: a paged cache is [N, B, K, D] (a token's heads lie together), lengths are i32 tensors. The
backend is the one that is chosen for a layer of those shapes and that can work on the engine's memory in place;
`layer_of(spec)` has its name and what every other one said. What FlashAttention computes and the contract does not
(dropout, rotary inside the call, left padding) is refused.

A step's plan is kept while its length tensors are: they are told apart by address and version on a device, by contents
on the host.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from attn_dispatch import dispatch
from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Plan, Refusal
from attn_dispatch.contract import HND, NHD, AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import ArrayError

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache", "layer_of"]

_PLANS_KEPT = 32
_CACHES_KEPT = 512


@dataclass(eq=False)
class _Step:
    """A plan, and the tensors that it was made of: while these live, no other tensor has their addresses."""

    plan: Plan
    tensors: tuple[Any, ...]


_plans: OrderedDict[Any, _Step] = OrderedDict()
_caches: OrderedDict[Any, tuple[KVCache, Any, Any]] = OrderedDict()


def _refuse_layout(backend: Backend, spec: AttentionSpec) -> Refusal | None:
    """Refuse a backend that cannot work on [N, B, K, D] in place."""
    layout = backend.layout(spec)
    if layout == NHD or (layout == HND and backend.capabilities.cache_views == "strided"):
        return None
    return Refusal("layout", "[N, B, K, D]", f"{backend.name} keeps its cache in {layout.name}, which is another order")


def layer_of(spec: AttentionSpec, alibi_slopes: Any = None) -> Attention:
    """Return the layer that the functions below run for a spec; its backend is chosen once.

    Raises:
        NoBackendError: no backend runs it on an engine's memory.
    """
    return _layer(spec, None if alibi_slopes is None else tuple(alibi_slopes.float().cpu().tolist()))


@lru_cache(maxsize=256)
def _layer(spec: AttentionSpec, slopes: tuple[float, ...] | None) -> Attention:
    def refuses(backend: Backend) -> Refusal | None:
        return None if spec.kind == "encoder" else _refuse_layout(backend, spec)

    backend = dispatch.choose([spec], refuses=refuses, purpose="FlashAttention's interface")
    return attention(spec, backend, alibi_slopes=None if slopes is None else np.array(slopes, np.float32))


def _cache(layer: Attention, key: Any, value: Any) -> KVCache:
    """Return the engine's [N, B, K, D] tensors as the layer's cache, without a copy."""
    where = (id(layer), key.data_ptr(), value.data_ptr(), key.shape, key.stride(), value.stride())
    known = _caches.get(where)
    if known is None:
        if layer.backend.layout(layer.spec) == NHD:
            cache = layer.adopt(key, value)
        else:
            cache = layer.adopt(key.transpose(1, 2), value.transpose(1, 2))
        known = _caches[where] = (cache, key, value)
        while len(_caches) > _CACHES_KEPT:
            _caches.popitem(last=False)
    return known[0]


def _plan(layer: Attention, *tensors: Any, make: Any) -> Plan:
    """Return the plan of a step, made once for all the layers that are given the same tensors."""

    def identity(tensor: Any) -> Any:
        if tensor is None or isinstance(tensor, int):
            return tensor
        if tensor.device.type == "cpu":  # its memory may be NumPy's, which counts no versions
            return tensor.shape, tensor.numpy().tobytes()
        return tensor.shape, tensor.data_ptr(), tensor._version

    key = (id(layer), *map(identity, tensors))
    step = _plans.get(key)
    if step is None:
        step = _plans[key] = _Step(layer.plan(make()), (layer, *tensors))
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return step.plan


def _host(tensor: Any) -> Any:
    return tensor.detach().to("cpu", torch.int64).numpy()


def _spec(q: Any, kv_heads: int, value_size: int, block_size: int, **fields: Any) -> AttentionSpec:
    left, right = fields.pop("window_size")
    causal = fields.pop("causal")
    return AttentionSpec(
        num_heads=q.shape[-2],
        num_kv_heads=kv_heads,
        head_size=q.shape[-1],
        value_head_size=value_size,
        dtype=dtype_name(q.dtype),
        block_size=block_size,
        causal=causal,
        window=(left, -1 if causal else right),
        **fields,
    )


def _refuse(**unsupported: Any) -> None:
    for name, value in unsupported.items():
        if value is not None and (not isinstance(value, int | float) or value):
            raise ArrayError(f"{name} was given: not computed here; call FlashAttention's own function for it")


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """Attend over ragged sequences, whose keys are rows or lie in a paged cache.

    Args:
        q: [T, H, D].
        k: [rows, K, D], or with `block_table` the cache's keys [N, B, K, D]: already written.
        v: [rows, K, Dv], or the cache's values.
        cu_seqlens_q: i32[S + 1].
        cu_seqlens_k: i32[S + 1].
        max_seqlen_q: not needed here.
        max_seqlen_k: not needed here.
        dropout_p: must be 0.
        softmax_scale: factor on the scores (None: 1 / sqrt(D)).
        causal: bottom-right aligned.
        window_size: tokens to the (left, right), -1 for open.
        softcap: 0 for none.
        alibi_slopes: f32[H].
        deterministic: results always are.
        return_attn_probs: must be False.
        block_table: i32[S, M].

    Returns:
        [T, H, Dv].

    Raises:
        ArrayError, MetadataError, CacheError, NoBackendError: what is not computed, or would be wrong.
    """
    _refuse(dropout_p=dropout_p, return_attn_probs=return_attn_probs)
    fields: dict[str, Any] = {
        "causal": causal,
        "window_size": tuple(window_size),
        "scale": softmax_scale,
        "logits_soft_cap": softcap,
        "alibi": alibi_slopes is not None,
    }
    if block_table is None:
        layer = layer_of(_spec(q, k.shape[1], v.shape[2], 32, kind="encoder", **fields), alibi_slopes)

        def ragged() -> AttentionMetadata:
            lens, keys = np.diff(_host(cu_seqlens_q)), np.diff(_host(cu_seqlens_k))
            if not np.array_equal(lens, keys):
                raise ArrayError("cu_seqlens_q and cu_seqlens_k differ: keys of earlier tokens need a block_table")
            return AttentionMetadata.build(lens, lens)

        return layer.run(_plan(layer, cu_seqlens_q, cu_seqlens_k, make=ragged), q, k, v)
    spec = _spec(q, k.shape[2], v.shape[3], k.shape[1], writes_kv=False, **fields)
    layer = layer_of(spec, alibi_slopes)

    def paged() -> AttentionMetadata:
        lens, keys = np.diff(_host(cu_seqlens_q)), np.diff(_host(cu_seqlens_k))
        return AttentionMetadata.read_only(lens, keys, _host(block_table), spec.block_size)

    plan = _plan(layer, cu_seqlens_q, cu_seqlens_k, block_table, make=paged)
    return layer.run(plan, q, cache=_cache(layer, k, v))


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Write new keys and values behind `cache_seqlens`, if they are given, and attend to what is in the cache.

    Args:
        q: [S, n, H, D], the same number of queries for each sequence.
        k_cache: [N, B, K, D].
        v_cache: [N, B, K, Dv].
        k: [S, n, K, D], written; then `cache_seqlens` counts the tokens before them.
        v: [S, n, K, Dv].
        rotary_cos: must be None.
        rotary_sin: must be None.
        cache_seqlens: i32[S], or one number for all.
        cache_batch_idx: must be None.
        cache_leftpad: must be None.
        block_table: i32[S, M]; needed: caches that are not paged are one page a sequence.
        softmax_scale: factor on the scores (None: 1 / sqrt(D)).
        causal: bottom-right aligned.
        window_size: tokens to the (left, right), -1 for open.
        softcap: 0 for none.
        rotary_interleaved: without meaning here.
        alibi_slopes: f32[H].
        num_splits: the backend decides.
        return_softmax_lse: also return the log-sum-exp, natural, f32[S, H, n].

    Returns:
        [S, n, H, Dv], or that and the LSE.

    Raises:
        ArrayError, MetadataError, CacheError, NoBackendError: what is not computed, or would be wrong.
    """
    _refuse(rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
    if cache_seqlens is None or block_table is None:
        raise ArrayError("cache_seqlens and block_table must be given: the cache is paged")
    if (k is None) != (v is None):
        raise ArrayError("k and v must both be given: one of them is None")
    sequences, new = q.shape[:2]
    spec = _spec(
        q, k_cache.shape[2], v_cache.shape[3], k_cache.shape[1], causal=causal, window_size=tuple(window_size),
        scale=softmax_scale, logits_soft_cap=softcap, alibi=alibi_slopes is not None, writes_kv=k is not None,
        returns_lse=return_softmax_lse,
    )  # fmt: skip
    layer = layer_of(spec, alibi_slopes)

    def make() -> AttentionMetadata:
        lens = np.full(sequences, cache_seqlens) if isinstance(cache_seqlens, int) else _host(cache_seqlens)
        queries = np.full(sequences, new)
        if k is None:
            return AttentionMetadata.read_only(queries, lens, _host(block_table), spec.block_size)
        if k.shape[1] != new:
            raise ArrayError(f"k has {k.shape[1]} new tokens for each sequence, q {new}: they must be the same tokens")
        return AttentionMetadata.build(queries, lens + new, _host(block_table), spec.block_size)

    plan = _plan(layer, cache_seqlens, block_table, new, make=make)
    k, v = (None if x is None else x.flatten(0, 1) for x in (k, v))
    cache = _cache(layer, k_cache, v_cache)
    result = layer.run(plan, q.flatten(0, 1), k, v, cache, return_lse=return_softmax_lse)
    if not return_softmax_lse:
        return result.unflatten(0, (sequences, new))
    return result[0].unflatten(0, (sequences, new)), result[1].unflatten(0, (sequences, new)).transpose(1, 2)
