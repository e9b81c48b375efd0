"""A plan and a call as the arguments of torch_xla's function, and what comes back. Imports torch and torch_xla."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_xla
from torch.nn.functional import pad
from torch_xla.experimental.custom_kernel import ragged_paged_attention

from attn_dispatch.adapters.batch import HostBatch, slot_writes
from attn_dispatch.adapters.joint_pages import PAGES
from attn_dispatch.adapters.torch.cache_tensors import round_to
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
from attn_dispatch.backend import Call, Plan
from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import ArrayError, CacheError, PlanError

from .kernel import LANES

__all__ = ["RaggedPlan", "arguments", "make_plan", "run", "zeros"]

_SMEM_BYTES = 900 << 10  # the block table lies in a core's scalar memory, of 1 MiB
_SCORE_ROWS, _BLOCK_TOKENS, _MAX_PAGES = 256, 512, 16  # of a grid step


@dataclass(slots=True, eq=False, kw_only=True)
class RaggedPlan(Plan):
    """A step's batch as the function wants it.

    Attributes:
        tokens: rows of q, rounded up.
        integers: i32 on the host: kv_lens [S'], page_indices [S', P], cu_q_lens [S' + 1], num_seqs [1]. The plain form
            slices by them; the kernel gets them on the device.
        writes: rows of k and v and their slots, i64 each; None: nothing is written.
        idle: bool[T], rows that attend to nothing; None: there are none.
        on_device: `integers` by device, brought there once.
    """

    tokens: int = 0
    integers: tuple[torch.Tensor, ...] = ()
    writes: tuple[torch.Tensor, torch.Tensor] | None = None
    idle: torch.Tensor | None = None
    on_device: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict)


def zeros(shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
    """Return a zeroed tensor; see `RaggedBackend.zeros`."""
    where = torch_xla.device() if device is None else torch.device(device)
    if where.type != "xla":
        raise CacheError(f"device={device!r}: torch_xla computes on its own devices: xla:0")
    kind: torch.dtype = getattr(torch, dtype)
    size, memory = math.prod(shape) * kind.itemsize, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:  # tensors are made when they are first needed, and then it is too late for an error
        raise CacheError(f"{size} bytes are more than the {memory} that this machine has")
    return torch.zeros(shape, dtype=kind, device=where)


def make_plan(spec: AttentionSpec, view: BatchView) -> RaggedPlan:
    """Return the plan of a batch; see `RaggedBackend.plan`."""
    host = HostBatch.of(view, spec, paged=True)
    sequences, pages = _rounded(host.num_seqs, 8), _rounded(host.tables.shape[1], 8)
    if 4 * sequences * pages > _SMEM_BYTES:
        raise PlanError(
            f"{host.num_seqs} sequences of up to {host.max_keys} tokens in blocks of {spec.block_size} need a block "
            f"table of {4 * sequences * pages} bytes; a TPU core's scalar memory holds {_SMEM_BYTES} of it. Use larger "
            "blocks, or split the batch"
        )
    table = np.zeros((sequences, pages), np.int32)
    table[: host.num_seqs, : host.tables.shape[1]] = host.tables
    start = np.full(sequences + 1, host.num_tokens, np.int32)
    start[: host.num_seqs + 1] = host.query_start
    lens = np.zeros(sequences, np.int32)
    lens[: host.num_seqs] = host.lens
    writes = slot_writes(view.side.slots, spec.block_size, fixed=True) if spec.writes_kv else None
    placed = None
    if writes is not None and view.side.num_written:
        assert writes.rows is not None
        placed = torch.from_numpy(writes.rows), torch.from_numpy(writes.block * spec.block_size + writes.offset)
    return RaggedPlan(
        spec=spec,
        view=view,
        tokens=_rounded(host.num_tokens, 16),
        integers=tuple(map(_host_tensor, (lens, table, start, np.array([host.num_seqs], np.int32)))),
        writes=placed,
        idle=None if host.idle is None else torch.from_numpy(host.idle),
    )


def run(call: Call, *, use_kernel: bool) -> torch.Tensor:
    """Write and attend; see `RaggedBackend.run`."""
    plan, cache, q = call.plan, call.cache, call.q
    assert isinstance(plan, RaggedPlan)
    assert cache is not None
    pages = cache.arrays[PAGES]
    for name, array in (("q", q), ("k", call.k), ("v", call.v), ("out", call.out)):
        if array is not None and array.device != pages.device:
            raise ArrayError(f"{name} is on {array.device}, the cache on {pages.device}: move it there")
    with torch.no_grad():
        layer = LayerTensors.of(call.layer, pages.device)
        if plan.writes is not None and call.k is not None and call.v is not None:
            _write(pages, call.k, call.v, plan.writes, layer)
        if not plan.num_tokens:
            result = q.new_zeros((0, plan.spec.num_heads, plan.spec.value_head_size))
        else:
            positional, named = arguments(plan, q, pages, layer, use_kernel=use_kernel)
            result = _output(plan, q, layer, ragged_paged_attention(*positional, **named))
    return result if call.out is None else call.out.copy_(result)


def arguments(
    plan: RaggedPlan, q: torch.Tensor, pages: torch.Tensor, layer: LayerTensors, *, use_kernel: bool
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Return the positional and the named arguments of `ragged_paged_attention`.

    The plain form rounds scores and weights to the type of q: there it is given float32.
    """
    spec = plan.spec
    if layer.k_scale != 1:  # q . (stored * scale) = (q * scale) . stored
        q = (q.float() * layer.k_scale_dev).to(q.dtype)
    q = pad(q if use_kernel else q.float(), (0, LANES - spec.head_size, 0, 0, 0, plan.tokens - plan.num_tokens))
    integers = plan.integers
    if use_kernel:
        if pages.device not in plan.on_device:
            plan.on_device[pages.device] = tuple(x.to(pages.device) for x in integers)
        integers = plan.on_device[pages.device]
    convert = 1.0 if pages.dtype != q.dtype else None  # a scale makes the function convert pages to q's type
    queries = min(32, plan.tokens)
    while queries > 1 and queries * spec.group_size > _SCORE_ROWS:
        queries //= 2
    named = {
        "sm_scale": spec.scale,
        "sliding_window": spec.window[0] + 1 if spec.window[0] >= 0 else None,
        "soft_cap": spec.logits_soft_cap,
        "k_scale": convert,
        "v_scale": convert,
        "use_kernel": use_kernel,
        "num_kv_pages_per_block": max(1, min(integers[1].shape[1], _MAX_PAGES, _BLOCK_TOKENS // spec.block_size)),
        "num_queries_per_block": queries,
    }
    return (q, pages, *integers), named


def _write(
    pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    writes: tuple[torch.Tensor, torch.Tensor],
    layer: LayerTensors,
) -> None:
    rows, slots = (x.to(pages.device) for x in writes)
    scales = (None if layer.k_scale == 1 else layer.k_scale_dev, None if layer.v_scale == 1 else layer.v_scale_dev)
    stored = [
        pad(round_to(x, pages.dtype, scale), (0, LANES - x.shape[2])) for x, scale in zip((k, v), scales, strict=True)
    ]
    joint = torch.stack(stored, dim=2).reshape(len(k), *pages.shape[2:])
    # Rows that are not written repeat the first that is: the number of rows must not depend on the batch's contents.
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, joint[rows])


def _output(plan: RaggedPlan, q: torch.Tensor, layer: LayerTensors, padded: torch.Tensor) -> torch.Tensor:
    """Return [T, H, Dv] of what the function returned: padded rows and elements, in float32 without the kernel."""
    out = padded[: plan.num_tokens, :, : plan.spec.value_head_size]
    if layer.v_scale != 1:
        out = out.float() * layer.v_scale_dev
    out = out.to(q.dtype)
    return out if plan.idle is None else out.masked_fill(plan.idle.to(q.device)[:, None, None], 0)


def _rounded(count: int, floor: int) -> int:
    """Return the next power of two, from `floor` on."""
    return max(floor, 1 << max(0, count - 1).bit_length())


def _host_tensor(array: npt.NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(array)
