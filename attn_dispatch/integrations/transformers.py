"""Hugging Face transformers models on attn_dispatch, through transformers' public interfaces alone.

    from attn_dispatch.integrations.transformers import PagedCache, register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="attn_dispatch")
    model.generate(**inputs, past_key_values=PagedCache(model))

Each layer gets its own spec (windows, head sizes, soft-caps, sinks), padding is dropped before it costs anything, and
each distinct spec is planned once per step. A forward without a cache (`use_cache=False`) works too.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from attn_dispatch.errors import ModelError
from attn_dispatch.integrations.cacheless import attend_cacheless
from attn_dispatch.integrations.padding import pack, unpack
from attn_dispatch.integrations.paged_cache import NAME, PagedCache
from attn_dispatch.integrations.paged_layer import PagedLayer

__all__ = ["NAME", "PagedCache", "attention_forward", "padding_mask", "register"]


def register() -> None:
    """Make "attn_dispatch" a value of `attn_implementation`. Doing it twice does no harm."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Any:
    """Return bool[batch, kv_length], True for tokens, or None when nothing is padding.

    What is causal, and how wide a window is, the layers say themselves; a model that adds something else to its mask
    (packed sequences, images that see themselves) is refused rather than computed wrongly.

    Raises:
        ModelError: the mask is more than causality, a window and padding.
    """
    # transformers allows its own kernels to skip the mask exactly when causality (or its absence) says it all.
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        raise ModelError(
            "this model's mask is more than causality, a window and padding (packed sequences without a cache, image "
            "tokens that see each other, prefix language models): the contract has no form for it"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


def attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    is_causal: bool | None = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Attend, as transformers calls it.

    Args:
        module: the layer.
        query: [batch, H, T, D].
        key: [batch, K, T, D], carrying its place in the cache (`PagedLayer.update`), or plain without a cache.
        value: [batch, K, T, Dv].
        attention_mask: what `padding_mask` returned.
        dropout: 0: this is for inference.
        scaling: factor on the scores.
        sliding_window: tokens that the layer sees.
        softcap: of the scores.
        s_aux: sinks, one logit per head.
        is_causal: unless the module says it.
        position_bias: refused.
        kwargs: what other implementations take.

    Returns:
        [batch, T, H, Dv], and None for the weights.

    Raises:
        ModelError: the layer asks for what the contract has no form for, or for a gradient.
    """
    layer: PagedLayer | None = getattr(key, "paged_layer", None)
    if position_bias is not None or dropout or (attention_mask is not None and attention_mask.ndim != 2):
        _refuse(module, dropout, attention_mask)
    if query.requires_grad and torch.is_grad_enabled():
        raise ModelError(f"{NAME} has no gradients: call the model under torch.inference_mode(), or train with 'sdpa'")
    options = {
        "scaling": scaling,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
    }
    if layer is None:
        return attend_cacheless(module, query, key, value, attention_mask, options), None
    cache = layer.cache
    step, batch = cache.ready(attention_mask)
    bound = cache.bind(module, layer, query, key, value, options)
    plan = cache.plan(step, batch, bound)
    store = cache.store(layer, batch, bound, key.device)
    rows = step.rows
    k, v = (pack(key, rows), pack(value, rows)) if bound.writes else (None, None)
    out = bound.attention.run(plan, pack(query, rows), k, v, store)
    return unpack(out, rows, step.batch_size, step.length), None


def _refuse(module: Any, dropout: float, mask: Any) -> None:
    if dropout:
        raise ModelError(f"dropout={dropout}: {NAME} is for inference; call model.eval()")
    found = "a position bias" if mask is None or mask.ndim == 2 else f"a mask of shape {tuple(mask.shape)}"
    raise ModelError(
        f"{type(module).__name__} brings {found}; {NAME} takes bool[batch, columns] for padding, and no bias"
    )
