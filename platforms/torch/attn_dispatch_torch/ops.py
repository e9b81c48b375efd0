"""`torch/sdpa` as `torch.library` operators, for models that are compiled or exported.

Which to use: these, where the program must carry the batch as tensors and stand on torch alone (`torch.export`, a
serialised graph). `attn_dispatch.integrations.torch_library`, where a model is compiled in the process that runs it: it
takes any backend and any layout, and takes a layer and the step as `attn_dispatch.Attention` does.

An operator takes tensors and plain numbers alone, declares that it writes to the cache, and has a fake implementation,
so that `torch.compile(fullgraph=True)` sees one opaque node with the right shape. The batch is given as tensors on the
host and is checked like any other (`attn_dispatch.AttentionMetadata`); layers of one step share the plan.

    paged_attention         write k and v into their slots of the cache, then attend -> [T, H, Dv]
    paged_attention_lse     likewise -> that, and the log-sum-exp, natural log, f32[T, H]
    ragged_attention        attend to k and v themselves, without a cache (encoders) -> [T, H, Dv]
    ragged_attention_lse    likewise -> that, and f32[T, H]

Arguments, all of them by position or name:
    q                       [T, H, D]
    k, v                    [rows, K, D] and [rows, K, Dv]; None for a layer that reads another's cache
    key_cache, value_cache  [N, K, B, D] and [N, K, B, Dv], written (paged)
    query_start_loc         i32[S + 1] on the host, as all of the batch
    seq_lens                i32[S], tokens in the cache after this step: a cross layer's are the encoder's (paged)
    block_table             i32[S, M] (paged)
    slot_mapping            i64[rows] (paged)
    scale                   factor on the scores
    window_left, _right     as `AttentionSpec.window`, -1 for open
    soft_cap                0 for none
    alibi_slopes, sinks     f32[H] or None
    causal                  bottom-right aligned (paged: True, ragged: False, unless said)
    k_scale, v_scale        of a quantised cache (paged)
    key_start_loc           i32[S + 1], rows of k and v of each sequence, where they are not those of q

Raises:
    MetadataError, CacheError, ArrayError, SpecError: before anything has been written.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from attn_dispatch import AttentionMetadata, AttentionSpec
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.contract import BatchView
from attn_dispatch.contract.dtypes import dtype_name, is_quantised
from attn_dispatch.errors import ArrayError, SpecError

from .gathering import CacheRows
from .launch_plan import LaunchPlan, SdpaBatch
from .sdpa_call import LayerInputs, attend

__all__ = ["NAMESPACE", "paged_attention", "paged_attention_lse", "ragged_attention", "ragged_attention_lse"]

NAMESPACE = str(__package__)
"""A copy of this package under another name has operators of its own."""

_COMMON = (
    "float scale, SymInt window_left=-1, SymInt window_right=-1, float soft_cap=0.0, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, bool causal={causal}"
)
_PAGED = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor query_start_loc, "
    "Tensor seq_lens, Tensor block_table, Tensor slot_mapping, "
    + _COMMON.format(causal=True)
    + ", float k_scale=1.0, float v_scale=1.0, Tensor? key_start_loc=None)"
)
_RAGGED = (
    "(Tensor q, Tensor k, Tensor v, Tensor query_start_loc, "
    + _COMMON.format(causal=False)
    + ", Tensor? key_start_loc=None)"
)

_PLANS_KEPT = 16
_plans: OrderedDict[Any, DevicePlan] = OrderedDict()
_lock = threading.Lock()


def _plan(spec: AttentionSpec, make: Callable[..., BatchView], *batch: torch.Tensor | None) -> DevicePlan:
    """Return the plan of a step, made once for all layers that are called with the same numbers.

    By their contents: a tensor whose memory is filled anew for each step is not the same batch.
    """
    host = [None if t is None else t.numpy() for t in batch]
    key = (spec, make, *(None if array is None else (array.shape, array.tobytes()) for array in host))
    with _lock:
        plan = _plans.get(key)
        if plan is not None:
            _plans.move_to_end(key)
            return plan
    # A copy: the caller's memory may change while the plan is kept.
    view = make(spec, *(None if array is None else array.copy() for array in host))
    plan = DevicePlan(spec=spec, view=view)
    with _lock:
        _plans[key] = plan
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return plan


def _launch(plan: DevicePlan, device: torch.device, return_lse: bool) -> LaunchPlan:
    batch = plan.batches.get((device, True))
    if batch is None:
        batch = plan.batches[device, True] = SdpaBatch(plan.spec, plan.view, device)
    launch: LaunchPlan = batch.launch(return_lse)
    return launch


def _paged_view(
    spec: AttentionSpec, query_start_loc: Any, seq_lens: Any, block_table: Any, slot_mapping: Any, key_start_loc: Any
) -> BatchView:
    return AttentionMetadata(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        slot_mapping=slot_mapping,
        block_size=spec.block_size,
        new_start_loc=key_start_loc,
    ).view("decoder")


def _ragged_view(spec: AttentionSpec, query_start_loc: Any, key_start_loc: Any) -> BatchView:
    start = query_start_loc if key_start_loc is None else key_start_loc
    num_seqs = max(len(start) - 1, 0)
    return AttentionMetadata(
        query_start_loc=query_start_loc,
        seq_lens=np.diff(start).astype(np.int32),
        block_table=np.zeros((num_seqs, 0), np.int32),
        slot_mapping=np.full(int(start[-1]) if num_seqs else 0, -1, np.int64),
        block_size=spec.block_size,
        new_start_loc=key_start_loc,
    ).view("decoder")


def _paged(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    key_start_loc: torch.Tensor | None = None,
    *,
    lse: bool,
) -> Any:
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=key_cache.shape[1],
        head_size=q.shape[2],
        value_head_size=value_cache.shape[3],
        dtype=dtype_name(q.dtype),
        kv_cache_dtype=dtype_name(key_cache.dtype),
        block_size=key_cache.shape[2],
        scale=scale,
        causal=causal,
        window=(window_left, window_right),
        logits_soft_cap=soft_cap,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        writes_kv=k is not None,
        returns_lse=lse,
    )
    plan = _plan(spec, _paged_view, query_start_loc, seq_lens, block_table, slot_mapping, key_start_loc)
    _check(plan, q, k, v, key_cache, value_cache)
    plan.view.side.check_fits(key_cache.shape[0])
    layer = _layer_inputs(spec, alibi_slopes, sinks, k_scale, v_scale, q.device)
    return attend(_launch(plan, q.device, lse), q, k, v, CacheRows(key_cache, value_cache), layer, return_lse=lse)


def _ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = False,
    key_start_loc: torch.Tensor | None = None,
    *,
    lse: bool,
) -> Any:
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_size=q.shape[2],
        value_head_size=v.shape[2],
        dtype=dtype_name(q.dtype),
        scale=scale,
        causal=causal,
        window=(window_left, window_right),
        logits_soft_cap=soft_cap,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        kind="encoder",
        returns_lse=lse,
    )
    plan = _plan(spec, _ragged_view, query_start_loc, key_start_loc)
    _check(plan, q, k, v)
    layer = _layer_inputs(spec, alibi_slopes, sinks, 1.0, 1.0, q.device)
    return attend(_launch(plan, q.device, lse), q, k, v, None, layer, return_lse=lse)


def _check(
    plan: DevicePlan, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, *caches: torch.Tensor
) -> None:
    spec = plan.spec
    if (k is None) != (v is None):
        raise ArrayError("k and v must both be given: one of them is None")
    for name, array, shape in (
        ("q", q, (plan.num_tokens, spec.num_heads, spec.head_size)),
        ("k", k, (plan.num_new, spec.num_kv_heads, spec.head_size)),
        ("v", v, (plan.num_new, spec.num_kv_heads, spec.value_head_size)),
    ):
        if array is not None and (tuple(array.shape) != shape or array.dtype != q.dtype):
            raise ArrayError(f"{name} is {array.dtype} {tuple(array.shape)}, this step needs {q.dtype} {shape}")
    if len(caches) == 2:
        key, value = caches
        if key.dtype != value.dtype or key.shape[3] != spec.head_size or key.shape[:3] != value.shape[:3]:
            raise ArrayError(
                f"the cache is {key.dtype} {tuple(key.shape)} and {value.dtype} {tuple(value.shape)}: needs one type, "
                f"[N, K, B, {spec.head_size}] and [N, K, B, Dv]"
            )
    devices = {str(x.device) for x in (q, k, v, *caches) if x is not None}
    if len(devices) > 1:
        raise ArrayError(f"q, k, v and the cache lie on {', '.join(sorted(devices))}: they must be on one device")


def _layer_inputs(
    spec: AttentionSpec,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: float,
    v_scale: float,
    device: torch.device,
) -> LayerInputs:
    for name, array in (("alibi_slopes", slopes), ("sinks", sinks)):
        if array is not None and tuple(array.shape) != (spec.num_heads,):
            raise ArrayError(
                f"{name} has shape {tuple(array.shape)}, needs one number per query head, {spec.num_heads}"
            )
    scaled = k_scale != 1 or v_scale != 1
    if scaled and not is_quantised(spec.kv_cache_dtype):
        raise SpecError(f"k_scale={k_scale}, v_scale={v_scale} belong to a quantised cache, not {spec.kv_cache_dtype}")
    return LayerInputs(
        slopes=None if slopes is None else slopes.to(device, torch.float32),
        sinks=None if sinks is None else sinks.to(device, torch.float32),
        k_scale=k_scale,
        v_scale=v_scale,
        k_scale_dev=torch.tensor(k_scale, dtype=torch.float32, device=device) if scaled else None,
        v_scale_dev=torch.tensor(v_scale, dtype=torch.float32, device=device) if scaled else None,
    )


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, lse: bool, paged: bool, **named: Any) -> Any:
    values = (rest[1] if len(rest) > 1 else named["value_cache"]) if paged else v
    out = q.new_empty((q.shape[0], q.shape[1], values.shape[-1]))
    return (out, q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)) if lse else out


def _define(name: str, run: Callable[..., Any], schema: str, *, paged: bool, lse: bool) -> Any:
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        partial(run, lse=lse),
        mutates_args=("key_cache", "value_cache") if paged else (),
        schema=schema + (" -> (Tensor, Tensor)" if lse else " -> Tensor"),
    )
    operator.register_fake(partial(_fake, lse=lse, paged=paged))
    return operator


paged_attention = _define("paged_attention", _paged, _PAGED, paged=True, lse=False)
paged_attention_lse = _define("paged_attention_lse", _paged, _PAGED, paged=True, lse=True)
ragged_attention = _define("ragged_attention", _ragged, _RAGGED, paged=False, lse=False)
ragged_attention_lse = _define("ragged_attention_lse", _ragged, _RAGGED, paged=False, lse=True)
