"""One layer of a `PagedCache`, and what a step of the model consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import CacheLayerMixin

from attn_dispatch.attention import Attention
from attn_dispatch.backend import Plan
from attn_dispatch.cache import ScheduledStep
from attn_dispatch.contract import KVCache
from attn_dispatch.errors import CacheError
from attn_dispatch.integrations.sequences import StepBatch

if TYPE_CHECKING:
    from attn_dispatch.integrations.paged_cache import PagedCache

__all__ = ["BoundLayer", "PagedLayer", "PagedStep"]


class PagedStep:
    """One forward of the model: its batch (known when the first layer attends) and its plans, one per spec."""

    __slots__ = ("attended", "batch", "batch_size", "length", "plans", "rows")

    def __init__(self, batch_size: int, length: int, batch: StepBatch | ScheduledStep | None = None) -> None:
        self.batch_size = batch_size
        self.length = length
        self.batch = batch
        self.rows: Any = None  # i64[T], which rows of the rectangle are tokens (None: all)
        self.plans: list[Plan | None] = []
        self.attended = False


class BoundLayer:
    """An attention module on its backend.

    Attributes:
        attention: what runs.
        group: which of the step's plans is its own.
        writes: False when its keys and values are another layer's.
    """

    __slots__ = ("attention", "group", "writes")

    def __init__(self, layer: Attention, group: int) -> None:
        self.attention = layer
        self.group = group
        self.writes = layer.spec.writes_kv


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's place in a `PagedCache`: the arrays of its blocks. Everything that layers share is the cache's."""

    is_sliding = False  # the whole sequence is kept: a window is the kernel's business
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.store: KVCache | None = None
        self.step_number = -1  # the last step that it took part in

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Do nothing: the arrays are made when the layer attends, by the backend that runs it."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take part in the step. The keys carry the layer to the attention function, which is what stores them."""
        self.cache.join(self, key_states.shape[0], key_states.shape[2])
        key_states.paged_layer = self
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask has, and the first of them."""
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns of the batch so far, padding included, as transformers counts."""
        return self.cache.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit but the pool's."""
        return -1

    # What concerns the sequences is done once for all the layers.

    def reset(self) -> None:
        """Forget everything; see `PagedCache.reset`."""
        self.cache.reset()

    def _refuse(self, *args: Any) -> None:
        raise CacheError(
            "the layers of a PagedCache share their block tables: call this of the cache, not of one layer"
        )

    reorder_cache = crop = batch_select_indices = batch_repeat_interleave = _refuse

    def offload(self) -> None:
        """Refuse."""
        raise CacheError("a PagedCache does not offload its layers; KVCache.swap_blocks moves blocks between devices")

    prefetch = offload
