"""AITER's functions: what each is given for a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from attn_dispatch.adapters.batch import I32, HostBatch
from attn_dispatch.adapters.torch.cache_tensors import FP8, CacheTensors
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBatch
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.contract import BatchView
from attn_dispatch.errors import CacheError

from .aiter_kernels import BATCH, DECODE, UNIFIED
from .vendor_function import VendorFunction

__all__ = ["FUNCTIONS", "PARTITION_TOKENS", "AiterBatch", "AiterFunction", "BatchPrefill", "Decode", "Unified"]

PARTITION_TOKENS = 256
"""Keys that one block of threads of the decode kernel reads; its kernel knows no other number."""

_TILE_TOKENS = 64
"""Keys that the unified kernel takes at once in a prefill, whatever the page size: it looks up whole tiles."""

_SPARE_SLOTS = 256
"""Two tiles of keys: the batch prefill looks up a tile's slots before it masks the tile's end."""

_INT32_MAX = 2**31 - 1


class AiterBatch(DeviceBatch):
    """A batch for one of AITER's kernels.

    Attributes:
        kernel: the function's name.
        num_slots: of the cache that the batch reaches, from the first on.
        key_slots: i32[keys + spare], for the batch prefill: where each key lies, a slot of the cache or a row of k.
        workspace: of the decode kernel, kept for all layers of a step.
    """

    def __init__(
        self, plan: DevicePlan, device: torch.device, *, paged: bool, choose: Callable[[HostBatch], str]
    ) -> None:
        self._choose = choose
        super().__init__(
            plan.spec, plan.view, device, paged=paged, max_seq_len=plan.max_seq_len, tile=_TILE_TOKENS
        )  # fmt: skip
        self.kernel = choose(self.host)
        self.num_slots = (plan.view.side.highest_block + 1) * plan.spec.block_size
        self.key_slots = self.tensors.get("key_slots")
        self.workspace: torch.Tensor | None = None

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return the slots of keys, where the kernel is given them."""
        if self._choose(host) != BATCH:
            return {}
        most = host.num_seqs * self.max_seq_len if self.max_seq_len is not None else int(host.lens.sum())
        return {"key_slots": _key_slots(host, self.spec.block_size, most + _SPARE_SLOTS)}


