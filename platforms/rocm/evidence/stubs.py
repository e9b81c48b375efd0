"""AITER's and flash_attn's functions as they document themselves: what stands where the real ones would be entered.

Each call must bind to the real function's signature, with arrays as its checks demand; behind it is computed in float64
what the vendor's sources say that those arguments mean (`source_facts` looks up the statements that matter).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.backend import Availability
from attn_dispatch.conformance.interface import SignatureStub, as_float64, attend_rows, signature
from attn_dispatch.hardware import Device, Platform
from attn_dispatch_rocm.aiter import AiterBackend
from attn_dispatch_rocm.aiter_call import FUNCTIONS, PARTITION_TOKENS
from attn_dispatch_rocm.aiter_kernels import BATCH, DECODE, SIGNATURES, UNIFIED
from attn_dispatch_rocm.flash_attention import FlashAttentionBackend
from attn_dispatch_rocm.flash_attention_call import KVCACHE, VARLEN
from attn_dispatch_rocm.machine import Machine
from attn_dispatch_rocm.vendor_function import VendorFunction

__all__ = ["HostAiter", "HostFlashAttention", "fake_machine", "signature_of", "stubbed"]

Arguments = dict[str, Any]
_TILE_TOKENS = 64
_FLASH = "flash_attn/flash_attn_interface.py"
_VENDOR_FUNCTIONS: tuple[VendorFunction, ...] = (*FUNCTIONS.values(), VARLEN, KVCACHE)


class _OnHost:
    """A backend whose arrays are in the host's memory, where only stubs compute."""

    device_type = "cpu"

    def probe(self) -> Availability:
        """It is always there."""
        return Availability(True, "stubs of the vendor's functions", evidence="computed")


class HostAiter(_OnHost, AiterBackend):
    """`rocm/aiter` on the host."""


class HostFlashAttention(_OnHost, FlashAttentionBackend):
    """`rocm/flash-attention` on the host."""


def fake_machine(target: str, *folders: Path) -> Machine:
    """Return a machine with one GPU of that target, torch's ROCm build, and the packages of these folders."""
    device = Device("amd", target, "fake", {"gfx": target})
    platform = Platform("rocm", f"1x AMD {target}", {"torch_flavor": "rocm"}, (device,))
    return Machine(platform, Packages([str(folder) for folder in folders]))


def signature_of(function: VendorFunction, folder: Path) -> inspect.Signature:
    """Return the real signature of a vendor's function, from its package's files in a folder."""
    file = f"aiter/{SIGNATURES[function.name][0]}" if function.name in SIGNATURES else _FLASH
    return signature(folder / file, function.name)


