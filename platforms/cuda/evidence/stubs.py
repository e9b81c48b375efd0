"""Stubs where the vendors' functions would be entered: real signatures in front, their documented meaning behind.

FlashAttention's signatures are read from its sources (none of its packages is imported), FlashInfer's and xFormers' are
those of the installed packages, which import without a GPU. Behind each, attention is computed in float64 from nothing
but what the vendor was given, as the vendor documents it; rounded once, to the type that the vendor returns.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from attn_dispatch.conformance.interface import SignatureStub, as_float64, attend_pages, attend_rows, signature
from attn_dispatch_cuda.flash_versions import Installed

__all__ = ["FlashStub", "VllmStub", "flashinfer_stub", "operator_schema", "stub_of", "xformers_stub"]

Arrays = tuple[torch.Tensor, torch.Tensor]


def _ints(array: torch.Tensor) -> list[Any]:
    values: list[Any] = array.tolist()
    return values


def _tensors(result: tuple[Any, Any], dtype: torch.dtype) -> Arrays:
    out, lse = (torch.from_numpy(np.ascontiguousarray(x)) for x in result)
    return out.to(dtype), lse.float()


class FlashStub(SignatureStub):
    """A FlashAttention version's module."""

    def __init__(self, version: Installed) -> None:
        super().__init__()
        self._kind = version.kind
        inside = {"fa2": "flash_attn_interface.py", "fa4": "cute/interface.py"}.get(version.kind)
        self._file = version.where / inside if inside else version.where

    def __getattr__(self, name: str) -> Callable[..., Any]:
        vendor = signature(self._file, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            bound = self.bind(name, vendor, *args, **kwargs)
            out, lse = (paged_flash if "k_cache" in bound or has_pages(bound) else ragged_flash)(bound)
            wants_lse = any(bound.get(flag) for flag in ("return_softmax_lse", "return_attn_probs", "return_lse"))
            # FlashAttention 4 returns a pair always, the others when asked.
            return (out, lse if wants_lse else None) if wants_lse or self._kind == "fa4" else out

        return function


def operator_schema(library: Path) -> str:
    """Return the schema of vLLM's operator `fwd`, as its compiled library has it.

    Raises:
        ValueError: there is none, or several.
    """
    schemas = {
        text.decode()
        for text in re.findall(rb"fwd\(Tensor!?\s+q,[ -~]{200,}?\) -> [A-Za-z\[\]]+", library.read_bytes())
    }
    if len(schemas) != 1:
        raise ValueError(f"{library.name} has {len(schemas)} schemas of fwd")
    return " ".join(schemas.pop().split())


class VllmStub(SignatureStub):
    """vLLM's operators: an operator of torch's own with the library's schema, which the dispatcher holds calls to.

    Attributes:
        fwd: the operator.
    """

    def __init__(self, schema: str) -> None:
        super().__init__()
        name = f"vllm_fa3_stub_{next(_libraries)}"
        self._library = torch.library.Library(name, "DEF")
        self._library.define(schema)
        self._library.impl("fwd", self._run, "CPU")
        self.fwd = getattr(torch.ops, name).fwd
        names = [argument.name for argument in self.fwd.default._schema.arguments]
        self._signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names])

    def _run(self, *args: Any) -> list[torch.Tensor]:
        bound = {name: value for name, value in self.bind("fwd", self._signature, *args).items() if value is not None}
        out, lse = (paged_flash if has_pages(bound) else ragged_flash)(bound)
        if "out" in bound:
            out = bound["out"].copy_(out)
        return [out, lse]


_libraries = count()


def stub_of(version: Installed) -> Any:
    """Return a stub in the place of a FlashAttention's module."""
    return VllmStub(operator_schema(version.where)) if version.kind == "vllm-fa3" else FlashStub(version)


def has_pages(bound: dict[str, Any]) -> bool:
    """Whether keys are pages: `block_table` or `page_table` says which."""
    return bound.get("block_table") is not None or bound.get("page_table") is not None


