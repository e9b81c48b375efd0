"""`Plan` and `Call`: one step's batch, prepared once for every layer of a spec, and one layer's run of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, BatchView, KVCache, LayerParameters
from attn_dispatch.errors import PlanError

__all__ = ["Call", "Plan"]


@dataclass(slots=True, eq=False, kw_only=True)
class Plan:
    """One step's batch, prepared for every layer of one spec. Backends add what their kernels want.

    Attributes:
        spec: the layers it is for.
        view: the batch as they see it.
        backend: the name of the backend that made it; `Backend.plan` need not set it.
        num_tokens: rows of q, T.
        num_new: rows of k and v.
        highest_block: the highest block that the step touches.
        halves: plans that only write, and only read, made when `Attention.write` first wants them.
    """

    spec: AttentionSpec
    view: BatchView
    backend: str = ""
    num_tokens: int = field(init=False)
    num_new: int = field(init=False)
    highest_block: int = field(init=False)
    halves: dict[str, Plan] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.num_tokens = self.view.num_tokens
        self.num_new = self.view.num_new
        self.highest_block = self.view.side.highest_block

    def renew(self, metadata: AttentionMetadata) -> None:
        """Bring another batch of the same shape into the buffers of a fixed plan; see `Backend.fixed_plan`.

        Sequences that are over are padding (length 0, slots of -1).

        Args:
            metadata: the new batch: as many sequences, each with as many new tokens as before.

        Raises:
            PlanError: the plan is not a fixed one, or the batch does not fit into it. Nothing has been changed.
        """
        raise PlanError(f"this plan of {self.backend or 'its backend'} is for one batch: make it with fixed_plan()")


@dataclass(slots=True, eq=False)
class Call:
    """One run of one layer: made by `Attention.run`, which has checked it, and handed down whole.

    Attributes:
        plan: the step, from `plan` of the backend that runs.
        q: [T, H, D].
        k: [rows, K, D], None when the layer writes nothing (`spec.writes_kv` False, or what a cross layer reads is in
            the cache).
        v: [rows, K, Dv], likewise.
        cache: the layer's cache; None only for an encoder layer, which then attends to k and v themselves.
        layer: slopes, sinks and scales.
        out: [T, H, Dv], written when given.
        return_lse: f32[T, H] is wanted too, natural log.
    """

    plan: Plan
    q: Array
    k: Array | None
    v: Array | None
    cache: KVCache | None
    layer: LayerParameters
    out: Array | None = None
    return_lse: bool = False
