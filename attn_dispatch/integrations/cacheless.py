"""A transformers layer without a cache: it attends to the call's own tokens (scoring, embedding, encoders)."""

from __future__ import annotations

import inspect
import threading
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from attn_dispatch.attention import Attention, attention
from attn_dispatch.contract import AttentionMetadata
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE, Kind
from attn_dispatch.dispatch import requested
from attn_dispatch.errors import ModelError
from attn_dispatch.integrations.cross_memory import CrossMemory
from attn_dispatch.integrations.layer_spec import LayerCall
from attn_dispatch.integrations.masks import LayerMask
from attn_dispatch.integrations.padding import pack, token_rows, unpack

__all__ = ["attend_cacheless"]


class _UnpaddedMasks(threading.local):
    """Masks of forwards without padding, whose plans depend on nothing but shapes: kept for the next forward."""

    def __init__(self) -> None:
        self.masks: dict[Any, LayerMask] = {}

    def shared(self, mask: LayerMask, shape: tuple[int, ...]) -> LayerMask:
        if mask.padding is not None:
            return mask
        if len(self.masks) > 16:
            self.masks.clear()
        return self.masks.setdefault((mask.pattern, shape), mask)


_unpadded = _UnpaddedMasks()
_attentions: WeakKeyDictionary[Any, dict[Any, tuple[object, Attention]]] = WeakKeyDictionary()
_memories: WeakKeyDictionary[Any, CrossMemory] = WeakKeyDictionary()


def attend_cacheless(call: LayerCall, mask: LayerMask) -> Any:
    """Return [batch, T, H, Dv].

    Raises:
        ModelError: the keys are not those of the queries' tokens, and the layer is no cross attention.
    """
    batch, _, length, _ = call.query.shape
    columns = call.key.shape[2]
    name = type(call.module).__name__
    if mask.padding is not None and mask.padding.shape != (batch, columns):
        raise ModelError(f"{name}: attention_mask is {mask.padding.shape}, the keys are ({batch}, {columns})")
    mask = _unpadded.shared(mask, (batch, length, columns))
    pattern = mask.pattern
    unlimited = not pattern.causal and pattern.window == (-1, -1)
    if unlimited and (columns != length or (mask.padding is not None and _may_be_cross(call.module))):
        return _attend_cross(call, mask)
    if columns != length:
        raise ModelError(
            f"{name} attends to {columns} keys with {length} queries and no paged cache: give "
            "generate() past_key_values=PagedCache(model)"
        )
    if mask.has_gaps and not (unlimited or pattern == type(pattern)(causal=True)):
        raise ModelError(f"{name} has a window or chunks, and attention_mask has padding between the tokens")
    rows, metadata = mask.memoize("self", lambda: _own_tokens(mask, batch, length, call.query.device))
    layer = _attention(call, "encoder")
    plan = mask.memoize((layer.spec, layer.backend.name), lambda: layer.plan(metadata))
    out = layer.run(plan, pack(call.query, rows), pack(call.key, rows), pack(call.value, rows))
    return unpack(out, rows, batch, length)


def _own_tokens(mask: LayerMask, batch: int, length: int, device: Any) -> tuple[Any, AttentionMetadata]:
    lens, rows = token_rows(mask.padding, batch, length, device)
    if mask.pattern.chunk is None:
        pieces = lens
    else:  # a chunk sees nothing of the others: it is a sequence of its own
        size = mask.pattern.chunk
        pieces = np.array([min(size, n - at) for n in lens.tolist() for at in range(0, max(n, 1), size)], np.int32)
    return rows, AttentionMetadata.build(query_lens=pieces, seq_lens=pieces)


def _attend_cross(call: LayerCall, mask: LayerMask) -> Any:
    """Attend from every column of the queries to the keys that are tokens."""
    layer = _attention(call, "cross")
    memory = _memories.get(call.module)
    if memory is None or memory.attention is not layer:
        memory = _memories[call.module] = CrossMemory(layer)
    return memory.attend(call, mask)


def _attention(call: LayerCall, kind: Kind) -> Attention:
    """Return a module's attention, chosen anew when what it asks for, its parameters or the selection change."""
    known = _attentions.setdefault(call.module, {})
    name = (call.options, kind, requested()[0])
    version, layer = known.get(name, (None, None))
    if layer is None or version != call.parameters_key:
        layer = attention(call.spec(kind, DEFAULT_BLOCK_SIZE), **call.parameters)
        known[name] = (call.parameters_key, layer)
    return layer


def _may_be_cross(module: Any) -> bool:
    """Return whether a module that sees both sides may be given another model's states: its own class says so."""
    if getattr(module, "is_decoder", None) is False:
        return False
    return _takes_other_states(type(module))  # type: ignore[arg-type]  # classes can be hashed


@cache
def _takes_other_states(module_class: type) -> bool:
    names = set(inspect.signature(module_class.forward).parameters) - {"past_key_values"}  # type: ignore[attr-defined]
    hints = ("encoder", "key_value", "cross", "context", "memory")
    return "hidden_states" not in names or any(hint in name for name in names for hint in hints)