def _key_slots(host: HostBatch, block_size: int, size: int) -> I32:
    """Return where each key lies, one sequence after the other, then zeros: i32[size]."""
    slots = np.zeros(size, np.int32)
    count = int(host.lens.sum())
    if not host.tables.shape[1]:  # rows of k, in order
        slots[:count] = np.arange(count, dtype=np.int32)
        return slots
    sequence = np.repeat(np.arange(host.num_seqs), host.lens)
    position = np.arange(count) - np.repeat(host.key_start[:-1].astype(np.int64), host.lens)
    block = host.tables[sequence, position // block_size].astype(np.int64)
    # What is beyond 32 bits is in no cache that the kernel reaches (`BatchPrefill.check_reach`).
    slots[:count] = np.minimum(block * block_size + position % block_size, _INT32_MAX)
    return slots


class AiterFunction(VendorFunction):
    """A function of AITER."""

    def check_reach(self, batch: AiterBatch, cache: CacheTensors) -> None:
        """Check that it reaches what a batch needs of a cache.

        Raises:
            CacheError: it does not.
        """
        return

    def result(self, returned: Any, arguments: dict[str, Any], call: DeviceCall) -> tuple[Any, Any]:
        """The output is where it was told to be."""
        return arguments["out"], None


class Unified(AiterFunction):
    """`unified_attention`: Triton, any mixture of prefills and decodes."""

    module = "aiter.ops.triton.unified_attention"
    name = UNIFIED
    takes_sinks = True

    def arguments(self, call: DeviceCall) -> dict[str, Any]:
        """An open window is (-1, -1); a cap of 0 is none."""
        spec, batch, layer = call.spec, call.batch, call.layer
        fp8 = call.key.dtype in FP8
        return {
            "q": call.q,
            "k": call.key,
            "v": call.value,
            "out": call.output(),
            "cu_seqlens_q": batch.query_start,
            "max_seqlen_q": batch.host.max_query,
            "seqused_k": batch.lens,
            "max_seqlen_k": batch.host.max_keys,
            "softmax_scale": spec.scale,
            "causal": True,
            "window_size": spec.window,
            "block_table": batch.tables,
            "softcap": spec.logits_soft_cap or 0.0,
            "q_descale": None,
            "k_descale": layer.k_scale_dev if fp8 else None,
            "v_descale": layer.v_scale_dev if fp8 else None,
            "alibi_slopes": layer.slopes,
            "sinks": layer.sinks,
        }


class Decode(AiterFunction):
    """`paged_attention_v1`: one query per sequence, a cache of the layer's own type."""

    module = "aiter.ops.attention"
    name = DECODE

    def arguments(self, call: DeviceCall) -> dict[str, Any]:
        """A window of W tokens, the query's own included, is a `sliding_window` of W; 0 is none."""
        spec, batch, layer = call.spec, call.batch, call.layer
        return {
            "out": call.output(),
            "workspace_buffer": self.workspace(call),
            "query": call.q,
            "key_cache": call.key,
            "value_cache": call.value,
            "scale": spec.scale,
            "block_tables": batch.tables,
            "cu_query_lens": None,
            "context_lens": batch.lens,
            "max_context_len": batch.host.max_keys,
            "alibi_slopes": layer.slopes,
            "kv_cache_dtype": "auto",
            "kv_cache_layout": "NHD",
            "logits_soft_cap": spec.logits_soft_cap or 0.0,
            "k_scale": layer.k_scale_dev,
            "v_scale": layer.v_scale_dev,
            "fp8_out_scale": None,
            "partition_size": PARTITION_TOKENS,
            "mtp": 1,
            "sliding_window": spec.window[0] + 1 if spec.has_window else 0,
        }

    def workspace(self, call: DeviceCall) -> torch.Tensor:
        """Return memory for partial results: f32[s, H, P] sums and maxima, outputs [s, H, P, D] of the query's type."""
        batch, spec = call.batch, call.spec
        if batch.workspace is None:
            partitions = -(-batch.host.max_keys // PARTITION_TOKENS)
            parts = batch.host.num_seqs * spec.num_heads * partitions
            size = parts * (2 * 4 + spec.head_size * call.q.element_size())
            with torch.inference_mode(False):  # the plan may be run outside of the block that runs it first
                batch.workspace = torch.empty(size, dtype=torch.uint8, device=call.q.device)
        workspace: torch.Tensor = batch.workspace
        return workspace


class BatchPrefill(AiterFunction):
    """`mha_batch_prefill_func`: keys by their slots, as if each page had one token."""

    module = "aiter.ops.mha"
    name = BATCH

    def check_reach(self, batch: AiterBatch, cache: CacheTensors) -> None:
        """The kernel computes offsets in 32 bits, and reads others beyond (ROCm/aiter issues 2517 and 2608)."""
        spec = batch.spec
        slots = cache.key.shape[0] * spec.block_size if batch.fixed else batch.num_slots
        reached = _INT32_MAX // (spec.num_kv_heads * max(spec.head_size, spec.value_head_size))
        if slots > reached:
            raise CacheError(
                f"the step reaches slot {slots - 1}; AITER's {BATCH} reaches 2^31 elements of keys, here {reached} "
                f"slots. Use a smaller cache, or a layer that its {UNIFIED} computes"
            )

    def arguments(self, call: DeviceCall) -> dict[str, Any]:
        """Blocks are flattened to tokens; rows of an encoder are tokens already."""
        spec, batch = call.spec, call.batch
        key, value = call.key, call.value
        if batch.paged:
            # It is shown no more of a large cache than it must see; rows that attend to nothing read block 0.
            reached = None if batch.fixed else max(batch.num_slots, spec.block_size)
            key, value = (cache.flatten(0, 1)[:reached] for cache in (key, value))
        return {
            "q": call.q,
            "k": key,
            "v": value,
            "cu_seqlens_q": batch.query_start,
            "kv_indptr": batch.key_start,
            "kv_page_indices": batch.key_slots,
            "max_seqlen_q": batch.host.max_query,
            "max_seqlen_k": batch.host.max_keys,
            "softmax_scale": spec.scale,
            "logits_soft_cap": spec.logits_soft_cap or 0.0,
            "causal": spec.causal,
            "window_size": spec.window,
            "return_lse": call.return_lse,
            "out": call.output(),
        }

    def result(self, returned: Any, arguments: dict[str, Any], call: DeviceCall) -> tuple[Any, Any]:
        """The LSE is f32[H, T], by the natural logarithm."""
        if call.return_lse:
            return returned[0], returned[1].t()
        return (returned[0] if isinstance(returned, tuple) else returned), None


FUNCTIONS: Mapping[str, AiterFunction] = {UNIFIED: Unified(), DECODE: Decode(), BATCH: BatchPrefill()}
