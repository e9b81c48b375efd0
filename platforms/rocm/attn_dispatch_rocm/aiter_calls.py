"""AITER's calls: what each function is given for a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch.errors import CacheError

from .aiter_kernels import BATCH, DECODE, UNIFIED
from .calls import Call

if TYPE_CHECKING:
    from .layer import Owned
    from .step import Step

__all__ = ["CALLS", "PARTITION_TOKENS", "BatchPrefill", "Decode", "Unified"]

PARTITION_TOKENS = 256
"""Keys that one block of threads of the decode kernel reads; its kernel knows no other number."""

TILE_TOKENS = 64
"""Keys that the unified kernel takes at once in a prefill, whatever the page size: it looks up whole tiles."""

_INT32_MAX = 2**31 - 1
_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2)


class Unified(Call):
    """`unified_attention`: Triton, any mixture of prefills and decodes."""

    module = "aiter.ops.triton.unified_attention"
    function = UNIFIED

    def sinks_inside(self, step: Step) -> bool:
        """It begins its softmax with them."""
        return True

    def arguments(
        self,
        step: Step,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor,
        *,
        lse: bool,
    ) -> Mapping[str, Any]:
        """An open window is (-1, -1); a cap of 0 is none."""
        spec, batch = step.spec, step.batch
        fp8 = key.dtype in _QUANTISED
        return {
            "q": q,
            "k": key,
            "v": value,
            "out": out,
            "cu_seqlens_q": step.query_start,
            "max_seqlen_q": batch.max_query,
            "seqused_k": step.lens,
            "max_seqlen_k": batch.max_keys,
            "softmax_scale": spec.scale,
            "causal": True,
            "window_size": spec.window,
            "block_table": step.tables,
            "softcap": spec.logits_soft_cap or 0.0,
            "q_descale": None,
            "k_descale": (owned.one if owned.k_scale is None else owned.k_scale) if fp8 else None,
            "v_descale": (owned.one if owned.v_scale is None else owned.v_scale) if fp8 else None,
            "alibi_slopes": owned.slopes,
            "sinks": owned.sinks,
        }


class Decode(Call):
    """`paged_attention_v1`: one query per sequence."""

    module = "aiter.ops.attention"
    function = DECODE

    def arguments(
        self,
        step: Step,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor,
        *,
        lse: bool,
    ) -> Mapping[str, Any]:
        """A window of W tokens, the query's own included, is a `sliding_window` of W; 0 is none."""
        spec, batch = step.spec, step.batch
        return {
            "out": out,
            "workspace_buffer": self.workspace(step, q),
            "query": q,
            "key_cache": key,
            "value_cache": value,
            "scale": spec.scale,
            "block_tables": step.tables,
            "cu_query_lens": None,
            "context_lens": step.lens,
            "max_context_len": batch.max_keys,
            "alibi_slopes": owned.slopes,
            "kv_cache_dtype": "auto",
            "kv_cache_layout": "NHD",
            "logits_soft_cap": spec.logits_soft_cap or 0.0,
            "k_scale": owned.one,
            "v_scale": owned.one,
            "fp8_out_scale": None,
            "partition_size": PARTITION_TOKENS,
            "mtp": 1,
            "sliding_window": spec.window[0] + 1 if spec.has_window else 0,
        }

    def workspace(self, step: Step, q: torch.Tensor) -> torch.Tensor:
        """Return room for partial results, kept for all layers of the step.

        f32[s, H, P] sums, f32[s, H, P] maxima, and outputs [s, H, P, D] of the query's type.
        """
        found = step.scratch.get("workspace")
        if found is None:
            spec, batch = step.spec, step.batch
            partitions = -(-batch.max_keys // PARTITION_TOKENS)
            parts = batch.num_seqs * spec.num_heads * partitions
            size = parts * (2 * 4 + spec.head_size * q.element_size())
            found = step.scratch["workspace"] = torch.empty(size, dtype=torch.uint8, device=q.device)
        return found


class BatchPrefill(Call):
    """`mha_batch_prefill_func`: keys by their slots, as if each page had one token."""

    module = "aiter.ops.mha"
    function = BATCH
    spare = 256
    """Two tiles of keys: a tile's slots are looked up before its end is masked."""

    def check(self, step: Step) -> None:
        """The kernel reckons in 32 bits, and reads others beyond, without a word (ROCm/aiter issues 2517 and 2608)."""
        spec = step.spec
        width = spec.num_kv_heads * max(spec.head_size, spec.value_head_size)
        if step.slots * width > _INT32_MAX:
            raise CacheError(
                f"the step reaches slot {step.slots - 1}; AITER's {BATCH} reaches 2^31 elements of keys, here "
                f"{_INT32_MAX // width} slots. Use a smaller cache, or a layer that its {UNIFIED} computes"
            )

    def arguments(
        self,
        step: Step,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor,
        *,
        lse: bool,
    ) -> Mapping[str, Any]:
        """Blocks are flattened to tokens; rows of an encoder are tokens already."""
        spec, batch = step.spec, step.batch
        # Idle rows read slots of block 0, which every cache has. The kernel sees no more of a large cache than it must.
        reach = max(step.slots, spec.block_size)
        keys, values = (x.flatten(0, 1)[:reach] if step.paged else x for x in (key, value))
        assert step.places is not None
        return {
            "q": q,
            "k": keys,
            "v": values,
            "cu_seqlens_q": step.query_start,
            "kv_indptr": step.key_start,
            "kv_page_indices": step.places,
            "max_seqlen_q": batch.max_query,
            "max_seqlen_k": batch.max_keys,
            "softmax_scale": spec.scale,
            "logits_soft_cap": spec.logits_soft_cap or 0.0,
            "causal": spec.causal,
            "window_size": spec.window,
            "return_lse": lse,
            "out": out,
        }

    def results(self, result: Any, out: torch.Tensor, lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LSE is f32[H, T], by the natural logarithm."""
        if not lse:
            return (result[0] if isinstance(result, tuple) else result), None
        return result[0], result[1].t()


CALLS: Mapping[str, Call] = {UNIFIED: Unified(), DECODE: Decode(), BATCH: BatchPrefill()}
