"""The reference backend: NumPy, float64. The specification in code, the oracle of every test, the template to copy.

It is complete and slow. Each step of `attend` is one clause of the contract, in the contract's order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, LayerParameters
from attn_dispatch.contract.arrays import as_numpy
from attn_dispatch.contract.dtypes import is_quantised, numpy_dtype, quantise

__all__ = ["ReferenceBackend", "attend"]

F64 = npt.NDArray[np.float64]


class ReferenceBackend(Backend):
    """Attention in float64 on the host, for every feature of the contract."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("numpy",), nan_safe=True, cache_views="strided")

    def __init__(self, name: str = "reference") -> None:
        super().__init__(name)

    def probe(self) -> Availability:
        """NumPy is the core's own dependency: always there."""
        return Availability(True, "float64 in NumPy: exact and slow", version=np.__version__)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but the vendors' packed cache types."""
        if spec.kv_cache_dtype in ("uint8", "uint4"):
            accepts = "asymmetric integers have no layout here, only in a vendor's cache"
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for int8 or fp8"))
        return self.accept()

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed NumPy array."""
        return np.zeros(shape, numpy_dtype(dtype))

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Nothing to prepare."""
        return Plan(spec=spec, view=metadata.view(spec.kind))

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write the new keys and values, then attend, one sequence after the other."""
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out, return_lse = call.cache, call.layer, call.out, call.return_lse
        spec, view = plan.spec, plan.view
        if out is None:
            out = np.empty((plan.num_tokens, spec.num_heads, spec.value_head_size), q.dtype)
        lse = np.empty((plan.num_tokens, spec.num_heads), np.float32)
        if cache is not None:
            arrays = cache.arrays_as("numpy")
            key_blocks, value_blocks = cache.layout.to_logical(arrays)
            if k is not None:
                write(key_blocks, k, view.side.slots, layer.k_scale)
                write(value_blocks, v, view.side.slots, layer.v_scale)
        for s in range(view.num_seqs):
            rows = slice(*view.query_start_loc[s : s + 2])
            if rows.start == rows.stop:
                continue
            length = int(view.kv_lens[s])
            if cache is None:
                assert k is not None
                assert v is not None
                new = slice(*view.new_start_loc[s : s + 2])
                key, value = k[new].astype(np.float64), v[new].astype(np.float64)
            else:
                blocks = view.side.table[s, : view.side.used_blocks[s]]
                scales = (layer.k_scale, layer.v_scale) if is_quantised(spec.kv_cache_dtype) else (1.0, 1.0)
                key = read(key_blocks, blocks, length, scales[0])
                value = read(value_blocks, blocks, length, scales[1])
            result, row_lse = attend(spec, q[rows].astype(np.float64), key, value, layer)
            out[rows] = result.astype(out.dtype)
            lse[rows] = row_lse.astype(np.float32)
        return (out, lse) if return_lse else out


def write(blocks: npt.NDArray[Any], rows: Array, slots: npt.NDArray[np.int64], scale: float) -> None:
    """Store rows [n, K, D] in their slots of `blocks` [N, K, B, D]; a slot of -1 is padding and is not written."""
    used = slots >= 0
    block, offset = np.divmod(slots[used], blocks.shape[2])
    name = str(blocks.dtype)
    blocks[block, :, offset] = quantise(as_numpy(rows)[used], name, scale)


def read(blocks: npt.NDArray[Any], table: npt.NDArray[np.int32], length: int, scale: float) -> F64:
    """Return the first `length` tokens of a sequence's blocks, f64[length, K, D]."""
    tokens = blocks[table].transpose(0, 2, 1, 3)  # [blocks, B, K, D]
    return tokens.reshape(-1, blocks.shape[1], blocks.shape[3])[:length].astype(np.float64) * scale


def attend(spec: AttentionSpec, q: F64, key: F64, value: F64, layer: LayerParameters) -> tuple[F64, F64]:
    """Return one sequence's output f64[n, H, Dv] and LSE f64[n, H].

    Args:
        spec: the layer.
        q: [n, H, D], the sequence's last n tokens.
        key: [m, K, D].
        value: [m, K, Dv].
        layer: slopes and sinks.
    """
    num_queries, num_keys = len(q), len(key)
    key, value = (np.repeat(x, spec.group_size, axis=1) for x in (key, value))
    # Not `np.einsum`: where a sequence has no key, it reads strides that it never set (numpy#24209), and may give NaN.
    scores = (q.transpose(1, 0, 2) @ key.transpose(1, 2, 0)) * spec.scale  # [H, n, m]; clause 4: scale,
    if spec.logits_soft_cap is not None:  # soft-cap,
        scores = spec.logits_soft_cap * np.tanh(scores / spec.logits_soft_cap)
    # Clause 3: the last query sits at the last key.
    query_at = np.arange(num_queries)[:, None] + (num_keys - num_queries)
    key_at = np.arange(num_keys)[None, :]
    if layer.alibi_slopes is not None:  # ALiBi,
        scores -= layer.alibi_slopes.astype(np.float64)[:, None, None] * np.abs(query_at - key_at)
    scores = np.where(visible(spec, query_at, key_at), scores, -np.inf)  # mask,
    peak = scores.max(axis=2, keepdims=True, initial=-np.inf)  # softmax
    if layer.sinks is not None:  # with sink.
        peak = np.maximum(peak, layer.sinks.astype(np.float64)[:, None, None])
    peak = np.where(np.isinf(peak), 0.0, peak)  # a row that attends to nothing
    weights = np.exp(scores - peak)
    total = weights.sum(axis=2, keepdims=True)
    if layer.sinks is not None:
        total = total + np.exp(layer.sinks.astype(np.float64)[:, None, None] - peak)
    # Clause 5: such a row gives 0, and its LSE is -inf (its sink, if it has one: the sum of what it attends to).
    out = (weights / np.where(total == 0, 1.0, total)) @ value.transpose(1, 0, 2)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + peak
    return out.transpose(1, 0, 2), lse[:, :, 0].T


def visible(spec: AttentionSpec, query_at: npt.NDArray[np.int_], key_at: npt.NDArray[np.int_]) -> npt.NDArray[np.bool_]:
    """Return which query position sees which key position (True: it does)."""
    ahead = key_at - query_at
    left, right = spec.window
    mask = np.ones(np.broadcast_shapes(query_at.shape, key_at.shape), np.bool_)
    if spec.causal:
        mask &= ahead <= 0
    if left >= 0:
        mask &= ahead >= -left
    if right >= 0:
        mask &= ahead <= right
    return mask
