"""xFormers' masks for a batch, and its call.

The kernel wants equally many queries of every sequence, at most 16, under a causal mask. A longer prompt is cut into
pieces of 16, 8, 4, 2 and 1 queries that are sequences of their own over the same pages, each as long as its last query
can see: bottom-right causality makes that exact. Pieces of one length are one call.
"""

from __future__ import annotations

import dataclasses
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias
from xformers.ops.fmha.triton_splitk import FwOp

from attn_dispatch.adapters.batch import I32, HostBatch
from attn_dispatch.adapters.torch.device_batch import Arrays, DeviceBatch
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.contract import AttentionSpec, BatchView
from attn_dispatch.errors import BackendLoadError

from .machine import interpreted

__all__ = ["LONGEST_PIECE", "Pieces", "XformersBatch", "check_private_api", "mask_of", "pieces_of"]

LONGEST_PIECE = 16

# Triton's interpreter keeps the program that it is in in a global.
_interpreter: AbstractContextManager[Any] = threading.Lock() if interpreted() else nullcontext()


_PARTS = {
    "_SeqLenInfo": {"seqstart", "max_seqlen", "min_seqlen", "seqstart_py"},
    "_PaddedSeqLenInfo": {"seqlen", "seqlen_py", "padding", "seqstart", "seqstart_py", "max_seqlen", "min_seqlen"},
}
"""What masks are made of: private in xFormers, whose public makers of masks copy lengths back from the device."""


def check_private_api() -> None:
    """Refuse an xFormers whose masks are made of something else.

    Raises:
        BackendLoadError: naming what is missing, and the release that has it.
    """
    for name, fields in _PARTS.items():
        kind = getattr(attn_bias, name, None)
        known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        if missing := ", ".join(sorted(fields - known)):
            raise BackendLoadError(
                f"xFormers {metadata.version('xformers')}: attn_bias.{name} has no {missing}. pip install "
                "xformers==0.0.35, whose masks this was written for"
            )


check_private_api()


@dataclass(frozen=True, eq=False)
class Pieces:
    """Sequences that one call attends for.

    Attributes:
        rows: i64[n], rows of q (None: all, in order).
        query_lens: queries of each.
        lens: i32[s].
        tables: i32[s, W].
    """

    rows: npt.NDArray[np.int64] | None
    query_lens: list[int]
    lens: I32
    tables: I32


def pieces_of(batch: HostBatch, causal: bool) -> list[Pieces]:
    """Cut a batch up for the kernel."""
    queries = np.diff(batch.query_start)
    if not batch.num_seqs:
        return []
    if not causal or (batch.uniform and batch.max_query <= LONGEST_PIECE):
        return [Pieces(None, queries.tolist(), batch.lens, batch.tables)]
    # Sizes of each sequence's pieces: as many of 16 as there are, then the rest by its binary digits.
    by_size: dict[int, list[tuple[int, int]]] = {}  # (sequence, its query that the piece begins with)
    for s, count in enumerate(queries.tolist()):
        at = 0
        while at < count:
            size = LONGEST_PIECE if count - at >= LONGEST_PIECE else 1 << ((count - at).bit_length() - 1)
            by_size.setdefault(size, []).append((s, at))
            at += size
    calls = []
    for size, pieces in sorted(by_size.items()):
        owner, begin = (np.array(column, np.int64) for column in zip(*pieces, strict=True))
        first = batch.query_start[owner].astype(np.int64) + begin
        rows = (first[:, None] + np.arange(size)).ravel()
        # Of more queries than keys the first see none: their rows are cleared, and read a key all the same.
        lens = np.maximum(batch.lens[owner] - (queries[owner] - begin - size), 1)
        whole = len(by_size) == 1 and np.array_equal(rows, np.arange(batch.num_tokens))
        calls.append(Pieces(None if whole else rows, [size] * len(owner), lens.astype(np.int32), batch.tables[owner]))
    return calls


