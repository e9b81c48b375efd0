"""`CrossMemory`: the encoder's keys and values of one cross attention, in blocks, written when they change."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np

from attn_dispatch.attention import Attention
from attn_dispatch.contract import AttentionMetadata, KVCache
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.integrations.layer_spec import LayerCall
from attn_dispatch.integrations.masks import LayerMask
from attn_dispatch.integrations.padding import pack, token_rows, unpack

__all__ = ["CrossMemory"]


class CrossMemory:
    """What a cross attention layer reads: written once, and read by every step of the decoder.

    Attributes:
        attention: the layer.
    """

    def __init__(self, layer: Attention) -> None:
        self.attention = layer
        self._store: KVCache | None = None
        self._contents: tuple[Any, ...] | None = None

    def attend(self, call: LayerCall, mask: LayerMask) -> Any:
        """Return [batch, T, H, Dv]: every column of the queries sees the keys that are tokens."""
        batch, _, length, _ = call.query.shape
        columns = call.key.shape[2]
        num_blocks = batch * _blocks(columns)
        if self._store is None or self._store.num_blocks < num_blocks:
            torch_owns = "torch" in self.attention.backend.capabilities.libraries
            self._store = self.attention.allocate(num_blocks, str(call.key.device) if torch_owns else None)
            self._contents = None
        writes = not self._stored(call, mask)
        shape = (batch, length, columns, writes)
        rows, metadata = mask.memoize(("cross", *shape), lambda: _batch(mask, shape, call.key.device))
        plan = mask.memoize(
            (self.attention.spec, self.attention.backend.name, *shape), lambda: self.attention.plan(metadata)
        )
        k, v = (pack(call.key, rows), pack(call.value, rows)) if writes else (None, None)
        self._contents = None  # until they are written
        out = self.attention.run(plan, pack(call.query, None), k, v, self._store)
        padding = None if mask.padding is None else mask.padding.tobytes()
        self._contents = (ref(call.key), _version(call.key), ref(call.value), _version(call.value), padding)
        return unpack(out, None, batch, length)

    def _stored(self, call: LayerCall, mask: LayerMask) -> bool:
        """Return whether the blocks hold these very tensors, unchanged."""
        if self._contents is None:
            return False
        key, key_version, value, value_version, padding = self._contents
        return (
            key() is call.key
            and value() is call.value
            and key_version is not None
            and key_version == _version(call.key)
            and value_version == _version(call.value)
            and padding == (None if mask.padding is None else mask.padding.tobytes())
        )


def _version(tensor: Any) -> int | None:
    """Return what counts the changes of a tensor in place (None: nothing does, under inference_mode)."""
    return None if tensor.is_inference() else int(tensor._version)


def _batch(mask: LayerMask, shape: tuple[int, int, int, bool], device: Any) -> tuple[Any, AttentionMetadata]:
    batch, length, columns, writes = shape
    lens, rows = token_rows(mask.padding, batch, columns, device)
    queries = np.full(batch, length, np.int32)
    blocks = np.arange(batch * _blocks(columns), dtype=np.int32)
    return rows, AttentionMetadata.build(
        query_lens=queries,
        seq_lens=queries,
        encoder_query_lens=lens if writes else np.zeros_like(lens),
        encoder_seq_lens=lens,
        encoder_block_tables=blocks.reshape(batch, -1),
        block_size=DEFAULT_BLOCK_SIZE,
    )


def _blocks(columns: int) -> int:
    return max(-(-columns // DEFAULT_BLOCK_SIZE), 1)
