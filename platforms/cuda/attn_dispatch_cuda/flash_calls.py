"""The calls of FlashAttention's versions: what each is given, and what it returns, in the contract's terms.

`arguments` of each call is a function of a step alone, so that tests can hold it against the vendor's real signature.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised
from attn_dispatch.errors import BackendLoadError

from .batch import Batch
from .flash_versions import Installed
from .layer import Owned
from .step import Arrays, Step

__all__ = ["CALLS", "Calls", "Flash2", "Flash3", "Flash4", "FlashStep", "VllmFlash3", "splits"]

_FEW_QUERIES = 16
"""With at most so many queries per sequence, FlashAttention 2 is asked through the function that splits keys."""


class FlashStep(Step):
    """A batch for one version of FlashAttention.

    Attributes:
        calls: the version's functions.
        key_start: i32[s + 1], sums of the lengths.
    """

    key_start: torch.Tensor

    def __init__(
        self,
        version: Installed,
        spec: AttentionSpec,
        view: BatchView,
        device: torch.device,
        *,
        paged: bool,
        capacity: int | None,
    ) -> None:
        self.calls = calls_of(version)
        super().__init__(spec, view, device, paged=paged, capacity=capacity)

    def more(self, batch: Batch, view: BatchView) -> Arrays:
        """Sums of the lengths: how some of the functions are told them."""
        return {"key_start": batch.key_start}

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep them."""
        self.key_start = tensors["key_start"]


