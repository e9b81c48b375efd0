"""An honest backend in NumPy, as a third party would write one: every impostor is it, with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, BatchView, LayerParameters
from attn_dispatch.contract.dtypes import is_quantised, numpy_dtype, quantise
from attn_dispatch.errors import PlanError

__all__ = ["IMPOSTORS", "FixedPlan", "Floats", "Honest", "Impostor", "impostor"]

Floats = npt.NDArray[Any]


@dataclass(slots=True, eq=False, kw_only=True)
class FixedPlan(Plan):
    """A plan that can be renewed.

    Attributes:
        max_seq_len: the most tokens of a sequence.
    """

    max_seq_len: int = 0

    def renew(self, metadata: AttentionMetadata) -> None:
        """Take another batch of the same shape."""
        view = metadata.view(self.spec.kind)
        if not np.array_equal(view.query_start_loc, self.view.query_start_loc) or view.max_kv_len > self.max_seq_len:
            raise PlanError("the batch does not fit into this fixed plan")
        self.view = view
        self.highest_block = view.side.highest_block


class Honest(Backend):
    """Attention in float32 (float64, if asked), one method for each thing that can be wrong."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("numpy",), nan_safe=True, fixed_plans=True)

    def __init__(self, name: str = "honest") -> None:
        super().__init__(name)

    def probe(self) -> Availability:
        """Return a yes: it needs NumPy alone."""
        return Availability(True, "NumPy", version=np.__version__)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Refuse the vendors' packed cache types."""
        if spec.kv_cache_dtype in ("uint8", "uint4"):
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, "float types and int8"))
        return self.accept()

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed array."""
        return np.zeros(shape, numpy_dtype(dtype))

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Return a plan of the batch."""
        return Plan(spec=spec, view=metadata.view(spec.kind))

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> Plan:
        """Return a plan that can be renewed."""
        return FixedPlan(spec=spec, view=metadata.view(spec.kind), max_seq_len=max_seq_len)

    def run(self, call: Call) -> Any:
        """Write, then attend sequence by sequence."""
        spec, view = self.layer(call.plan.spec), call.plan.view
        keys = values = np.zeros(0)
        if call.cache is not None:
            keys, values = call.cache.layout.to_logical(call.cache.arrays_as("numpy"))
            if call.k is not None and call.v is not None:
                self.write(keys, call.k, self.slots(call.plan), call.layer.k_scale)
                self.write(values, call.v, self.slots(call.plan), call.layer.v_scale)
        out = self.output(call, spec)
        lse = np.full(out.shape[:2], -np.inf, np.float32)
        wide: Any = np.float64 if spec.dtype == "float64" else np.float32
        for s in range(view.num_seqs):
            rows = slice(*view.query_start_loc[s : s + 2])
            if rows.start == rows.stop:
                continue
            if call.cache is None:
                key, value = (np.asarray(x)[slice(*view.new_start_loc[s : s + 2])] for x in (call.k, call.v))
            else:
                scales = self.scales(spec, call.layer)
                key, value = (self.read(x, view, s, scale) for x, scale in zip((keys, values), scales, strict=True))
            q = self.queries(call.q)[rows].astype(wide)
            result, row_lse = self.sequence(spec, q, key.astype(wide), value.astype(wide), call.layer)
            out[rows] = result.astype(out.dtype)
            lse[rows] = row_lse
        return self.returned(call, out, lse)

    def layer(self, spec: AttentionSpec) -> AttentionSpec:
        """Return what is computed of what was asked."""
        return spec

    def slots(self, plan: Plan) -> npt.NDArray[np.int64]:
        """Return where rows of k and v are written."""
        return plan.view.side.slots

    def write(self, blocks: Floats, rows: Floats, slots: npt.NDArray[np.int64], scale: float) -> None:
        """Store rows in their slots of `blocks` [N, K, B, D]."""
        used = slots >= 0
        block, offset = np.divmod(slots[used], blocks.shape[2])
        blocks[block, :, offset] = self.stored(rows[used], str(blocks.dtype), scale)

    def stored(self, rows: Floats, dtype: str, scale: float) -> Floats:
        """Return what the cache stores of rows."""
        return quantise(rows, dtype, scale)

    def scales(self, spec: AttentionSpec, layer: LayerParameters) -> tuple[float, float]:
        """Return the factors of stored keys and values."""
        return (layer.k_scale, layer.v_scale) if is_quantised(spec.kv_cache_dtype) else (1.0, 1.0)

    def table(self, view: BatchView, s: int) -> npt.NDArray[Any]:
        """Return a sequence's blocks."""
        return view.side.table[s, : view.side.used_blocks[s]]

    def length(self, view: BatchView, s: int) -> int:
        """Return how many keys a sequence reads."""
        return int(view.kv_lens[s])

    def read(self, blocks: Floats, view: BatchView, s: int, scale: float) -> Floats:
        """Return a sequence's keys or values, [m, K, D]."""
        tokens = blocks[self.table(view, s)].transpose(0, 2, 1, 3).reshape(-1, blocks.shape[1], blocks.shape[3])
        wide: Any = np.float64 if blocks.dtype == np.float64 else np.float32
        keys: Floats = tokens[: self.length(view, s)].astype(wide) * wide(scale)
        return keys

    def queries(self, q: Floats) -> Floats:
        """Return q as it is read."""
        return q

    def heads(self, spec: AttentionSpec) -> npt.NDArray[Any]:
        """Return the key head of each query head."""
        return np.arange(spec.num_heads) // spec.group_size

    def sequence(
        self, spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
    ) -> tuple[Floats, Floats]:
        """Return one sequence's (out [n, H, Dv], lse [n, H])."""
        heads = self.heads(spec)
        n, m = len(q), len(key)
        query_at = np.arange(n)[:, None] + self.first(n, m)
        key_at = np.arange(m)[None, :]
        scores = self.scores(spec, layer, q.transpose(1, 0, 2) @ key[:, heads].transpose(1, 2, 0), query_at - key_at)
        scores = np.where(self.visible(spec, key_at - query_at), scores, -np.inf)
        weights, lse = self.softmax(scores, self.sinks(layer))
        return (weights @ value[:, heads].transpose(1, 0, 2)).transpose(1, 0, 2), lse.T

    def first(self, n: int, m: int) -> int:
        """Return the first query's position."""
        return m - n

    def scores(self, spec: AttentionSpec, layer: LayerParameters, product: Floats, distance: Floats) -> Floats:
        """Return scaled, capped, biased scores of q·k [H, n, m]."""
        scores: Floats = product * product.dtype.type(spec.scale)
        if spec.logits_soft_cap is not None:
            cap = product.dtype.type(spec.logits_soft_cap)
            scores = cap * np.tanh(scores / cap)
        slopes = self.slopes(layer)
        return scores if slopes is None else scores - slopes[:, None, None] * np.abs(distance).astype(scores.dtype)

    def slopes(self, layer: LayerParameters) -> Floats | None:
        """Return the ALiBi slopes."""
        return layer.alibi_slopes

    def sinks(self, layer: LayerParameters) -> Floats | None:
        """Return the sinks."""
        return layer.sinks

    def visible(self, spec: AttentionSpec, ahead: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which keys, so far ahead of a query, it sees."""
        left, right = spec.window
        seen = np.ones(ahead.shape, np.bool_)
        if spec.causal:
            seen &= ahead <= 0
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        return seen

    def softmax(self, scores: Floats, sinks: Floats | None) -> tuple[Floats, Floats]:
        """Return (weights [H, n, m], lse [H, n])."""
        peak = scores.max(axis=2, keepdims=True, initial=-np.inf)
        if sinks is not None:
            peak = np.maximum(peak, sinks[:, None, None])
        peak = np.where(np.isinf(peak), 0, peak).astype(scores.dtype)
        weights = np.exp(scores - peak)
        total = weights.sum(axis=2, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - peak)
        with np.errstate(divide="ignore"):
            lse = (np.log(total) + peak)[:, :, 0]
        return weights / np.where(total == 0, 1, total).astype(scores.dtype), lse

    def output(self, call: Call, spec: AttentionSpec) -> Floats:
        """Return the array that results are written to."""
        if call.out is not None:
            return np.asarray(call.out)
        return np.empty((call.plan.num_tokens, spec.num_heads, spec.value_head_size), call.q.dtype)

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        """Return what `run` returns."""
        result = out if call.out is None else call.out
        return (result, lse) if call.return_lse else result


@dataclass(frozen=True)
class Impostor:
    """A backend that is wrong on purpose.

    Attributes:
        name: what it does wrong.
        make: returns the backend.
        caught_by: checks of the kit that must fail, each of them.
    """

    name: str
    make: Callable[[], Backend]
    caught_by: tuple[str, ...]


IMPOSTORS: list[Impostor] = []


def impostor(name: str, *caught_by: str) -> Callable[[Any], Any]:
    """Register a class of backends (or what makes one) as an impostor."""

    def register(make: Callable[[], Backend]) -> Callable[[], Backend]:
        IMPOSTORS.append(Impostor(name, make, caught_by))
        return make

    return register


def computing(change: Callable[[AttentionSpec], AttentionSpec]) -> Callable[[], Backend]:
    """Return what makes a backend that computes another layer than it was asked for."""

    class Other(Honest):
        def layer(self, spec: AttentionSpec) -> AttentionSpec:
            return change(spec)

    return Other