def _flash_options(bound: dict[str, Any]) -> dict[str, Any]:
    """Return options of `attend_rows` from FlashAttention's arguments, by what its docstrings say of them."""
    slopes, sinks = bound.get("alibi_slopes"), bound.get("learnable_sink", bound.get("s_aux"))
    window = bound.get("window_size", (bound.get("window_size_left", -1), bound.get("window_size_right", -1)))
    return {
        "scale": bound["softmax_scale"],
        "causal": bound.get("causal", bound.get("is_causal", False)),
        "window": tuple(window),
        "soft_cap": bound["softcap"],
        "slopes": None if slopes is None else as_float64(slopes),
        "sinks": None if sinks is None else as_float64(sinks),
    }


def _per_head(descale: torch.Tensor, sequence: int, heads: int) -> Any:
    """Return a sequence's scales f32[s, K] for each query head, [H, 1]."""
    factors = as_float64(descale)[sequence]
    return np.repeat(factors, heads // len(factors))[:, None]


def _descaled(queries: torch.Tensor, descale: torch.Tensor | None, sequence: int) -> Any:
    """Return one sequence's queries [n, H, D] times their scales."""
    values = as_float64(queries)
    return values if descale is None else values * _per_head(descale, sequence, values.shape[1])


def paged_flash(bound: dict[str, Any]) -> Arrays:
    """Attend over pages: `flash_attn_with_kvcache`, `flash_attn_varlen_func` with a table, vLLM's `fwd`."""
    q, key, value = bound["q"], bound.get("k_cache", bound.get("k")), bound.get("v_cache", bound.get("v"))
    table = bound.get("block_table") if bound.get("block_table") is not None else bound["page_table"]
    lens = next((bound[name] for name in ("cache_seqlens", "seqused_k") if bound.get(name) is not None), None)
    lens = _ints(bound["cu_seqlens_k"].diff() if lens is None else lens)
    uniform = q.dim() == 4  # [s, n, H, D]
    starts = [i * q.shape[1] for i in range(q.shape[0] + 1)] if uniform else _ints(bound["cu_seqlens_q"])
    if "max_seqlen_q" in bound and max(np.diff(starts)) > bound["max_seqlen_q"]:
        raise ValueError(f"max_seqlen_q={bound['max_seqlen_q']}, but a sequence has {max(np.diff(starts))} queries")
    if bound.get("max_seqlen_k") is not None and max(lens) > bound["max_seqlen_k"]:
        raise ValueError(f"max_seqlen_k={bound['max_seqlen_k']}, but a sequence has {max(lens)} keys")
    rows, options = q.flatten(0, 1) if uniform else q, _flash_options(bound)
    parts = []
    for s, length in enumerate(lens):
        queries = _descaled(rows[starts[s] : starts[s + 1]], bound.get("q_descale"), s)
        # A product of scores with the keys' scale, and of the output with the values': the kernel's own order.
        scales = {name: bound.get(f"{name}_descale") for name in "kv"}
        queries, factor = (
            x if scale is None else x * _per_head(scale, s, q.shape[-2])
            for x, scale in ((queries, scales["k"]), (np.ones(()), scales["v"]))
        )
        out, lse = attend_pages(queries, [0, len(queries)], (key, value), [_ints(table)[s]], [length], **options)
        parts.append((out * factor, lse))
    out, lse = (np.concatenate(side) for side in zip(*parts, strict=True))
    # fp8 comes back as bfloat16. The LSE is [s, H, n] of sequences that are alike, else [H, T].
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    lse = lse.reshape(*q.shape[:-1]).swapaxes(-1, -2)
    return _tensors((out.reshape(*q.shape[:-1], out.shape[-1]), lse), dtype)


def ragged_flash(bound: dict[str, Any]) -> Arrays:
    """Attend to rows of k and v, between `cu_seqlens_k`."""
    q, starts, keys = bound["q"], _ints(bound["cu_seqlens_q"]), _ints(bound["cu_seqlens_k"])
    parts = [
        attend_rows(
            as_float64(q[a:b]), as_float64(bound["k"][c:d]), as_float64(bound["v"][c:d]), **_flash_options(bound)
        )
        for (a, b), (c, d) in zip(pairwise(starts), pairwise(keys), strict=True)
    ]
    out, lse = (np.concatenate(side) for side in zip(*parts, strict=True))
    return _tensors((out, lse.T), q.dtype)


# FlashInfer's wrappers.


class _Planned:
    """What a wrapper keeps of its plan, under the names that the vendor's documentation gives it."""

    def __init__(self, kind: str, bound: dict[str, Any], layout: str) -> None:
        self.kind, self.layout, self.bound = kind, layout, bound
        indptr = _ints(bound.get("paged_kv_indptr", bound.get("kv_indptr", bound.get("indptr"))))
        count = len(indptr) - 1
        queries = bound.get("q_len_per_req", 1)
        self.query_start = (
            _ints(bound["qo_indptr"]) if "qo_indptr" in bound else [queries * s for s in range(count + 1)]
        )
        self.causal = bound.get("causal", queries > 1)
        self.key_start = indptr
        if kind == "ragged":
            return
        size = bound["page_size"]
        indices = _ints(bound.get("paged_kv_indices", bound.get("kv_indices", bound.get("indices"))))
        self.pages = [indices[a:b] for a, b in pairwise(indptr)]
        if "kv_len_arr" in bound:
            self.lens = _ints(bound["kv_len_arr"])
        else:
            last = _ints(bound.get("paged_kv_last_page_len", bound.get("last_page_len")))
            if not all(1 <= n <= size for n in last):
                raise ValueError(f"last_page_len {last} must be in 1..{size}")
            self.lens = [(len(pages) - 1) * size + n for pages, n in zip(self.pages, last, strict=True)]
        if queries > 1 and min(self.lens) < queries:
            raise ValueError(f"q_len_per_req={queries} requires kv_len >= q_len_per_req for every request")

    def attend(self, run: dict[str, Any]) -> tuple[Any, Any]:
        """Return the output and the LSE, of base 2."""
        bound = self.bound
        cap = run.get("logits_soft_cap", 0.0) if self.kind == "mixed" else bound.get("logits_soft_cap") or 0.0
        if self.kind == "mixed" and cap != (bound.get("logits_soft_cap") or 0.0):
            raise ValueError("BatchAttention was planned with another soft-cap")
        window = (bound.get("window_left", -1), -1)
        options = {"causal": self.causal, "window": window, "soft_cap": cap}
        options["scale"] = bound["sm_scale"] * (run.get("k_scale") or 1.0)
        q = as_float64(run["q"])
        if self.kind == "ragged":
            parts = [
                attend_rows(q[a:b], *(as_float64(run[name][c:d]) for name in ("k", "v")), **options)
                for (a, b), (c, d) in zip(pairwise(self.query_start), pairwise(self.key_start), strict=True)
            ]
            out, lse = (np.concatenate(side) for side in zip(*parts, strict=True))
        else:
            pair = run["kv_cache" if self.kind == "mixed" else "paged_kv_cache"]
            tokens = tuple(side.transpose(1, 2) if self.layout == "HND" else side for side in pair)
            out, lse = attend_pages(q, self.query_start, tokens, self.pages, self.lens, **options)
        return out * (run.get("v_scale") or 1.0), lse / math.log(2.0)


_WRAPPERS = {
    "BatchAttention": "mixed",
    "BatchDecodeWithPagedKVCacheWrapper": "decode",
    "BatchPrefillWithPagedKVCacheWrapper": "prefill",
    "BatchPrefillWithRaggedKVCacheWrapper": "ragged",
}


def _wrapper(stub: SignatureStub, vendor: type[Any], kind: str) -> type[Any]:
    class Wrapper:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            bound = stub.bind(f"{vendor.__name__}()", inspect.signature(vendor), *args, **kwargs)
            self._layout = bound.get("kv_layout", "NHD")

        def plan(self, *args: Any, **kwargs: Any) -> None:
            # The decode wrapper's own `plan` takes anything and hands it on.
            real = getattr(vendor, "_plan_impl", vendor.plan)
            bound = stub.bind(f"{vendor.__name__}.plan", inspect.signature(real), self, *args, **kwargs)
            self._planned = _Planned(kind, bound, self._layout)

        def run(self, *args: Any, **kwargs: Any) -> None:
            bound = stub.bind(f"{vendor.__name__}.run", inspect.signature(vendor.run), self, *args, **kwargs)
            out, lse = self._planned.attend(bound)
            bound["out"].copy_(torch.from_numpy(out))
            if bound.get("lse") is not None:
                bound["lse"].copy_(torch.from_numpy(lse))

    return Wrapper


@contextmanager
def flashinfer_stub() -> Iterator[SignatureStub]:
    """Put stubs in the place of FlashInfer's wrappers, and of its append."""
    wrappers: Any = import_module("attn_dispatch_cuda.flashinfer_wrappers")
    vendor, stub = wrappers.flashinfer, SignatureStub()
    real = {name: getattr(vendor, name) for name in (*_WRAPPERS, "append_paged_kv_cache")}

    def append(*args: Any, **kwargs: Any) -> None:
        bound = stub.bind("append_paged_kv_cache", inspect.signature(real["append_paged_kv_cache"]), *args, **kwargs)
        indices, indptr = (_ints(bound[name]) for name in ("kv_indices", "kv_indptr"))
        sequences, positions = (_ints(bound[name]) for name in ("batch_indices", "positions"))
        for new, pages in zip((bound["append_key"], bound["append_value"]), bound["paged_kv_cache"], strict=True):
            tokens = pages if bound["kv_layout"] == "NHD" else pages.transpose(1, 2)
            for row, (s, position) in enumerate(zip(sequences, positions, strict=True)):
                block = indices[indptr[s] + position // tokens.shape[1]]
                tokens[block, position % tokens.shape[1]] = new[row]

    for name, kind in _WRAPPERS.items():
        setattr(vendor, name, _wrapper(stub, real[name], kind))
    vendor.append_paged_kv_cache = append
    wrappers.forget(torch.device("cpu"))
    try:
        yield stub
    finally:
        for name, function in real.items():
            setattr(vendor, name, function)
        wrappers.forget(torch.device("cpu"))


@contextmanager
def xformers_stub() -> Iterator[SignatureStub]:
    """Put a stub in the place of xFormers' operator, where also its own reasons against the inputs are heard."""
    calls: Any = import_module("attn_dispatch_cuda.xformers_call")
    stub, vendor = SignatureStub(), calls.FwOp
    about_here = ("device=cpu", "triton is not available", "bf16 is only supported on A100+")

    def apply(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        bound = stub.bind("apply", inspect.signature(vendor.apply), *args, **kwargs)
        inputs = bound["inp"]
        inputs.validate_inputs()
        reasons = [text for text in vendor.not_supported_reasons(inputs) if not any(w in text for w in about_here)]
        if reasons:
            raise ValueError("; ".join(reasons))
        out, lse = _xformers(inputs)
        return out.to(inputs.output_dtype), SimpleNamespace(lse=lse)

    calls.FwOp = SimpleNamespace(apply=apply)
    try:
        yield stub
    finally:
        calls.FwOp = vendor


def _xformers(inputs: Any) -> Arrays:
    """Attend as xFormers' paged masks say: by block tables, key lengths and, if causal, from the bottom right."""
    mask = inputs.attn_bias
    _, tokens, groups, heads, size = inputs.query.shape
    causal = "Causal" in type(mask).__name__
    starts, lens = _ints(mask.q_seqinfo.seqstart), _ints(mask.k_seqinfo.seqlen)
    q = as_float64(inputs.query).reshape(tokens, groups * heads, size)
    pages = tuple(side[0, :, :, 0].reshape(-1, mask.page_size, groups, size) for side in (inputs.key, inputs.value))
    out, lse = attend_pages(q, starts, pages, _ints(mask.block_tables), lens, scale=inputs.scale, causal=causal)
    rows, scores = _tensors((out, lse), torch.float64)
    # The LSE is [1, K, G, n].
    return rows.reshape(1, tokens, groups, heads, size), scores.T.reshape(1, groups, heads, tokens)
