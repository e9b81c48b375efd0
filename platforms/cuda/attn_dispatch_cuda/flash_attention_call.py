"""The functions of FlashAttention's versions: what each is given, and what it returns, in the contract's terms.

`arguments` depends on a call alone, so that it can be checked against the vendor's real signature.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBatch
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.adapters.torch.plan import DevicePlan
from attn_dispatch.contract import BatchView
from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised
from attn_dispatch.errors import BackendLoadError

from .flash_versions import Installed
from .gpus import Capability

__all__ = ["FUNCTIONS", "Flash2", "Flash3", "Flash4", "FlashBatch", "Functions", "VllmFlash3", "functions_of"]

_FEW_QUERIES = 16
"""With at most so many queries per sequence, FlashAttention 2 is called through the function that splits keys."""

Result = tuple[torch.Tensor, torch.Tensor | None]


class FlashBatch(DeviceBatch):
    """A batch for one version of FlashAttention.

    Attributes:
        functions: of the version.
        capability: of the device.
    """

    def __init__(
        self, plan: DevicePlan, device: torch.device, *, paged: bool, functions: Functions, capability: Capability
    ) -> None:
        self.functions, self.capability = functions, capability
        super().__init__(plan.spec, plan.view, device, paged=paged, max_seq_len=plan.max_seq_len)

    @property
    def quantised(self) -> bool:
        """Whether an fp8 cache is read, with queries rounded to fp8."""
        return self.paged and is_quantised(self.spec.kv_cache_dtype)

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return the sequence of each row, by which queries are scaled when they are rounded."""
        if not self.quantised:
            return {}
        return {"row_sequence": np.repeat(np.arange(host.num_seqs), np.diff(host.query_start))}


class Functions(ABC):
    """One version's functions, imported when first needed."""

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

    def load(self) -> None:
        """Import the vendor's module now rather than when it is first called."""
        _ = self.module

    def takes_sinks(self, call: DeviceCall) -> bool:
        """Whether the version's kernel takes this layer's sinks."""
        return False

    @abstractmethod
    def arguments(self, call: DeviceCall) -> tuple[str, dict[str, Any]]:
        """Return the name of a function of the module, and what it is given by name."""

    def attend(self, call: DeviceCall) -> Result:
        """Return the output [T, H, Dv], and the LSE f32[T, H] when wanted."""
        name, arguments = self.arguments(call)
        result = getattr(self.module, name)(**arguments)
        out = result[0] if isinstance(result, tuple) else result
        out = out.view(*call.q.shape[:2], out.shape[-1]).to(call.q.dtype)
        if not call.return_lse:
            return out, None
        # [s, H, n] of sequences that are alike, else [H, T].
        lse = result[1]
        return out, lse.transpose(1, 2).reshape(-1, lse.shape[1]) if lse.dim() == 3 else lse.t()


def _scores(call: DeviceCall) -> dict[str, Any]:
    """Return what is done to scores, as FlashAttention 2 and 3 name it."""
    spec = call.spec
    return {
        "softmax_scale": spec.scale,
        "causal": spec.causal,
        "window_size": spec.window,
        "softcap": spec.logits_soft_cap or 0.0,
    }


def _rows(call: DeviceCall) -> dict[str, Any]:
    """Return queries, keys and values that are rows, one sequence's after the other's."""
    batch = call.batch
    return {
        "q": call.q,
        "k": call.key,
        "v": call.value,
        "cu_seqlens_q": batch.query_start,
        "cu_seqlens_k": batch.key_start,
        "max_seqlen_q": batch.host.max_query,
        "max_seqlen_k": batch.host.max_keys,
    }


