"""`torch/sdpa` as a `torch.library` custom op, for models that are compiled or exported.

`paged_attention` takes tensors and plain numbers only, declares that it writes to the cache, and has a fake
implementation, so that `torch.compile(fullgraph=True)` sees one opaque node with the right shape. The batch is given
as tensors on the host and is checked like any other (`attn_dispatch.AttentionMetadata`); layers of one step share the
plan.
"""

# torch.library has no types.
# mypy: disable-error-code="untyped-decorator,no-any-return"

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from attn_dispatch import HND, AttentionMetadata, AttentionSpec, LayerParameters
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import ArrayError

from .attend import run
from .grouping import SdpaPlan, make_plan

__all__ = ["NAMESPACE", "paged_attention", "paged_attention_lse"]

# A copy of this package under another name has ops of its own.
NAMESPACE = str(__package__)

_PLANS_KEPT = 32
_plans: OrderedDict[Any, tuple[SdpaPlan, tuple[torch.Tensor, ...]]] = OrderedDict()


def _plan(spec: AttentionSpec, *batch: torch.Tensor) -> SdpaPlan:
    """Return the plan of a step: made once for all layers that are called with the same, unchanged tensors."""
    key = (spec, *((t.data_ptr(), t.shape, t._version) for t in batch))
    found = _plans.get(key)
    if found is None:
        query_start_loc, seq_lens, block_table, slot_mapping = (t.numpy() for t in batch)
        metadata = AttentionMetadata(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            block_size=spec.block_size,
        )
        # The tensors are kept with the plan, so that their addresses are not given to others while the key lives.
        found = _plans[key] = make_plan(spec, metadata.view("decoder")), batch
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return found[0]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: tuple[torch.Tensor, ...],
    scale: float,
    window: tuple[int, int],
    soft_cap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
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
        window=window,
        logits_soft_cap=soft_cap,
        alibi=slopes is not None,
        sinks=sinks is not None,
        returns_lse=lse,
    )
    plan = _plan(spec, *batch)
    tokens, heads = plan.num_tokens, spec.num_kv_heads
    for name, array, shape in (
        ("q", q, (tokens, spec.num_heads, spec.head_size)),
        ("k", k, (tokens, heads, spec.head_size)),
        ("v", v, (tokens, heads, spec.value_head_size)),
    ):
        if tuple(array.shape) != shape or array.dtype != q.dtype:
            raise ArrayError(f"{name} is {array.dtype} {tuple(array.shape)}, this step needs {q.dtype} {shape}")
    plan.view.pages.check_fits(key_cache.shape[0])
    layer = LayerParameters(spec, alibi_slopes=slopes, sinks=sinks)
    pages = {name: array for (name, _), array in zip(HND.arrays, (key_cache, value_cache), strict=True)}
    return run(plan, q, k, v, pages, layer, None, lse)


@torch.library.custom_op(f"{NAMESPACE}::paged_attention", mutates_args=("key_cache", "value_cache"))
def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
) -> torch.Tensor:
    """Write k and v into their slots, then attend.

    Args:
        q: [T, H, D].
        k: [T, K, D].
        v: [T, K, Dv].
        key_cache: [N, K, B, D], written.
        value_cache: [N, K, B, Dv], written.
        query_start_loc: i32[S + 1] on the host, as all of the batch.
        seq_lens: i32[S].
        block_table: i32[S, M].
        slot_mapping: i64[T].
        scale: factor on the scores.
        window_left: as in `AttentionSpec.window`.
        window_right: likewise.
        soft_cap: 0 for none.
        alibi_slopes: f32[H] or None.
        sinks: f32[H] or None.
        causal: bottom-right aligned.

    Returns:
        [T, H, Dv].

    Raises:
        MetadataError, CacheError, ArrayError: before anything has been written.
    """
    batch = (query_start_loc, seq_lens, block_table, slot_mapping)
    window = (window_left, window_right)
    return _attend(q, k, v, key_cache, value_cache, batch, scale, window, soft_cap, alibi_slopes, sinks, causal, False)


@paged_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@torch.library.custom_op(f"{NAMESPACE}::paged_attention_lse", mutates_args=("key_cache", "value_cache"))
def paged_attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` that also returns the LSE, natural log, f32[T, H]."""
    batch = (query_start_loc, seq_lens, block_table, slot_mapping)
    window = (window_left, window_right)
    return _attend(q, k, v, key_cache, value_cache, batch, scale, window, soft_cap, alibi_slopes, sinks, causal, True)


@paged_attention_lse.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)
