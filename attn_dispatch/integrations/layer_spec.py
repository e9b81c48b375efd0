"""From what a transformers attention layer says when it is called to an `AttentionSpec`."""

from __future__ import annotations

from typing import Any

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import ModelError

__all__ = ["layer_parameters", "layer_spec"]


def layer_spec(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Any,
    causal: bool,
    block_size: int,
    kv_cache_dtype: str | None = None,
    writes_kv: bool = True,
    cached: bool = True,
) -> AttentionSpec:
    """Return what a layer needs, read off its tensors and the arguments of its call.

    Args:
        module: the attention module, for messages.
        query: [batch, H, T, D].
        key: [batch, K, T, D].
        value: [batch, K, T, Dv].
        scaling: factor on the scores (None: 1 / sqrt(D)).
        sliding_window: W, the last W tokens, the token itself included; of a layer that looks ahead the next W too.
        softcap: of the scores.
        sinks: one logit per head, or None.
        causal: the layer looks back only.
        block_size: B.
        kv_cache_dtype: type that the cache stores (None: the layer's).
        writes_kv: False for a layer that reads another layer's keys and values.
        cached: False for a forward without a cache, which attends to the call's own tokens.

    Raises:
        ModelError: the layer is one that a paged cache has no form for.
    """
    if cached and not causal:
        raise ModelError(
            f"{type(module).__name__} looks ahead, and a cache holds no tokens that are still to come: "
            "run it without a cache (use_cache=False)"
        )
    window = (-1, -1)
    if sliding_window is not None:
        # What transformers tells the attention function counts the token itself, on either side.
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    return AttentionSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_size=query.shape[3],
        value_head_size=value.shape[3],
        dtype=dtype_name(query.dtype),
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]  # None: the spec fills in the layer's
        block_size=block_size,
        scale=scaling,  # type: ignore[arg-type]  # likewise
        causal=causal,
        window=window,
        logits_soft_cap=softcap,
        sinks=sinks is not None,
        kind="decoder" if cached else "encoder",
        writes_kv=writes_kv,
    )


def layer_parameters(sinks: Any) -> dict[str, Any]:
    """Return the arguments of `attention` for what the layer owns."""
    return {} if sinks is None else {"sinks": sinks.detach().float().cpu().numpy()}
