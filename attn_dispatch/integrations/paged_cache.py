"""`PagedCache`: a transformers cache whose keys and values are in blocks, one table and one plan for all the layers.

It is filled in one of two ways. By `model.generate` (or `model(...)`): a rectangle of tokens per call, with padding,
which is dropped. Or packed, by sequences of its `manager`: `next_step` announces some of them, then the model is called
with the step's tokens in one row, [1, T]; nothing is padded, and what is cached of a prompt is not computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import Cache

from attn_dispatch.attention import Attention
from attn_dispatch.cache import BlockPool, CacheManager, ScheduledStep, Sequence
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import CacheError, ModelError
from attn_dispatch.integrations.padded_batch import schedule
from attn_dispatch.integrations.paged_layer import PagedLayer
from attn_dispatch.integrations.paged_state import NAME, PagedState, PagedStep

__all__ = ["PagedCache"]

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "dummy", "moe", "mlp"}
_FIRST_BLOCKS = 16  # blocks of a cache that grows, before it has seen a batch


class PagedCache(Cache):  # type: ignore[misc]
    """A paged key/value cache for a transformers model whose `attn_implementation` is "attn_dispatch".

    A `deepcopy` goes on from the same tokens in blocks of its own.

    Attributes:
        manager: its sequences and their blocks.
        grows: whether there are more blocks when all are in use.
        backend: what `attention` was asked for.
    """

    def __init__(
        self,
        model: Any,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        backend: str | None = None,
        kv_cache_dtype: str | None = None,
        prefix_sharing: bool = True,
    ) -> None:
        """Make an empty cache.

        Args:
            model: a transformers model, or its config.
            block_size: B.
            num_blocks: N, fixed (None: grows as needed).
            backend: the one that every layer is to run on (None: chosen for each spec).
            kv_cache_dtype: type that is stored (None: the layers').
            prefix_sharing: packed sequences find each other's prefixes, also after their ends.

        Raises:
            ModelError: the model does not attend through attn_dispatch, or has layers that a paged cache cannot hold.
        """
        config = getattr(model, "config", model).get_text_config(decoder=True)
        if config._attn_implementation != NAME:
            raise ModelError(
                f"{config.model_type} attends with {config._attn_implementation!r}, which cannot read a paged cache: "
                f"register(), then model.set_attn_implementation({NAME!r})"
            )
        unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
        if unknown:
            raise ModelError(
                f"{config.model_type} has layers of type {', '.join(unknown)}; a paged cache holds full and sliding "
                "attention only"
            )
        grows = num_blocks is None
        self.state = PagedState(
            CacheManager(num_blocks or _FIRST_BLOCKS, block_size, prefix_caching=prefix_sharing),
            grows=grows,
            backend=backend,
            kv_cache_dtype=kv_cache_dtype,
        )
        super().__init__(layers=[PagedLayer(self.state, i) for i in range(config.num_hidden_layers)])

    @property
    def manager(self) -> CacheManager:
        """The sequences and their blocks."""
        return self.state.manager

    @property
    def pool(self) -> BlockPool:
        """The blocks."""
        return self.state.manager.pool

    @property
    def grows(self) -> bool:
        """Whether there are more blocks when all are in use."""
        return self.state.grows

    @property
    def backend(self) -> str | None:
        """The backend that every layer is to run on (None: chosen for each spec)."""
        return self.state.backend

    @property
    def length(self) -> int:
        """Columns of a padded batch so far, padding included (0 when packed)."""
        return self.state.columns.length

    @property
    def lens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence of a padded batch, i32[batch]."""
        return self.state.padded.lens

    def next_step(self, requests: Iterable[tuple[Sequence, int]]) -> ScheduledStep:
        """Announce a packed step: the model is called next with the step's tokens in one row, [1, T].

        Its keys and values are then in the cache: `manager.commit(step)`.

        Args:
            requests: sequences of the manager, each with the most tokens to compute.

        Raises:
            CacheError: too few free blocks, or the cache is in use by padded batches. Nothing has been changed.
        """
        if self.length:
            raise CacheError("this cache holds a padded batch; reset() it before packed steps")
        step = schedule(self.manager, list(requests), grows=self.grows)
        self.state.packed = True
        self.state.start(PagedStep(1, step.num_tokens, step))
        return step

    @property
    def attentions(self) -> list[tuple[Attention, int]]:
        """One layer's attention for each spec and backend in use, and how many layers are like it."""
        layers = [bound.attention for bound in self.state.bound.values()]
        names = Counter((layer.spec, layer.backend.name) for layer in layers)
        first = {(layer.spec, layer.backend.name): layer for layer in reversed(layers)}
        return [(first[name], count) for name, count in names.items()]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers together (0 before the first step)."""
        stores = [layer.store for layer in self.layers if layer.store is not None]
        return sum(int(array.nbytes) // store.num_blocks for store in stores for array in store.arrays.values())

    # What transformers asks of a cache.

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take part in the step; see `PagedLayer.update`."""
        updated: tuple[Any, Any] = self.layers[layer_idx].update(key_states, value_states)
        return updated

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before the first."""
        return len(self.manager.sequences) or -1

    def reset(self) -> None:
        """Forget all sequences and prefixes; the blocks stay allocated."""
        self.state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence; `tokens_to_remove` is 0 or negative, as transformers has it.

        Raises:
            CacheError: it is positive, or there is padding among these columns.
        """
        if tokens_to_remove > 0:
            raise CacheError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self.state.columns.drop(-tokens_to_remove)
        self.state.padded.truncate(-tokens_to_remove)

    def _select(self, order: npt.NDArray[np.intp]) -> None:
        if self.state.packed:
            raise CacheError("the sequences of a packed cache come and go one by one: use manager.fork and .free")
        if self.length:
            self.state.padded.select(order)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Make sequence i what sequence `beam_idx[i]` was. Nothing is copied until a shared block is written into."""
        self._select(beam_idx.cpu().numpy().astype(np.intp))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these sequences (numbers, or one bool for each)."""
        self._select(np.arange(self.state.padded.count)[indices.cpu().numpy()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence; the blocks are shared."""
        self._select(np.repeat(np.arange(self.state.padded.count), repeats))

    def __repr__(self) -> str:
        tokens = sum(seq.computed for seq in self.manager.sequences)
        return (
            f"PagedCache({len(self.layers)} layers, {max(self.batch_size, 0)} sequences, {tokens} "
            f"tokens in {self.pool.in_use} of {self.pool.num_blocks} blocks of {self.manager.block_size})"
        )
