"""A batch on a device: what every backend of this folder needs there, brought in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import PlanError

from .batch import Batch, Writes, cut, fitted, writes_of
from .packing import Packed
from .store import Placed, Store

if TYPE_CHECKING:
    from .layer import Owned

__all__ = ["Arrays", "Prepared", "Step"]

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch on the host, ready to be brought over."""

    batch: Batch
    writes: Writes | None
    arrays: Arrays


class Step:
    """A batch on a device, for every layer of a spec. Backends derive from it what their kernels want.

    Attributes:
        spec: the layers.
        device: where the tensors are.
        paged: keys are in a cache.
        fixed: shapes and addresses stay; `renew` changes contents.
        batch: the host's side.
        placed: what is written (None: nothing).
        idle: bool[T, 1], rows that attend to nothing (None: there are none).
        query_start: i32[s + 1].
        lens: i32[s].
        tables: i32[s, W].
    """

    def __init__(
        self, spec: AttentionSpec, view: BatchView, device: torch.device, *, paged: bool, capacity: int | None
    ) -> None:
        self.spec = spec
        self.device = device
        self.paged = paged
        self.fixed = capacity is not None
        if self.fixed and not paged:
            raise PlanError("a fixed plan is for layers with a cache: the keys of this one are the batch's own")
        batch = cut(view, spec.block_size, paged=paged)
        if capacity is not None:
            if capacity < batch.max_keys:
                raise PlanError(f"max_seq_len={capacity}, but a sequence of the batch has {batch.max_keys} tokens")
            width = -(-capacity // spec.block_size)
            batch = fitted(batch, width, _with_capacity(batch, capacity))
        self.batch = batch
        made = self._arrays(batch, view)
        self._packed = Packed(made.arrays, device)
        tensors = self._packed.tensors
        self.placed = None if made.writes is None else Placed(tensors)
        self.idle = tensors["idle"].view(-1, 1) if "idle" in tensors else None
        self.query_start, self.lens, self.tables = (tensors[n] for n in ("query_start", "lens", "tables"))
        self.bind(tensors)

    def _arrays(self, batch: Batch, view: BatchView) -> Prepared:
        arrays: Arrays = {"query_start": batch.query_start, "lens": batch.lens, "tables": batch.tables}
        if batch.idle is not None:
            arrays["idle"] = batch.idle
        writes = None
        if self.paged and self.spec.writes_kv:
            writes = writes_of(view.side.slots, self.spec.block_size, fixed=self.fixed)
        if writes is not None:
            named = {"rows": writes.rows, "block": writes.block, "offset": writes.offset, "any_row": writes.any_row}
            arrays.update({name: array for name, array in named.items() if array is not None})
        arrays.update(self.more(batch, view))
        return Prepared(batch, writes, arrays)

    def more(self, batch: Batch, view: BatchView) -> Arrays:
        """Return what else a backend wants on the device, in the same copy."""
        return {}

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what `more` brought over; what the vendor plans is planned here."""

    def prepared(self, view: BatchView) -> Prepared:
        """Return another batch in this step's shapes.

        Raises:
            PlanError: it does not fit.
        """
        batch = cut(view, self.spec.block_size, paged=True)
        return self._arrays(fitted(batch, self.batch.tables.shape[1], self.batch), view)

    def renew(self, made: Prepared) -> None:
        """Bring another batch into this step's buffers."""
        self.batch = made.batch
        self._packed.renew(made.arrays)
        self.rebound()

    def write(self, store: Store, k: torch.Tensor, v: torch.Tensor, owned: Owned) -> None:
        """Store new keys and values, if the step writes any."""
        if self.placed is not None:
            store.write(self.placed, k, v, owned.k_scale_there, owned.v_scale_there)

    def rebound(self) -> None:
        """Plan anew what the vendor plans, after `renew`."""


def _with_capacity(batch: Batch, capacity: int) -> Batch:
    return Batch(
        query_start=batch.query_start,
        lens=np.maximum(batch.lens, 1),
        tables=batch.tables,
        idle=batch.idle,
        max_query=batch.max_query,
        min_query=batch.min_query,
        max_keys=capacity,
    )
