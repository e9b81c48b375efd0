"""A transformers layer without a cache: it attends to the call's own tokens (scoring, embedding, encoders)."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Plan
from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.dispatch import requested
from attn_dispatch.errors import ModelError
from attn_dispatch.integrations.layer_spec import layer_parameters, layer_spec
from attn_dispatch.integrations.padding import Columns, pack, unpack

__all__ = ["attend_cacheless"]


class _Forward:
    """One call of a model: its batch, and a plan per spec. Layers of one forward are given the same mask object."""

    def __init__(self, mask: Any, batch: int, length: int) -> None:
        self.mask, self.shape = mask, (batch, length)
        columns = Columns()
        columns.length = length
        lens, self.rows = columns.take(mask, batch, length, np.zeros(batch, np.int32))
        self.metadata = AttentionMetadata.build(query_lens=lens, seq_lens=lens)
        self.plans: dict[tuple[AttentionSpec, str], Plan] = {}


class _Local(threading.local):
    forward: _Forward | None = None


_local = _Local()
_attentions: WeakKeyDictionary[Any, dict[tuple[AttentionSpec, str | None], Attention]] = WeakKeyDictionary()


def attend_cacheless(module: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
    """Return [batch, T, H, Dv].

    Args:
        module: the layer.
        query: [batch, H, T, D].
        key: [batch, K, T, D].
        value: [batch, K, T, Dv].
        mask: bool[batch, T], True for tokens; None when nothing is padding.
        options: see `layer_spec`.

    Raises:
        ModelError: the keys are not those of the queries' tokens.
    """
    batch, _, length, _ = query.shape
    if key.shape[2] != length:
        raise ModelError(
            f"{type(module).__name__} attends to {key.shape[2]} keys with {length} queries and no paged cache: give "
            "generate() past_key_values=PagedCache(model)"
        )
    spec = layer_spec(module, query, key, value, **options, block_size=DEFAULT_BLOCK_SIZE, cached=False)
    layers = _attentions.setdefault(module, {})
    wanted = (spec, requested()[0])
    layer = layers.get(wanted)
    if layer is None:
        layer = layers[wanted] = attention(spec, **layer_parameters(options["sinks"]))
    forward = _local.forward
    if forward is None or forward.mask is not mask or forward.shape != (batch, length):
        forward = _local.forward = _Forward(mask, batch, length)
    shared = (spec, layer.backend.name)
    plan = forward.plans.get(shared)
    if plan is None:
        plan = forward.plans[shared] = layer.plan(forward.metadata)
    rows = forward.rows
    out = layer.run(plan, pack(query, rows), pack(key, rows), pack(value, rows))
    return unpack(out, rows, batch, length)
