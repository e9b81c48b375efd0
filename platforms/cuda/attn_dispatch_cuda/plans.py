"""Plans of this folder's backends. No vendor is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attn_dispatch import AttentionMetadata, Plan
from attn_dispatch.errors import PlanError

if TYPE_CHECKING:
    from .step import Step

__all__ = ["CudaPlan"]


@dataclass(slots=True, eq=False, kw_only=True)
class CudaPlan(Plan):
    """A batch for every layer of a spec.

    Attributes:
        steps: what is on a device, by (device, whether there is a cache): made when first wanted there.
        capacity: keys that a sequence of a fixed plan can have at most (None: the plan is for its batch alone).
    """

    steps: dict[tuple[Any, bool], Step] = field(default_factory=dict)
    capacity: int | None = None

    def renew(self, metadata: AttentionMetadata) -> None:
        """Bring another batch into the buffers of a fixed plan, so that a captured graph computes it when replayed.

        The batch has the same number of query rows in each sequence; sequences that are over are padding (length 0,
        slots of -1). Costs one copy to the device for each device that the plan is on, and no synchronisation.

        Args:
            metadata: the new batch.

        Raises:
            PlanError: the plan is not a fixed one, or the batch does not fit into it. Nothing has been changed.
        """
        if self.capacity is None:
            raise PlanError("only a fixed plan can be renewed: make it with the backend's fixed_plan(spec, metadata)")
        if metadata.block_size != self.spec.block_size:
            raise PlanError(f"the batch has block_size={metadata.block_size}, the plan {self.spec.block_size}")
        view = metadata.view(self.spec.kind)
        if (view.num_tokens, view.num_new) != (self.num_tokens, self.num_new):
            raise PlanError(
                f"a fixed plan keeps its shape: {self.num_tokens} query rows and {self.num_new} new keys, this batch "
                f"has {view.num_tokens} and {view.num_new}"
            )
        prepared = [(step, step.prepared(view)) for step in self.steps.values()]
        for step, arrays in prepared:
            step.renew(arrays)
        self.view = view
        self.highest_block = view.side.highest_block
