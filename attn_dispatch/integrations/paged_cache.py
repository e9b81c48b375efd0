"""`PagedCache`: a transformers cache whose keys and values lie in blocks, one table and one plan for all the layers.

It is filled in one of two ways. By `model.generate` (or `model(...)`): a rectangle of tokens per call, with padding,
which is dropped. Or packed, by sequences of its `manager`: `next_step` announces some of them, then the model is called
with the step's tokens in one row, [1, T]; nothing is padded, and what is cached of a prompt is not computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import Cache

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Plan
from attn_dispatch.cache import CacheManager, OutOfBlocks, ScheduledStep, Sequence
from attn_dispatch.contract import AttentionSpec, KVCache
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import CacheError, ModelError, PlanError
from attn_dispatch.integrations.layer_spec import layer_parameters, layer_spec
from attn_dispatch.integrations.padding import Columns
from attn_dispatch.integrations.paged_layer import BoundLayer, PagedLayer, PagedStep
from attn_dispatch.integrations.sequences import Rows, Sequences, StepBatch

__all__ = ["NAME", "PagedCache"]

NAME = "attn_dispatch"
"""What `attn_implementation=` is to be."""

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "dummy", "moe", "mlp"}
_FIRST_BLOCKS = 16  # blocks of a cache that grows, before it has seen a batch


class PagedCache(Cache):  # type: ignore[misc]
    """A paged key/value cache for a transformers model whose `attn_implementation` is "attn_dispatch".

    Attributes:
        manager: of packed sequences.
        sequences: lengths and block tables of a padded batch.
        pool: the blocks, of either.
        grows: whether there are more when they are all in use.
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
        strange = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
        if strange:
            raise ModelError(
                f"{config.model_type} has layers of type {', '.join(strange)}; a paged cache holds full and sliding "
                "attention only"
            )
        super().__init__(layers=[PagedLayer(self, i) for i in range(config.num_hidden_layers)])
        self.grows = num_blocks is None
        self.manager = CacheManager(
            _FIRST_BLOCKS if num_blocks is None else num_blocks, block_size, prefix_caching=prefix_sharing
        )
        self.pool = self.manager.pool
        self.sequences = Sequences(block_size, self.pool, grows=self.grows)
        self.backend = backend
        self.kv_cache_dtype = kv_cache_dtype
        self._columns = Columns()
        self._packed = False
        self._step: PagedStep | None = None
        self._number = 0  # of the step; layers that lag behind it still have to take part
        self._bound: dict[Any, BoundLayer] = {}
        self._groups: list[tuple[AttentionSpec, str]] = []

    @property
    def length(self) -> int:
        """Columns of a padded batch so far, padding included (0 when packed)."""
        return self._columns.length

    # A step.

    def next_step(self, wanted: Iterable[tuple[Sequence, int]]) -> ScheduledStep:
        """Announce a packed step: the model is called next with the step's tokens in one row, [1, T].

        Its keys and values are then in the cache: `manager.commit(step)`.

        Args:
            wanted: sequences of the manager, each with the most tokens to compute.

        Raises:
            CacheError: too few free blocks, or the cache is in use by padded batches. Nothing has been changed.
        """
        if self.length:
            raise CacheError("this cache holds a padded batch; reset() it before packed steps")
        wanted = list(wanted)
        while isinstance(step := self.manager.step(wanted), OutOfBlocks):
            if not self.grows:
                raise CacheError(f"{step}, or give the cache more with num_blocks= (it has {self.pool.num_blocks})")
            self.manager.grow(self.pool.num_blocks + max(self.pool.num_blocks, step.needed))
        self._packed = True
        self._start(PagedStep(1, step.num_tokens, step))
        return step

    def _start(self, step: PagedStep) -> None:
        if self._step is not None and not self._step.attended:
            raise ModelError(
                f"the last step's keys were never attended to: the model's attn_implementation is not {NAME!r}. "
                f"model.set_attn_implementation({NAME!r}), and reset() this cache"
            )
        self._step = step
        self._number += 1

    def join(self, layer: PagedLayer, batch_size: int, length: int) -> None:
        """Let a layer take part in the step; the first one begins it."""
        if layer.step_number == self._number or self._step is None:
            if self._packed:
                raise PlanError("a packed step has to be announced: call next_step() before the model")
            if not self.length:
                self.sequences.clear()
                self.sequences.add(batch_size)
            elif batch_size != self.sequences.count:
                raise CacheError(f"the cache holds {self.sequences.count} sequences, this batch is of {batch_size}")
            self._start(PagedStep(batch_size, length))
            self._columns.length += length
        step = self._step
        assert step is not None
        if (step.batch_size, step.length) != (batch_size, length):
            raise CacheError(
                f"layer {layer.index} brings {batch_size} x {length} tokens into a step of "
                f"{step.batch_size} x {step.length}"
            )
        if layer.step_number not in (-1, self._number - 1):
            raise CacheError(f"layer {layer.index} missed a step: its keys and values would be of other tokens")
        layer.step_number = self._number

    def ready(self, mask: Any) -> tuple[PagedStep, StepBatch | ScheduledStep]:
        """Return the step with its batch, which is made when the first layer attends.

        Args:
            mask: bool[batch, columns], True for tokens; None when there is no padding.
        """
        step = self._step
        assert step is not None
        if step.batch is None:
            try:
                new, step.rows = self._columns.take(mask, step.batch_size, step.length, self.sequences.lens)
                step.batch = self.sequences.extend(np.arange(step.batch_size), new)
            except CacheError:
                self._forget(step)
                raise
        step.attended = True
        return step, step.batch

    def _forget(self, step: PagedStep) -> None:
        """Take back a step that could not be made, so that another can be tried."""
        self._columns.length -= step.length
        self._step = None
        for layer in self.layers:
            layer.step_number = -1

    # A layer.

    def bind(self, module: Any, layer: PagedLayer, query: Any, key: Any, value: Any, options: Any) -> BoundLayer:
        """Return a module's attention, chosen when it first attends.

        Args:
            module: the attention module.
            layer: where its keys and values are; another module's when it shares them.
            query: [batch, H, T, D].
            key: [batch, K, T, D].
            value: [batch, K, T, Dv].
            options: `scaling`, `sliding_window`, `softcap`, `sinks`, `causal`.
        """
        bound = self._bound.get(module)
        if bound is None:
            own = getattr(module, "layer_idx", layer.index) == layer.index
            spec = layer_spec(
                module,
                query,
                key,
                value,
                **options,
                block_size=self.sequences.block_size,
                kv_cache_dtype=self.kv_cache_dtype,
                writes_kv=own,
            )
            # Layers of equal specs are given the same object: that their plan is theirs is then seen at a glance.
            spec = next((known for known, _ in self._groups if known == spec), spec)
            chosen = attention(spec, self.backend, **layer_parameters(options["sinks"]))
            group = (spec, chosen.backend.name)
            if group not in self._groups:
                self._groups.append(group)
            bound = self._bound[module] = BoundLayer(chosen, self._groups.index(group))
        return bound

    def plan(self, step: PagedStep, batch: StepBatch | ScheduledStep, bound: BoundLayer) -> Plan:
        """Return the step's plan for the specs that are equal to this layer's, made once."""
        plans = step.plans
        while len(plans) <= bound.group:
            plans.append(None)
        plan = plans[bound.group]
        if plan is None:
            plan = plans[bound.group] = bound.attention.plan(batch.metadata)
        return plan

    def store(self, layer: PagedLayer, batch: StepBatch | ScheduledStep, bound: BoundLayer, device: Any) -> KVCache:
        """Return a layer's blocks, as many as the pool has, with shared ones copied before they are written into."""
        store = layer.store
        if store is None or store.num_blocks < self.pool.num_blocks:
            torch_owns = "torch" in bound.attention.backend.capabilities.libraries
            grown = bound.attention.allocate(self.pool.num_blocks, str(device) if torch_owns else None)
            if store is not None:
                store.swap_blocks(grown, [(block, block) for block in range(store.num_blocks)])
            store = layer.store = grown
            layer.is_initialized = True
        if batch.copy_from and bound.writes:
            store.copy_blocks(batch.copy_from, batch.copy_to)
        return store

    @property
    def attentions(self) -> list[tuple[Attention, int]]:
        """One layer's attention for each spec and backend in use, and how many layers are like it."""
        first: dict[int, Attention] = {}
        for bound in self._bound.values():
            first.setdefault(bound.group, bound.attention)
        counts = Counter(bound.group for bound in self._bound.values())
        return [(first[group], counts[group]) for group in sorted(first)]

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
        return self.sequences.count or len(self.manager.sequences) or -1

    def reset(self) -> None:
        """Forget all sequences and prefixes; the blocks stay allocated."""
        self.sequences.clear()
        for seq in self.manager.sequences:
            self.manager.free(seq)
        self.manager.clear_cache()
        self._columns = Columns()
        self._packed = False
        self._step = None
        for layer in self.layers:
            layer.step_number = -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence; `tokens_to_remove` is 0 or negative, as transformers has it.

        Raises:
            CacheError: it is positive, or there is padding among these columns.
        """
        if tokens_to_remove > 0:
            raise CacheError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self._columns.drop(-tokens_to_remove)
        self.sequences.truncate(np.arange(self.sequences.count), -tokens_to_remove)

    def _select(self, order: Rows) -> None:
        if self._packed:
            raise CacheError("the sequences of a packed cache come and go one by one: use manager.fork and .free")
        if self.length:
            self.sequences.select(order)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Make sequence i what sequence `beam_idx[i]` was. Nothing is copied until a shared block is written into."""
        self._select(beam_idx.cpu().numpy().astype(np.intp))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these sequences (numbers, or one bool for each)."""
        self._select(np.arange(self.sequences.count)[indices.cpu().numpy()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence; the blocks are shared."""
        self._select(np.repeat(np.arange(self.sequences.count), repeats))

    def __repr__(self) -> str:
        tokens = self.sequences.num_tokens + sum(seq.computed for seq in self.manager.sequences)
        return (
            f"PagedCache({len(self.layers)} layers, {max(self.batch_size, 0)} sequences, {tokens} "
            f"tokens in {self.pool.in_use} of {self.pool.num_blocks} blocks of {self.sequences.block_size})"
        )
