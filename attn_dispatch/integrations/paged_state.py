"""`PagedState`: what the layers of a `PagedCache` share: sequences, the step under way, attention modules."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Plan
from attn_dispatch.cache import CacheManager, ScheduledStep
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import CacheError, ModelError, PlanError
from attn_dispatch.integrations.layer_spec import LayerCall
from attn_dispatch.integrations.masks import LayerMask
from attn_dispatch.integrations.padded_batch import PaddedBatch
from attn_dispatch.integrations.padding import Columns

__all__ = ["NAME", "BoundLayer", "PagedState", "PagedStep"]

NAME = "attn_dispatch"
"""The value of `attn_implementation=`."""


class PagedStep:
    """One forward of the model: its batch (known when the first layer attends) and its plans, one per spec.

    Attributes:
        batch_size, length: of the rectangle of tokens.
        batch: the scheduled step.
        rows: i64[T], which rows of the rectangle are tokens (None: all).
        plans: by spec and backend.
    """

    __slots__ = ("batch", "batch_size", "length", "plans", "rows")

    def __init__(self, batch_size: int, length: int, batch: ScheduledStep | None = None) -> None:
        self.batch_size = batch_size
        self.length = length
        self.batch = batch
        self.rows: Any = None
        self.plans: dict[tuple[AttentionSpec, str], Plan] = {}


class BoundLayer(NamedTuple):
    """An attention module on its backend.

    Attributes:
        attention: what runs.
        options: what it was chosen for.
        parameters_key: of the parameters that it was given.
    """

    attention: Attention
    options: tuple[Any, ...]
    parameters_key: object

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class PagedState:
    """Bookkeeping that all the layers of a cache share; it has no arrays, and refers to no layer.

    Attributes:
        manager: sequences and their blocks.
        padded: those of a padded batch.
        columns: of a padded batch so far.
        packed: the cache is filled by announced steps.
        grows: whether there are more blocks when all are in use.
        step: the forward under way, or the last one.
        number: of that step; a layer that lags behind it still has to take part.
        pending: the layer whose keys were returned by `update` and not attended to yet.
        bound: attention modules.
    """

    def __init__(self, manager: CacheManager, *, grows: bool, backend: str | None, kv_cache_dtype: str | None) -> None:
        self.manager = manager
        self.grows = grows
        self.backend = backend
        self.kv_cache_dtype = kv_cache_dtype
        self.padded = PaddedBatch(manager, grows=grows)
        self.bound: WeakKeyDictionary[Any, BoundLayer] = WeakKeyDictionary()
        self.number = 0
        self.first_number = 0  # of the steps since the cache was reset
        self.reset()

    def reset(self) -> None:
        """Forget all sequences and prefixes; the blocks stay allocated."""
        self.padded.clear()
        for seq in self.manager.sequences:
            self.manager.free(seq)
        self.manager.clear_cache()
        self.columns = Columns()
        self.packed = False
        self.step: PagedStep | None = None
        self.pending: int | None = None
        self.first_number = self.number

    def start(self, step: PagedStep) -> None:
        """Begin a forward."""
        self.step = step
        self.number += 1

    def join(self, index: int, step_number: int, batch_size: int, length: int) -> None:
        """Let a layer take part in the step; the first one begins it.

        Args:
            index: of the layer.
            step_number: the last step that it took part in (-1: none).
            batch_size: of its keys.
            length: of its keys.

        Raises:
            ModelError: the keys of the layer before were not attended to.
            CacheError: the layer's keys are not those of the step.
            PlanError: a packed step was not announced.
        """
        if self.pending is not None:
            raise ModelError(
                f"layer {self.pending}: the keys that the cache returned were never attended to by {NAME!r}: this "
                f"model attends elsewhere. model.set_attn_implementation({NAME!r}), and reset() this cache"
            )
        if step_number == self.number or self.step is None:
            self._begin_padded(batch_size, length)
        step = self.step
        assert step is not None
        if (step.batch_size, step.length) != (batch_size, length):
            raise CacheError(
                f"layer {index} has {batch_size} x {length} tokens in a step of {step.batch_size} x {step.length}"
            )
        if max(step_number, self.first_number) < self.number - 1:
            raise CacheError(f"layer {index} missed a step: its keys and values would be of other tokens")
        self.pending = index

    def _begin_padded(self, batch_size: int, length: int) -> None:
        if self.packed:
            raise PlanError("a packed step has to be announced: call next_step() before the model")
        if not self.columns.length:
            self.padded.begin(batch_size)
        elif batch_size != self.padded.count:
            raise CacheError(f"the cache holds {self.padded.count} sequences, this batch is of {batch_size}")
        self.start(PagedStep(batch_size, length))
        self.columns.length += length

    def attended(self) -> None:
        """Record that the pending keys have arrived at the attention function."""
        self.pending = None

    def ready(self, mask: LayerMask, device: Any) -> tuple[PagedStep, ScheduledStep]:
        """Return the step with its batch, which is made when the first layer attends."""
        step = self.step
        assert step is not None
        if step.batch is None:
            try:
                new, step.rows = self.columns.take(mask, step.batch_size, step.length, self.padded.lens, device)
                step.batch = self.padded.extend(new)
            except CacheError:  # take the step back, so that another can be tried
                self.columns.length -= step.length
                self.step = None
                self.first_number = self.number
                raise
        return step, step.batch

    def bind(self, call: LayerCall, *, writes: bool) -> Attention:
        """Return a module's attention, chosen anew when what it asks for or its parameters change."""
        bound = self.bound.get(call.module)
        if bound is None or bound.options != call.options or bound.parameters_key != call.parameters_key:
            spec = call.spec("decoder", self.manager.block_size, kv_cache_dtype=self.kv_cache_dtype, writes_kv=writes)
            # Layers of equal specs are given the same object: that their plan is theirs is then seen at a glance.
            spec = next((known.attention.spec for known in self.bound.values() if known.attention.spec == spec), spec)
            chosen = attention(spec, self.backend, **call.parameters)
            bound = self.bound[call.module] = BoundLayer(chosen, call.options, call.parameters_key)
        return bound.attention

    def plan(self, step: PagedStep, batch: ScheduledStep, layer: Attention) -> Plan:
        """Return the step's plan for the specs that are equal to this layer's, made once."""
        name = (layer.spec, layer.backend.name)
        plan = step.plans.get(name)
        if plan is None:
            plan = step.plans[name] = layer.plan(batch.metadata)
        return plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        step, others = self.step, {name: value for name, value in vars(self).items() if name not in ("step", "bound")}
        vars(other).update(deepcopy(others, memo))
        other.bound = WeakKeyDictionary(self.bound)
        # Plans belong to the step that is over: the copy goes on with the next one.
        other.step = None if step is None else PagedStep(step.batch_size, step.length, deepcopy(step.batch, memo))
        return other
