"""Hugging Face transformers models on attn_dispatch, through transformers' public interfaces alone.

    from attn_dispatch.integrations.transformers import attach

    model = attach(AutoModelForCausalLM.from_pretrained(folder))
    model.generate(**inputs)

or step by step:

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="attn_dispatch")
    model.generate(**inputs, past_key_values=PagedCache(model))

Each layer gets its own spec (windows, head sizes, soft-caps, sinks), padding is dropped before it costs anything, and
each distinct spec is planned once per step. A forward without a cache (`use_cache=False`) works too. Under
`torch.compile` the graph breaks at each attention.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache

from attn_dispatch.contract.gradient import without_gradient
from attn_dispatch.errors import ModelError
from attn_dispatch.integrations.cacheless import attend_cacheless
from attn_dispatch.integrations.layer_spec import LayerCall
from attn_dispatch.integrations.masks import mask_of, padding_mask
from attn_dispatch.integrations.paged_cache import PagedCache
from attn_dispatch.integrations.paged_layer import arriving_update
from attn_dispatch.integrations.paged_state import NAME

__all__ = ["NAME", "PagedCache", "attach", "attention_forward", "padding_mask", "register"]

# Tensors among the arguments that say nothing about which keys are seen, and how much of them.
_NEUTRAL = {"position_ids", "cache_position", "num_items_in_batch", "position_embeddings", "token_type_ids", "labels"}


def register() -> None:
    """Make "attn_dispatch" a value of `attn_implementation`. Doing it twice does no harm."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, torch.compiler.disable(padding_mask))


def attach(model: Any, **cache_options: Any) -> Any:
    """Let a model attend through attn_dispatch, and `generate` (and pipelines) use a paged cache of their own.

    Args:
        model: a transformers model; it is changed, and returned.
        cache_options: of each call's `PagedCache`.

    Raises:
        ModelError: it cannot: its attention is not called through transformers' AttentionInterface, or it has layers
            that a paged cache cannot hold.
    """
    register()
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    if not any(hasattr(source, "ALL_ATTENTION_FUNCTIONS") for source in sources):
        raise ModelError(
            f"{type(model).__name__} does not call its attention through transformers' AttentionInterface: "
            "no other implementation than its own can run it"
        )
    model.set_attn_implementation(NAME)
    PagedCache(model, **cache_options)  # refuses now rather than at the first call
    generate = model.generate
    argument = "cache" if "cache" in inspect.signature(type(model).generate).parameters else "past_key_values"

    @functools.wraps(generate)
    def generate_paged(*args: Any, **kwargs: Any) -> Any:
        chosen = kwargs.keys() & {"cache", "past_key_values", "cache_implementation"}
        if not chosen and kwargs.get("use_cache") is not False and model.config._attn_implementation == NAME:
            cache = PagedCache(model, **cache_options)
            encoder_decoder = model.config.is_encoder_decoder
            kwargs[argument] = EncoderDecoderCache(cache, DynamicCache()) if encoder_decoder else cache
        return generate(*args, **kwargs)

    model.generate = generate_paged
    return model


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
        kwargs: what other implementations take.

    Returns:
        [batch, T, H, Dv], and None for the weights. A backward through it raises GradientError.

    Raises:
        ModelError: the layer asks for what the contract has no form for.
    """
    update = arriving_update(module, key, value)
    _check_arguments(module, dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = mask_of(attention_mask, module, bool(causal), sliding_window)
    call = LayerCall(module, query, key, value, mask.pattern, scaling, softcap, s_aux)
    if not torch.is_grad_enabled():
        return (attend_cacheless(call, mask) if update is None else update.layer.attend(update, call, mask)), None
    with torch.no_grad():
        out = attend_cacheless(call, mask) if update is None else update.layer.attend(update, call, mask)
    inputs = [tensor for tensor in (query, key, value, s_aux) if tensor is not None and tensor.requires_grad]
    return (without_gradient(out, inputs) if inputs else out), None


def _check_arguments(module: Any, dropout: float, arguments: dict[str, Any]) -> None:
    """Refuse arguments that change the result and have no form here."""
    name = type(module).__name__
    if dropout:
        raise ModelError(f"dropout={dropout}: {NAME} is for inference; call model.eval()")
    if arguments.get("position_bias") is not None:
        raise ModelError(f"{name} adds a position bias to its scores; {NAME} takes none")
    if arguments.get("output_attentions"):
        raise ModelError(f"{name}: {NAME} returns no attention weights; use attn_implementation='eager' for them")
    unknown = [k for k, v in arguments.items() if k not in _NEUTRAL and isinstance(v, torch.Tensor)]
    if unknown:
        raise ModelError(
            f"{name} gives its attention {', '.join(unknown)}, which may change what it sees (packed sequences, sparse "
            f"attention, a bias): {NAME} has no form for it"
        )