@contextmanager
def stubbed(
    *folders: Path, before: Callable[[str, Arguments], None] = lambda name, arguments: None
) -> Iterator[SignatureStub]:
    """Put stubs in the place of the vendors' functions whose packages' files are in these folders.

    Args:
        folders: of the packages.
        before: called with a function's name and arguments, once they are checked.
    """
    stub = SignatureStub()

    def enter(name: str, real: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        arguments = stub.bind(name, real, *args, **kwargs)
        before(name, arguments)
        return _COMPUTE[name](arguments)

    replaced = []
    for function in _VENDOR_FUNCTIONS:
        for folder in folders:
            try:
                real = signature_of(function, folder)
            except OSError:
                continue
            replaced.append((function, function.__dict__.get("function")))
            function.__dict__["function"] = partial(enter, function.name, real)
    try:
        yield stub
    finally:
        for function, loaded in replaced:
            del function.__dict__["function"]
            if loaded is not None:
                function.__dict__["function"] = loaded


def _optional(array: Any) -> Any:
    return None if array is None else as_float64(array)


def _of_pages(cache: torch.Tensor, tables: torch.Tensor, lens: list[int], scale: Any = None) -> list[Any]:
    """Return each sequence's tokens [n, K, D] out of a cache [N, B, K, D]."""
    sequences = []
    for table, length in zip(tables, lens, strict=True):
        used = -(-length // cache.shape[1])
        if used > len(table):
            raise ValueError(f"{length} keys in {len(table)} pages of {cache.shape[1]}")
        pages = torch.stack([cache[page] for page in table[:used].tolist()])
        tokens = as_float64(pages.flatten(0, 1)[:length])
        sequences.append(tokens if scale is None else tokens * float(scale))
    return sequences


def _attend(
    q: torch.Tensor, start: Sequence[int], keys: Iterable[Any], values: Iterable[Any], **options: Any
) -> tuple[Any, Any]:
    """Attend for ragged sequences, each by `attend_rows`; return the output [T, H, Dv] and the LSE [T, H]."""
    results = [
        attend_rows(as_float64(q[first:last]), key, value, **options)
        for (first, last), key, value in zip(pairwise(start), keys, values, strict=True)
    ]
    outs, lses = zip(*results, strict=True)
    return np.concatenate(outs), np.concatenate(lses)


def _like(result: Any, q: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(result)).to(q.dtype)


def _natural(lse: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(lse)).float()


def _at_least(arguments: Arguments, name: str, needed: int) -> None:
    """Check a maximum by which launchers size their grids and buffers."""
    if arguments[name] < needed:
        raise ValueError(f"{name}={arguments[name]}, the batch has {needed}")


def _unified_attention(arguments: Arguments) -> None:
    q, lens, tables = arguments["q"], arguments["seqused_k"].tolist(), arguments["block_table"]
    start = arguments["cu_seqlens_q"].tolist()
    _at_least(arguments, "max_seqlen_q", max(np.diff(start)))
    _at_least(arguments, "max_seqlen_k", max(lens))
    looked_up = -(-max(lens) // _TILE_TOKENS) * _TILE_TOKENS
    if tables.shape[1] * arguments["k"].shape[1] < looked_up:
        raise ValueError(f"block_table has {tables.shape[1]} columns: tiles up to token {looked_up} are looked up")
    out, _ = _attend(
        q,
        start,
        _of_pages(arguments["k"], tables, lens, arguments["k_descale"]),
        _of_pages(arguments["v"], tables, lens, arguments["v_descale"]),
        scale=arguments["softmax_scale"],
        causal=arguments["causal"],
        window=(arguments["window_size"][0], -1),
        soft_cap=arguments["softcap"],
        slopes=_optional(arguments.get("alibi_slopes")),
        sinks=_optional(arguments.get("sinks")),
    )
    arguments["out"].copy_(_like(out, q))


def _paged_attention_v1(arguments: Arguments) -> None:
    q, lens = arguments["query"], arguments["context_lens"].tolist()
    _at_least(arguments, "max_context_len", max(lens))
    partitions = -(-arguments["max_context_len"] // PARTITION_TOKENS)
    needed = q.shape[0] * q.shape[1] * partitions * (2 * 4 + q.shape[2] * q.element_size())
    if arguments["workspace_buffer"].numel() < needed:
        raise ValueError(f"workspace_buffer has {arguments['workspace_buffer'].numel()} bytes, needs {needed}")
    out, _ = _attend(
        q,
        range(len(q) + 1),
        *(_of_pages(arguments[name], arguments["block_tables"], lens) for name in ("key_cache", "value_cache")),
        scale=arguments["scale"],
        window=(arguments["sliding_window"] - 1, -1),  # as many tokens, the query's own included; 0: no window
        soft_cap=arguments["logits_soft_cap"],
        slopes=_optional(arguments["alibi_slopes"]),
    )
    arguments["out"].copy_(_like(out, q))


def _by_rows(arguments: Arguments, keys: list[Any], values: list[Any], soft_cap: float = 0.0) -> tuple[Any, Any]:
    """Attend by ragged queries, as Composable Kernel's functions name them; return the output and the LSE [H, T]."""
    q, start = arguments["q"], arguments["cu_seqlens_q"].tolist()
    _at_least(arguments, "max_seqlen_q", max(np.diff(start)))
    _at_least(arguments, "max_seqlen_k", max(map(len, keys)))
    out, lse = _attend(
        q,
        start,
        keys,
        values,
        scale=arguments["softmax_scale"],
        causal=arguments["causal"],
        window=arguments["window_size"],
        soft_cap=soft_cap,
        slopes=_optional(arguments.get("alibi_slopes")),
    )
    return _like(out, q), _natural(lse).t()


def _mha_batch_prefill(arguments: Arguments) -> Any:
    indptr, slots = arguments["kv_indptr"].tolist(), arguments["kv_page_indices"].tolist()
    listed = [slots[first:last] for first, last in pairwise(indptr)]
    keys, values = ([as_float64(arguments[name][of]) for of in listed] for name in ("k", "v"))
    out, lse = _by_rows(arguments, keys, values, arguments["logits_soft_cap"])
    arguments["out"].copy_(out)
    return (arguments["out"], lse) if arguments["return_lse"] else arguments["out"]


def _flash_attn_varlen(arguments: Arguments) -> Any:
    start, table = arguments["cu_seqlens_k"].tolist(), arguments["block_table"]
    lens = [last - first for first, last in pairwise(start)]
    keys, values = (
        [as_float64(arguments[name][first:last]) for first, last in pairwise(start)]
        if table is None
        else _of_pages(arguments[name], table, lens)
        for name in ("k", "v")
    )
    out, lse = _by_rows(arguments, keys, values)
    return (out, lse, None) if arguments["return_attn_probs"] else out


def _flash_attn_with_kvcache(arguments: Arguments) -> Any:
    q, lens = arguments["q"], arguments["cache_seqlens"].tolist()
    count, queries = q.shape[:2]
    out, lse = _attend(
        q.flatten(0, 1),
        range(0, count * queries + 1, queries),
        *(_of_pages(arguments[name], arguments["block_table"], lens) for name in ("k_cache", "v_cache")),
        scale=arguments["softmax_scale"],
        causal=arguments["causal"],
        window=arguments["window_size"],
        slopes=_optional(arguments["alibi_slopes"]),
    )
    result = _like(out, q).view(*q.shape[:3], -1)
    if not arguments["return_softmax_lse"]:
        return result
    return result, _natural(lse).view(count, queries, -1).transpose(1, 2)


_COMPUTE: dict[str, Callable[[Arguments], Any]] = {
    UNIFIED: _unified_attention,
    DECODE: _paged_attention_v1,
    BATCH: _mha_batch_prefill,
    VARLEN.name: _flash_attn_varlen,
    KVCACHE.name: _flash_attn_with_kvcache,
}
