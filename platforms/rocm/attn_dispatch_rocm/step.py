"""A batch on a device, brought in one copy; and the plan that holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.backend import Plan
from attn_dispatch.contract import AttentionSpec, BatchView

from .batch import Batch, cut, token_list, writes_of
from .packing import packed
from .store import Store

if TYPE_CHECKING:
    from .calls import Call

__all__ = ["RocmPlan", "Step"]


@dataclass(slots=True, eq=False, kw_only=True)
class RocmPlan(Plan):
    """A batch for every layer of a spec.

    Attributes:
        steps: what is on a device, by (device, whether there is a cache): made when first wanted there.
    """

    steps: dict[tuple[Any, bool], Step] = field(default_factory=dict)


class Step:
    """A batch on a device, for every layer of a spec.

    Attributes:
        spec: the layers.
        device: where the tensors are.
        paged: keys are in a cache.
        slots: of the cache that the batch reaches, from the first on.
        batch: the host's side.
        call: what the backend chose to call for this batch.
        idle: bool[T, 1], rows that attend to nothing (None: there are none).
        query_start: i32[s + 1].
        lens: i32[s].
        tables: i32[s, W].
        key_start: i32[s + 1], sums of the lengths.
        places: i32[sum of lengths + spare], where each key lies (only when the call wants it).
        scratch: what the call keeps between layers.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        view: BatchView,
        device: torch.device,
        *,
        paged: bool,
        choose: Callable[[Batch], Call],
        tile: int = 1,
    ) -> None:
        self.spec, self.device, self.paged = spec, device, paged
        self.slots = (view.side.highest_block + 1) * spec.block_size
        self.batch = batch = cut(view, spec, paged=paged, tile=tile)
        self.call = choose(batch)
        self.scratch: dict[str, torch.Tensor] = {}
        arrays: dict[str, npt.NDArray[Any]] = {
            "query_start": batch.query_start,
            "lens": batch.lens,
            "key_start": batch.key_start,
            "tables": batch.tables,
        }
        if batch.idle is not None:
            arrays["idle"] = batch.idle
        if self.call.spare is not None:
            arrays["places"] = token_list(batch, spec, paged=paged, spare=self.call.spare)
        writes = writes_of(view.side.slots, spec.block_size) if paged and spec.writes_kv else None
        if writes is not None:
            arrays |= {"block": writes.block, "offset": writes.offset}
            if writes.rows is not None:
                arrays["rows"] = writes.rows
        tensors = packed({name: np.asarray(array) for name, array in arrays.items()}, device)
        self.query_start, self.lens, self.key_start = (tensors[n] for n in ("query_start", "lens", "key_start"))
        self.tables = tensors["tables"]
        self.places = tensors.get("places")
        self.idle = tensors["idle"].view(-1, 1) if "idle" in tensors else None
        self._at = (tensors["block"], tensors["offset"]) if writes is not None else None
        self._rows = tensors.get("rows")

    def write(
        self,
        store: Store,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        """Store new keys and values, if the step writes any."""
        if self._at is not None:
            store.write(self._at, self._rows, k, v, k_scale, v_scale)