class Flash2(Functions):
    """`flash_attn`: `flash_attn_with_kvcache` for few queries of each sequence, else `flash_attn_varlen_func`."""

    def arguments(self, call: DeviceCall) -> tuple[str, dict[str, Any]]:
        """Lengths of pages by their sums: `flash_attn_varlen_func` knows no other way."""
        batch, host = call.batch, call.batch.host
        scores = _scores(call) | {"alibi_slopes": call.layer.slopes}
        if batch.paged and host.uniform and host.max_query <= _FEW_QUERIES:
            return "flash_attn_with_kvcache", scores | {
                "q": call.q.reshape(host.num_seqs, host.max_query, *call.q.shape[1:]),
                "k_cache": call.key,
                "v_cache": call.value,
                "cache_seqlens": batch.lens,
                "block_table": batch.tables,
                "return_softmax_lse": call.return_lse,
            }
        table = batch.tables if batch.paged else None
        return "flash_attn_varlen_func", scores | _rows(call) | {
            "block_table": table,
            "return_attn_probs": call.return_lse,
        }


class Flash3(Functions):
    """`flash_attn_interface` (or `fa3_fwd_interface`): `flash_attn_with_kvcache`, which takes ragged queries."""

    def arguments(self, call: DeviceCall) -> tuple[str, dict[str, Any]]:
        """Its `flash_attn_varlen_func` takes no page table: that is for an encoder's keys."""
        batch = call.batch
        if not batch.paged:
            lse = {"return_attn_probs": True} if call.return_lse else {}
            return "flash_attn_varlen_func", _scores(call) | _rows(call) | lse
        arguments = {
            "q": call.q,
            "k_cache": call.key,
            "v_cache": call.value,
            "cache_seqlens": batch.lens,
            "page_table": batch.tables,
            "cu_seqlens_q": batch.query_start,
            "max_seqlen_q": batch.host.max_query,
            "return_softmax_lse": call.return_lse,
        }
        return "flash_attn_with_kvcache", _scores(call) | arguments | fp8_arguments(call)


def fp8_arguments(call: DeviceCall) -> dict[str, torch.Tensor]:
    """Return queries rounded to fp8, and the scales f32[s, K] of queries, keys and values; nothing is read back.

    A sequence's queries are scaled by the largest among them: what else is in the batch changes nothing, and rows that
    attend to nothing (padding, whose contents may be anything) take no part. Empty for a cache of 16 bits.
    """
    batch, spec, layer = call.batch, call.spec, call.layer
    if not batch.quantised:
        return {}
    rows = call.q.abs().amax((1, 2)).float()
    if batch.idle is not None:
        rows = rows.masked_fill(batch.idle.view(-1), 0)
    sequence = batch.tensors["row_sequence"]
    reach = rows.new_zeros(batch.host.num_seqs).scatter_reduce(0, sequence, rows, "amax")
    scale = reach.clamp(min=1e-12) / FINITE_MAX["float8_e4m3fn"]
    shape = (batch.host.num_seqs, spec.num_kv_heads)
    return {
        "q": (call.q.float() / scale[sequence].view(-1, 1, 1)).to(torch.float8_e4m3fn),
        "q_descale": scale.unsqueeze(1).expand(shape),
        "k_descale": layer.k_scale_dev.expand(shape),
        "v_descale": layer.v_scale_dev.expand(shape),
    }