def mask_of(
    pieces: Pieces, lens: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor, page_size: int, *, causal: bool
) -> Any:
    """Return xFormers' mask for pieces whose lengths and tables are on a device already.

    Args:
        pieces: on the host.
        lens: i32[s].
        tables: i32[s, W].
        starts: i32[2, s + 1], where each piece's queries begin, and its keys if every one had a full table.
        page_size: B.
        causal: the mask's kind.
    """
    queries, width = pieces.query_lens, pieces.tables.shape[1] * page_size
    ends = np.cumsum([0, *queries]).tolist()
    q_seqinfo = attn_bias._SeqLenInfo(
        seqstart=starts[0], max_seqlen=max(queries), min_seqlen=min(queries), seqstart_py=ends
    )
    sizes = pieces.lens.tolist()
    k_seqinfo = attn_bias._PaddedSeqLenInfo(
        seqlen=lens,
        seqlen_py=sizes,
        padding=width,
        seqstart=starts[1],
        seqstart_py=list(range(0, (len(queries) + 1) * width, width)),
        max_seqlen=max(sizes),
        min_seqlen=min(sizes),
    )
    kind = (
        attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        if causal
        else attn_bias.PagedBlockDiagonalPaddedKeysMask
    )
    return kind(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo, block_tables=tables, page_size=page_size)


class XformersBatch(DeviceBatch):
    """A batch as calls of xFormers.

    Attributes:
        calls: for each call, rows of q (None: all) and a mask.
    """

    def __init__(self, spec: AttentionSpec, view: BatchView, device: torch.device, *, paged: bool) -> None:
        super().__init__(spec, view, device, paged=paged)
        self.calls: list[tuple[torch.Tensor | None, Any]] = []
        for i, pieces in enumerate(pieces_of(self.host, spec.causal)):
            lens, tables, starts = (self.tensors[f"{name}{i}"] for name in ("lens", "tables", "starts"))
            mask = mask_of(pieces, lens, tables, starts, spec.block_size, causal=spec.causal)
            self.calls.append((self.tensors.get(f"rows{i}"), mask))

    def extra_arrays(self, host: HostBatch, view: BatchView) -> Arrays:
        """Return every call's rows, lengths, tables and starts."""
        arrays: Arrays = {}
        for i, pieces in enumerate(pieces_of(host, self.spec.causal)):
            count, width = len(pieces.lens), pieces.tables.shape[1] * self.spec.block_size
            starts = np.stack([np.cumsum([0, *pieces.query_lens]), np.arange(count + 1) * width]).astype(np.int32)
            arrays |= {f"lens{i}": pieces.lens, f"tables{i}": pieces.tables, f"starts{i}": starts}
            if pieces.rows is not None:
                arrays[f"rows{i}"] = pieces.rows
        return arrays

    def arguments(self, call: DeviceCall, q: torch.Tensor, mask: Any) -> dict[str, Any]:
        """Return xFormers' inputs, by name, for queries [n, H, D].

        With groups: query [1, n, K, G, D] over keys [1, N * B, K, G, D] whose heads of a group are one in memory.
        """
        spec = self.spec
        groups, heads = spec.num_kv_heads, spec.group_size
        key, value = (
            array.view(1, -1, groups, 1, spec.head_size).expand(-1, -1, -1, heads, -1)
            for array in (call.key, call.value)
        )
        return {
            "query": q.reshape(1, -1, groups, heads, spec.head_size),
            "key": key,
            "value": value,
            "attn_bias": mask,
            "scale": spec.scale,
            "output_dtype": q.dtype,  # partial results would be float32 by themselves
        }

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, call by call."""
        spec, q, wants_lse = self.spec, call.q, call.return_lse
        out, lse = None, q.new_empty((len(q), spec.num_heads), dtype=torch.float32) if wants_lse else None
        for rows, mask in self.calls:
            queries = q if rows is None else q.index_select(0, rows)
            inputs = fmha.Inputs(**self.arguments(call, queries, mask), is_partial=wants_lse)
            # By the operator itself: what its public function would check, the verdict has, and that refuses a CPU.
            with _interpreter:
                result, context = FwOp.apply(inputs, needs_gradient=wants_lse)
            # [1, K, G, n] -> [n, H], natural.
            part = context.lse.reshape(spec.num_heads, -1).t().float() if wants_lse else None
            result = result.reshape(len(queries), spec.num_heads, spec.value_head_size)
            if rows is None:
                return result, part
            out = call.output() if out is None else out
            out.index_copy_(0, rows, result)
            if lse is not None:
                lse.index_copy_(0, rows, part)
        assert out is not None
        return out, lse