class Calls(ABC):
    """One version's functions, imported when first wanted."""

    def __init__(self, version: Installed) -> None:
        self.version = version

    @cached_property
    def module(self) -> Any:
        """The vendor's module.

        Raises:
            BackendLoadError: it is installed, but does not import.
        """
        try:
            return importlib.import_module(self.version.module)
        except Exception as error:  # whatever a vendor dies of is the reason
            text = f"{type(error).__name__}: {error}"
            raise BackendLoadError(f"{self.version} is installed but does not import ({text})") from error

    def takes_sinks(self, step: FlashStep, owned: Owned) -> bool:
        """Whether the version's kernel takes this layer's sinks."""
        return False

    @abstractmethod
    def arguments(
        self, step: FlashStep, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, owned: Owned, *, lse: bool
    ) -> tuple[str, dict[str, Any]]:
        """Return the name of a function of the module, and what it is given by name."""

    def attend(
        self,
        step: FlashStep,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor | None,
        *,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [T, H, Dv], and the LSE f32[T, H] when wanted."""
        name, given = self.arguments(step, q, key, value, owned, lse=wants_lse)
        result = getattr(self.module, name)(**given)
        if not wants_lse:
            first: torch.Tensor = result[0] if isinstance(result, tuple) else result
            return first.view(q.shape[0], q.shape[1], value.shape[-1]), None
        found, lse = result[0], result[1]
        # [s, H, n] of sequences that are alike, else [H, T].
        rows = lse.transpose(1, 2).reshape(-1, lse.shape[1]) if lse.dim() == 3 else lse.t()
        return found.view(q.shape[0], q.shape[1], value.shape[-1]), rows


class Flash2(Calls):
    """`flash_attn`: `flash_attn_with_kvcache` for few queries of each sequence, else `flash_attn_varlen_func`."""

    def arguments(
        self, step: FlashStep, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, owned: Owned, *, lse: bool
    ) -> tuple[str, dict[str, Any]]:
        """Lengths of pages by their sums: `flash_attn_varlen_func` knows no other way."""
        spec, batch = step.spec, step.batch
        same = {
            "softmax_scale": spec.scale,
            "causal": spec.causal,
            "window_size": spec.window,
            "softcap": spec.logits_soft_cap or 0.0,
            "alibi_slopes": owned.slopes,
        }
        if step.paged and batch.uniform and batch.max_query <= _FEW_QUERIES:
            return "flash_attn_with_kvcache", {
                "q": q.reshape(batch.num_seqs, batch.max_query, *q.shape[1:]),
                "k_cache": key,
                "v_cache": value,
                "cache_seqlens": step.lens,
                "block_table": step.tables,
                "return_softmax_lse": lse,
                **same,
            }
        return "flash_attn_varlen_func", {
            "q": q,
            "k": key,
            "v": value,
            "cu_seqlens_q": step.query_start,
            "cu_seqlens_k": step.key_start,
            "max_seqlen_q": batch.max_query,
            "max_seqlen_k": batch.max_keys,
            "block_table": step.tables if step.paged else None,
            "return_attn_probs": lse,
            **same,
        }


class Flash3(Calls):
    """`flash_attn_interface` (or `fa3_fwd_interface`): `flash_attn_with_kvcache`, which takes ragged queries."""

    def arguments(
        self, step: FlashStep, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, owned: Owned, *, lse: bool
    ) -> tuple[str, dict[str, Any]]:
        """Its `flash_attn_varlen_func` takes no page table: that is for an encoder's keys."""
        spec, batch = step.spec, step.batch
        same = {
            "softmax_scale": spec.scale,
            "causal": spec.causal,
            "window_size": spec.window,
            "softcap": spec.logits_soft_cap or 0.0,
        }
        if step.paged:
            return "flash_attn_with_kvcache", {
                "q": q,
                "k_cache": key,
                "v_cache": value,
                "cache_seqlens": step.lens,
                "page_table": step.tables,
                "cu_seqlens_q": step.query_start,
                "max_seqlen_q": batch.max_query,
                "return_softmax_lse": lse,
                **same,
            }
        return "flash_attn_varlen_func", {
            "q": q,
            "k": key,
            "v": value,
            "cu_seqlens_q": step.query_start,
            "cu_seqlens_k": step.key_start,
            "max_seqlen_q": batch.max_query,
            "max_seqlen_k": batch.max_keys,
            **({"return_attn_probs": True} if lse else {}),
            **same,
        }

    def attend(
        self,
        step: FlashStep,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor | None,
        *,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of an fp8 cache, with queries rounded to fp8."""
        if not (step.paged and is_quantised(step.spec.kv_cache_dtype)):
            return super().attend(step, q, key, value, owned, out, wants_lse=wants_lse)
        narrow, scales = fp8_call(step, q, owned)
        name, given = self.arguments(step, narrow, key, value, owned, lse=wants_lse)
        result = getattr(self.module, name)(**given, **scales)
        found = result[0] if wants_lse else result
        return found.to(q.dtype), result[1].t() if wants_lse else None


def fp8_call(step: FlashStep, q: torch.Tensor, owned: Owned) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return queries in fp8, and the scales f32[s, K] of queries, keys and values; nothing is read back."""
    reach = q.abs().amax().float().clamp(min=1e-12) / FINITE_MAX["float8_e4m3fn"]
    shape = (step.batch.num_seqs, step.spec.num_kv_heads)
    one = torch.ones((), device=q.device)
    scales = {
        "q_descale": reach.expand(shape),
        "k_descale": (one if owned.k_scale_there is None else owned.k_scale_there).expand(shape),
        "v_descale": (one if owned.v_scale_there is None else owned.v_scale_there).expand(shape),
    }
    return (q.float() / reach).to(torch.float8_e4m3fn), scales


class VllmFlash3(Calls):
    """The operator `_vllm_fa3_C.fwd`, loaded from the vLLM wheel without importing vLLM."""

    ORDER = (
        "q", "k", "v", "k_new", "v_new", "q_v", "out", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new",
        "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k",
        "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale", "softmax_scale",
        "is_causal", "window_size_left", "window_size_right", "softcap", "is_rotary_interleaved",
        "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin", "s_aux", "cp_world_size", "cp_rank",
        "cp_tot_seqused_k",
    )  # fmt: skip
    """The operator's arguments, which have no defaults."""

    _PLAIN: Mapping[str, Any] = {
        "is_rotary_interleaved": True,
        "num_splits": 0,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }

    @cached_property
    def module(self) -> Any:
        """The library's operators."""
        try:
            torch.ops.load_library(str(self.version.where))
        except (OSError, RuntimeError) as error:
            text = f"{self.version.where} does not load with torch {torch.__version__}: {error}"
            raise BackendLoadError(text) from error
        return torch.ops._vllm_fa3_C

    def takes_sinks(self, step: FlashStep, owned: Owned) -> bool:
        """In bfloat16, of at most 64 heads, with values as wide as keys."""
        spec = step.spec
        return owned.sinks_bf16 is not None and spec.num_heads <= 64 and spec.head_size == spec.value_head_size

    def arguments(
        self, step: FlashStep, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, owned: Owned, *, lse: bool
    ) -> tuple[str, dict[str, Any]]:
        """By the operator's names; it is called by position."""
        spec, batch = step.spec, step.batch
        given = dict.fromkeys(self.ORDER) | dict(self._PLAIN)
        given |= {
            "q": q,
            "k": key,
            "v": value,
            "cu_seqlens_q": step.query_start,
            "max_seqlen_q": batch.max_query,
            "max_seqlen_k": batch.max_keys,
            "softmax_scale": spec.scale,
            "is_causal": spec.causal,
            "window_size_left": spec.window[0],
            "window_size_right": spec.window[1],
            "softcap": spec.logits_soft_cap or 0.0,
        }
        if step.paged:
            given |= {"seqused_k": step.lens, "page_table": step.tables}
        else:
            given |= {"cu_seqlens_k": step.key_start}
        if owned.sinks is not None and self.takes_sinks(step, owned):
            given["s_aux"] = owned.sinks_bf16
        return "fwd", given

    def attend(
        self,
        step: FlashStep,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor | None,
        *,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Into `out`, if there is one."""
        rows = q
        scales: dict[str, torch.Tensor] = {}
        if step.paged and is_quantised(step.spec.kv_cache_dtype):
            rows, scales = fp8_call(step, q, owned)
        _, given = self.arguments(step, rows, key, value, owned, lse=wants_lse)
        found, lse, *_ = self.module.fwd(*(given | scales | {"out": out}).values())
        return found, lse.t() if wants_lse else None


class Flash4(Calls):
    """`flash_attn.cute.flash_attn_varlen_func`."""

    def takes_sinks(self, step: FlashStep, owned: Owned) -> bool:
        """Always, in float32."""
        return True

    def arguments(
        self, step: FlashStep, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, owned: Owned, *, lse: bool
    ) -> tuple[str, dict[str, Any]]:
        """An open side of a window is None; Hopper's kernels do not split keys."""
        spec, batch = step.spec, step.batch
        left, right = (None if side < 0 else side for side in spec.window)
        lengths = (
            {"seqused_k": step.lens, "page_table": step.tables} if step.paged else {"cu_seqlens_k": step.key_start}
        )
        return "flash_attn_varlen_func", {
            "q": q,
            "k": key,
            "v": value,
            "cu_seqlens_q": step.query_start,
            "max_seqlen_q": batch.max_query,
            "max_seqlen_k": batch.max_keys,
            **lengths,
            "softmax_scale": spec.scale,
            "causal": spec.causal,
            "window_size": (left, right),
            "learnable_sink": owned.sinks,
            "softcap": spec.logits_soft_cap or 0.0,
            "num_splits": splits(major_of(step.device)),
            "return_lse": lse,
        }


def major_of(device: torch.device) -> int:
    """Return a GPU's major compute capability (Hopper's for a step that lies in host memory, in a test)."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def splits(major: int) -> int:
    """Return FlashAttention 4's `num_splits`: 0, its own choice, on GPUs for which it can split keys."""
    return 0 if major == 10 else 1


CALLS: Mapping[str, type[Calls]] = {"fa2": Flash2, "fa3": Flash3, "vllm-fa3": VllmFlash3, "fa4": Flash4}

_made: dict[Installed, Calls] = {}


def calls_of(version: Installed) -> Calls:
    """Return the functions of a version, loaded once."""
    found = _made.get(version)
    if found is None:
        found = _made[version] = CALLS[version.kind](version)
    return found