class VllmFlash3(Functions):
    """The operator `_vllm_fa3_C.fwd`, loaded from the vLLM wheel without importing vLLM."""

    _DEFAULTS: Mapping[str, Any] = {
        "is_rotary_interleaved": True,
        "num_splits": 0,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }
    """What arguments that are no tensors are given where the operator's schema has no default; the rest is None."""

    @cached_property
    def module(self) -> Any:
        """The library's operators."""
        try:
            torch.ops.load_library(str(self.version.where))
        except (OSError, RuntimeError) as error:
            text = f"{self.version.where} does not load with torch {torch.__version__}: {error}"
            raise BackendLoadError(text) from error
        return torch.ops._vllm_fa3_C

    @cached_property
    def _schema(self) -> Mapping[str, Any]:
        """The operator's arguments by name, with what they are given when a call says nothing of them.

        Raises:
            BackendLoadError: one of them must be given, and is not known here.
        """
        defaults = {}
        for argument in self.module.fwd.default._schema.arguments:
            if argument.has_default_value():
                defaults[argument.name] = argument.default_value
            else:
                defaults[argument.name] = self._DEFAULTS.get(argument.name)
                optional = str(argument.type).startswith("Optional")
                if defaults[argument.name] is None and not optional and argument.name not in _VLLM_GIVEN:
                    raise BackendLoadError(
                        f"{self.version}: its operator wants {argument.name}, which is not known here: "
                        f"{self.module.fwd.default._schema}"
                    )
        return defaults

    def takes_sinks(self, call: DeviceCall) -> bool:
        """In bfloat16, of at most 64 heads, with values as wide as keys, where the operator takes any."""
        spec = call.spec
        fits = spec.num_heads <= 64 and spec.head_size == spec.value_head_size
        return fits and "s_aux" in self._schema and _bfloat16_sinks(call) is not None

    def arguments(self, call: DeviceCall) -> tuple[str, dict[str, Any]]:
        """By the operator's names.

        Raises:
            BackendLoadError: the operator of this vLLM does not take what the call needs.
        """
        spec, batch = call.spec, call.batch
        arguments: dict[str, Any] = {
            "q": call.q,
            "k": call.key,
            "v": call.value,
            "out": call.out,
            "cu_seqlens_q": batch.query_start,
            "max_seqlen_q": batch.host.max_query,
            "max_seqlen_k": batch.host.max_keys,
            "softmax_scale": spec.scale,
            "is_causal": spec.causal,
            "window_size_left": spec.window[0],
            "window_size_right": spec.window[1],
            "softcap": spec.logits_soft_cap or 0.0,
        }
        if batch.paged:
            arguments |= {"seqused_k": batch.lens, "page_table": batch.tables} | fp8_arguments(call)
        else:
            arguments["cu_seqlens_k"] = batch.key_start
        if self.takes_sinks(call):
            arguments["s_aux"] = _bfloat16_sinks(call)
        unknown = sorted(set(arguments) - set(self._schema))
        if unknown:
            raise BackendLoadError(
                f"{self.version}: its operator takes no {', '.join(unknown)}: {self.module.fwd.default._schema}"
            )
        return "fwd", dict(self._schema) | arguments

    def attend(self, call: DeviceCall) -> Result:
        """Into `out`, if there is one."""
        name, arguments = self.arguments(call)
        out, lse, *_ = getattr(self.module, name)(**arguments)
        return out, lse.t() if call.return_lse else None


_VLLM_GIVEN = frozenset(
    {"q", "k", "v", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal", "window_size_left",
     "window_size_right", "softcap"}
)  # fmt: skip


def _bfloat16_sinks(call: DeviceCall) -> torch.Tensor | None:
    """Return a layer's sinks as bfloat16, where that loses nothing."""

    def convert() -> torch.Tensor | None:
        with torch.inference_mode(False):
            host = torch.tensor(layer.parameters.sinks, dtype=torch.float32, device="cpu")
            rounded = host.bfloat16()
            return rounded.to(call.q.device) if torch.equal(rounded.float(), host) else None

    layer = call.layer
    if layer.sinks is None:
        return None
    sinks: torch.Tensor | None = layer.parameters.memoize((_bfloat16_sinks, call.q.device), convert)
    return sinks


class Flash4(Functions):
    """`flash_attn.cute.flash_attn_varlen_func`."""

    def takes_sinks(self, call: DeviceCall) -> bool:
        """Always, in float32."""
        return True

    def arguments(self, call: DeviceCall) -> tuple[str, dict[str, Any]]:
        """An open side of a window is None; only SM 10.x has kernels that split keys (0: by its own choice)."""
        batch = call.batch
        arguments = _scores(call) | _rows(call)
        if batch.paged:
            del arguments["cu_seqlens_k"]
            arguments |= {"seqused_k": batch.lens, "page_table": batch.tables}
        return "flash_attn_varlen_func", arguments | {
            "window_size": tuple(None if side < 0 else side for side in call.spec.window),
            "learnable_sink": call.layer.sinks,
            "num_splits": 0 if batch.capability[0] == 10 else 1,
            "return_lse": call.return_lse,
        }


FUNCTIONS: Mapping[str, type[Functions]] = {"fa2": Flash2, "fa3": Flash3, "vllm-fa3": VllmFlash3, "fa4": Flash4}


@cache
def functions_of(version: Installed) -> Functions:
    """Return the functions of a version, loaded once."""
    return FUNCTIONS[version.kind](version)
