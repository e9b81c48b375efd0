"""From a step's batch and a layer's call to the vendor's arguments. The "vendor" is attention written out in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBatch
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.contract import BatchView

__all__ = ["PagedBatch", "attend"]


class PagedBatch(DeviceBatch):
    """The step's batch, with what the kernel wants beside block tables: the slot of every key."""

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return i64[s, most keys], the rows of the cache [N * B, K, D] (of k and v, without a cache)."""
        position = np.arange(host.max_keys)
        if not self.paged:
            return {"slots": host.key_start[:-1, None] + position}
        size = self.spec.block_size
        block = host.tables[:, np.minimum(position // size, host.tables.shape[1] - 1)]
        return {"slots": block.astype(np.int64) * size + position % size}


def attend(call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend, one sequence after the other, in float32 (in float64 where the layer is)."""
    batch, out = call.batch, call.output()
    compute = torch.promote_types(call.q.dtype, torch.float32)
    lse = call.q.new_empty(out.shape[:2], dtype=compute) if call.return_lse else None
    key, value = (x.flatten(0, 1) if batch.paged else x for x in (call.key, call.value))
    for s in range(batch.host.num_seqs):
        # Lengths are read on the device in a fixed plan; this kernel, which is no vendor's, reads the host's.
        rows, length = slice(*batch.host.query_start[s : s + 2].tolist()), int(batch.host.lens[s])
        slots = batch.tensors["slots"][s, :length]
        result, sums = _attend_one(call, *(x.to(compute) for x in (call.q[rows], key[slots], value[slots])))
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = sums
    return out, lse


def _attend_one(call: DeviceCall, q: Any, key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one sequence's [n, H, Dv] and LSE [n, H], of q [n, H, D] over keys [m, K, D]."""
    spec = call.spec
    key, value = (x.repeat_interleave(spec.group_size, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->qhk", q, key) * spec.scale
    query_at = torch.arange(len(q), device=q.device) + len(key) - len(q)
    ahead = torch.arange(len(key), device=q.device) - query_at[:, None]
    left, right = spec.window[0], 0 if spec.causal else spec.window[1]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= ahead > right if right >= 0 else hidden
    hidden |= ahead < -left if left >= 0 else hidden
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    sums = torch.logsumexp(scores, dim=2)
    # A row that sees nothing (its sum is -inf) is idle: the adapter layer clears it.
    return torch.einsum("qhk,khd->qhd", torch.exp(scores - sums[..., None]), value), sums
