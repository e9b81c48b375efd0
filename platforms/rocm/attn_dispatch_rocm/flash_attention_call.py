"""flash_attn's functions, as its CK build computes them: what each is given for a call."""

from __future__ import annotations

from typing import Any

from attn_dispatch.adapters.torch.layer_pass import DeviceCall

from .vendor_function import VendorFunction

__all__ = ["KVCACHE", "VARLEN", "KvCache", "Varlen"]


class _FlashFunction(VendorFunction):
    """A function of flash_attn's interface."""

    module = "flash_attn.flash_attn_interface"

    def scores(self, call: DeviceCall) -> dict[str, Any]:
        """Return what is done to scores; a soft-cap is not among it: the CK build ignores one."""
        spec = call.spec
        return {
            "softmax_scale": spec.scale,
            "causal": spec.causal,
            "window_size": spec.window,
            "alibi_slopes": call.layer.slopes,
        }


class Varlen(_FlashFunction):
    """`flash_attn_varlen_func`: ragged queries; lengths of pages by their sums (CK ignores `seqused_k`)."""

    name = "flash_attn_varlen_func"

    def arguments(self, call: DeviceCall) -> dict[str, Any]:
        """It makes its output itself."""
        batch = call.batch
        return self.scores(call) | {
            "q": call.q,
            "k": call.key,
            "v": call.value,
            "cu_seqlens_q": batch.query_start,
            "cu_seqlens_k": batch.key_start,
            "max_seqlen_q": batch.host.max_query,
            "max_seqlen_k": batch.host.max_keys,
            "block_table": batch.tables if batch.paged else None,
            "return_attn_probs": call.return_lse,
        }

    def result(self, returned: Any, arguments: dict[str, Any], call: DeviceCall) -> tuple[Any, Any]:
        """The LSE is f32[H, T], by the natural logarithm."""
        if call.return_lse:
            return returned[0], returned[1].t()
        return (returned[0] if isinstance(returned, tuple) else returned), None


class KvCache(_FlashFunction):
    """`flash_attn_with_kvcache`: equally many queries of each sequence, keys split over the GPU."""

    name = "flash_attn_with_kvcache"

    def arguments(self, call: DeviceCall) -> dict[str, Any]:
        """It is given no new keys: they have been written."""
        batch = call.batch
        return self.scores(call) | {
            "q": call.q.view(batch.host.num_seqs, batch.host.max_query, *call.q.shape[1:]),
            "k_cache": call.key,
            "v_cache": call.value,
            "cache_seqlens": batch.lens,
            "block_table": batch.tables,
            "return_softmax_lse": call.return_lse,
        }

    def result(self, returned: Any, arguments: dict[str, Any], call: DeviceCall) -> tuple[Any, Any]:
        """The output is [s, n, H, D], the LSE f32[s, H, n]."""
        out = returned[0] if isinstance(returned, tuple) else returned
        heads = call.spec.num_heads
        return out.flatten(0, 1), returned[1].transpose(1, 2).reshape(-1, heads) if call.return_lse else None


VARLEN, KVCACHE = Varlen(), KvCache()
