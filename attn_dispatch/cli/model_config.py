"""The kinds of attention layer of a model, from the `config.json` of its folder alone (standard library)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import ModelError

__all__ = ["layer_kinds"]

# Kinds of layer that keep no keys and values.
_NOT_ATTENTION = ("linear_attention", "mamba", "recurrent", "conv")


def layer_kinds(
    folder: Path, block_size: int, kv_cache_dtype: str | None = None
) -> list[tuple[int, str, AttentionSpec]]:
    """Return how many layers a model has of which kind.

    Args:
        folder: of a transformers model.
        block_size: B of the specs (None: what the backends prefer).
        kv_cache_dtype: type that the cache stores (None: the model's).

    Returns:
        For each kind: how many layers, transformers' name for it, and the spec.

    Raises:
        ModelError: no such folder, or a configuration that does not say what a layer needs.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read: {error}") from error
    config = config | config.get("text_config", {})
    try:
        kinds = Counter(_layer_types(config))
        fields = {"block_size": block_size, "kv_cache_dtype": kv_cache_dtype}
        return [(count, kind, _spec(config, kind, fields)) for kind, count in kinds.items()]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} does not say what its attention layers need: {error!r}") from error


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    layers = int(config["num_hidden_layers"])
    types = config.get("layer_types")
    if types is None:
        # What models did before they listed their layers: every n-th is a full one, or all have the window.
        pattern, window = config.get("sliding_window_pattern"), config.get("sliding_window")
        uses = window is not None and config.get("use_sliding_window", True)
        types = [
            "sliding_attention" if uses and (pattern is None or (i + 1) % pattern) else "full_attention"
            for i in range(layers)
        ]
    return [kind for kind in types if kind not in _NOT_ATTENTION]


def _spec(config: Mapping[str, Any], kind: str, fields: Mapping[str, Any]) -> AttentionSpec:
    heads = int(config["num_attention_heads"])
    size = config.get("head_dim") or int(config["hidden_size"]) // heads
    kv_heads, value_size, scale = config.get("num_key_value_heads") or heads, size, None
    if config.get("kv_lora_rank"):  # keys and values are expanded to one per query head before they are attended to
        kv_heads, size = heads, config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        value_size = config["v_head_dim"]
    if config.get("query_pre_attn_scalar"):
        scale = float(config["query_pre_attn_scalar"]) ** -0.5
    window = (-1, -1)
    if kind == "sliding_attention":
        window = (int(config["sliding_window"]) - 1, 0)
    elif kind == "chunked_attention":
        raise ModelError("chunked attention is no window of a fixed width: see attn_dispatch.variants")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        value_head_size=value_size,
        dtype=config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        scale=scale,  # type: ignore[arg-type]  # None: the spec fills in the default
        window=window,
        logits_soft_cap=config.get("attn_logit_softcapping"),
        alibi=bool(config.get("alibi", False)),
        sinks=config.get("model_type") == "gpt_oss",
        **fields,
    )
