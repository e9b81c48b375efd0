"""`PagedLayer`: one layer of a `PagedCache`: the blocks that store its keys and values."""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any, Self
from weakref import ref

import torch
from transformers.cache_utils import CacheLayerMixin

from attn_dispatch.attention import Attention
from attn_dispatch.cache import ScheduledStep
from attn_dispatch.contract import KVCache
from attn_dispatch.errors import CacheError, ModelError
from attn_dispatch.integrations.layer_spec import LayerCall
from attn_dispatch.integrations.masks import LayerMask
from attn_dispatch.integrations.padding import pack, unpack
from attn_dispatch.integrations.paged_state import PagedState

__all__ = ["LayerUpdate", "PagedLayer", "arriving_update"]

_ATTRIBUTE = "attn_dispatch_update"


class LayerUpdate:
    """What `update` returned to a module: the keys carry it to the attention function.

    Attributes:
        layer: whose keys they are.
        value: the values that were returned with them.
        step_number: of the forward.
        written: whether they have been attended to, and so stored.
    """

    __slots__ = ("layer", "step_number", "value", "written")

    def __init__(self, layer: PagedLayer, value: Any) -> None:
        self.layer = layer
        self.value = value
        self.step_number = layer.state.number
        self.written = False


class _Pending(threading.local):
    """The layer whose `update` was called last in this thread."""

    layer: ref[PagedLayer] | None = None


_pending = _Pending()


def arriving_update(module: Any, key: Any, value: Any) -> LayerUpdate | None:
    """Return the update that a module's keys come from (None: no paged cache).

    Raises:
        ModelError: the module has changed what `update` returned: expanded, split or combined it.
    """
    update = getattr(key, _ATTRIBUTE, None)
    if isinstance(update, LayerUpdate):
        update.layer.state.attended()
        return update
    layer = None if _pending.layer is None else _pending.layer()
    if layer is None or layer.state.pending != layer.index or getattr(module, "layer_idx", layer.index) != layer.index:
        return None
    state = layer.state
    state.attended()
    step = state.step
    if hasattr(module, "expand_kv") and step is not None and key.shape[::2] == (step.batch_size, step.length):
        # Multi-head latent attention, in transformers' own words: each token's keys and values come from its latent
        # alone. What is stored is what arrives, of the new tokens.
        return LayerUpdate(layer, value)
    raise ModelError(
        f"{type(module).__name__} (layer {layer.index}) attends to other keys than those that the cache returned (it "
        "expands or combines them afterwards), and only those are in its blocks: run it without a PagedCache"
    )


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's place in a `PagedCache`: the arrays of its blocks. What layers share is in `state`."""

    is_sliding = False  # the whole sequence is kept: a window is the kernel's business
    is_croppable = True
    supports_early_init = False

    def __init__(self, state: PagedState, index: int) -> None:
        super().__init__()
        self.state = state
        self.index = index
        self.store: KVCache | None = None
        self.step_number = -1  # the last step that it took part in
        self._attention: Attention | None = None  # by which the store was allocated

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Do nothing: the arrays are allocated when the layer attends, by the backend that runs it."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take part in the step. The keys carry the update to the attention function, which is what stores them."""
        self.state.join(self.index, self.step_number, key_states.shape[0], key_states.shape[2])
        self.step_number = self.state.number
        _pending.layer = ref(self)
        if key_states is value_states:
            value_states = value_states.view_as(value_states)
        setattr(key_states, _ATTRIBUTE, LayerUpdate(self, value_states))
        return key_states, value_states

    def attend(self, update: LayerUpdate, call: LayerCall, mask: LayerMask) -> Any:
        """Store the step's keys and values and return [batch, T, H, Dv].

        Raises:
            ModelError: the keys and values are not those that `update` returned, or arrive twice.
        """
        state, module = self.state, call.module
        writes = getattr(module, "layer_idx", self.index) == self.index  # else it reads another layer's keys
        if call.value is not update.value or update.step_number != state.number or (writes and update.written):
            raise ModelError(
                f"{type(module).__name__} (layer {self.index}) attends to other keys or values than those that the "
                "cache returned, or to them twice (it splits or combines them): run it without a PagedCache"
            )
        if mask.has_gaps and call.pattern.window != (-1, 0) and call.pattern.window != (-1, -1):
            raise ModelError(f"{type(module).__name__} has a window, and attention_mask has padding between the tokens")
        update.written = update.written or writes
        step, batch = state.ready(mask, call.query.device)
        if not batch.sequences:  # all padding
            return call.query.new_zeros(step.batch_size, step.length, call.query.shape[1], call.value.shape[3])
        layer = state.bind(call, writes=writes)
        plan = state.plan(step, batch, layer)
        store = self._stored(batch, layer, call.key.device)
        rows = step.rows
        k, v = (pack(call.key, rows), pack(call.value, rows)) if writes else (None, None)
        out = layer.run(plan, pack(call.query, rows), k, v, store)
        return unpack(out, rows, step.batch_size, step.length)

    def _stored(self, batch: ScheduledStep, layer: Attention, device: Any) -> KVCache:
        """Return the layer's blocks, as many as the pool has, with shared ones copied before they are written into."""
        store, num_blocks = self.store, self.state.manager.num_blocks
        if store is None or store.num_blocks < num_blocks:
            torch_owns = "torch" in layer.backend.capabilities.libraries
            grown = layer.allocate(num_blocks, str(device) if torch_owns else None)
            if store is not None:
                store.swap_blocks(grown, [(block, block) for block in range(store.num_blocks)])
            store = self.store = grown
            self._attention = layer
            self.is_initialized = True
        if batch.copy_from and layer.spec.writes_kv:
            store.copy_blocks(batch.copy_from, batch.copy_to)
        return store

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self)(deepcopy(self.state, memo), self.index)
        memo[id(self)] = other
        other.step_number, other.is_initialized, other._attention = (
            self.step_number,
            self.is_initialized,
            self._attention,
        )
        if self.store is not None and self._attention is not None:
            other.store = self._attention.allocate(self.store.num_blocks, self.store.device)
            self.store.swap_blocks(other.store, [(block, block) for block in range(self.store.num_blocks)])
        return other

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask has, and the first of them."""
        return self.state.columns.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns of the batch so far, padding included, as transformers counts."""
        return self.state.columns.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit but the pool's."""
        return -1

    # What concerns the sequences is done once for all the layers.

    def reset(self) -> None:
        """Forget everything; see `PagedCache.reset`."""
        self.state.reset()

    def _refuse(self, *args: Any) -> None:
        raise CacheError(
            "the layers of a PagedCache share their block tables: call this of the cache, not of one layer"
        )

    reorder_cache = crop = batch_select_indices = batch_repeat_interleave = _refuse

    def offload(self) -> None:
        """Refuse."""
        raise CacheError("a PagedCache does not offload its layers; KVCache.swap_blocks moves blocks between devices")

    prefetch = offload
