"""flash_attn's calls, as its CK build computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .calls import Call

if TYPE_CHECKING:
    from .layer import Owned
    from .step import Step

__all__ = ["KVCACHE", "VARLEN", "KvCache", "Varlen"]


def _same(step: Step, owned: Owned) -> dict[str, Any]:
    spec = step.spec
    return {
        "softmax_scale": spec.scale,
        "causal": spec.causal,
        "window_size": spec.window,
        "alibi_slopes": owned.slopes,
    }


class Varlen(Call):
    """`flash_attn_varlen_func`: ragged queries; lengths of pages by their sums (CK ignores `seqused_k`)."""

    module = "flash_attn.flash_attn_interface"
    function = "flash_attn_varlen_func"

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
        """It has no place for an output."""
        batch = step.batch
        return {
            "q": q,
            "k": key,
            "v": value,
            "cu_seqlens_q": step.query_start,
            "cu_seqlens_k": step.key_start,
            "max_seqlen_q": batch.max_query,
            "max_seqlen_k": batch.max_keys,
            "block_table": step.tables if step.paged else None,
            "return_attn_probs": lse,
            **_same(step, owned),
        }

    def results(self, result: Any, out: torch.Tensor, lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LSE is f32[H, T], by the natural logarithm."""
        if not lse:
            return (result[0] if isinstance(result, tuple) else result), None
        return result[0], result[1].t()


class KvCache(Call):
    """`flash_attn_with_kvcache`: equally many queries of each sequence, keys split over the GPU."""

    module = "flash_attn.flash_attn_interface"
    function = "flash_attn_with_kvcache"

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
        """Nothing is written by it: that has been done."""
        batch = step.batch
        return {
            "q": q.view(batch.num_seqs, batch.max_query, *q.shape[1:]),
            "k_cache": key,
            "v_cache": value,
            "cache_seqlens": step.lens,
            "block_table": step.tables,
            "return_softmax_lse": lse,
            **_same(step, owned),
        }

    def results(self, result: Any, out: torch.Tensor, lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output is [s, n, H, D], the LSE f32[s, H, n]."""
        first = result[0] if isinstance(result, tuple) else result
        rows = first.reshape(out.shape)
        return rows, result[1].transpose(1, 2).reshape(-1, out.shape[1]) if lse else None


VARLEN, KVCACHE = Varlen(), KvCache()
