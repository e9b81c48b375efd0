"""A plan whose batch lies on devices. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from attn_dispatch.adapters.batch import check_renewable
from attn_dispatch.backend import Plan
from attn_dispatch.contract import AttentionMetadata, BatchView
from attn_dispatch.errors import PlanError

__all__ = ["DevicePlan", "Renewable"]


class Renewable(Protocol):
    """A batch on one device whose buffers can take another batch; see `device_batch.DeviceBatch`."""

    def prepare(self, view: BatchView) -> Any:
        """Return another batch in the shapes of this one, on the host; changes nothing."""

    def renew(self, prepared: Any) -> None:
        """Bring a prepared batch into the buffers."""


@dataclass(slots=True, eq=False, kw_only=True)
class DevicePlan(Plan):
    """A step's batch for every layer of a spec.

    Attributes:
        batches: the batch on devices, by (device, whether there is a cache); made where it is first needed.
        max_seq_len: of a fixed plan, the keys that a sequence may have at most (None: the plan is for its batch alone).
    """

    batches: dict[tuple[Any, bool], Any] = field(default_factory=dict)
    max_seq_len: int | None = None

    def renew(self, metadata: AttentionMetadata) -> None:
        """Bring another batch into the buffers of a fixed plan: one copy to each device, none of them waited for.

        Args:
            metadata: see `Plan.renew`.

        Raises:
            PlanError: see `Plan.renew`. Nothing has been changed.
        """
        if self.max_seq_len is None:
            Plan.renew(self, metadata)  # which raises
        assert self.max_seq_len is not None
        if metadata.block_size != self.spec.block_size:
            raise PlanError(f"the batch has block_size={metadata.block_size}, the plan {self.spec.block_size}")
        view = metadata.view(self.spec.kind)
        check_renewable(self.view, view, self.max_seq_len)
        renewals = [(batch, batch.prepare(view)) for batch in self.batches.values()]
        for batch, prepared in renewals:
            batch.renew(prepared)
        self.view = view
        self.highest_block = view.side.highest_block
