"""One `run`: the job's record filled in, kernels called. Imported when something is first computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract import LayerParameters
from attn_dispatch.contract.dtypes import is_quantised
from attn_dispatch_cpu.kernels import job as J
from attn_dispatch_cpu.kernels.elements import KIND_BF16, KINDS
from attn_dispatch_cpu.kernels.isa import host_isa
from attn_dispatch_cpu.kernels.narrow import narrow_scratch_bytes
from attn_dispatch_cpu.kernels.wide import wide_scratch_bytes
from attn_dispatch_cpu.machine_code import kernel
from attn_dispatch_cpu.threads import POOL

if TYPE_CHECKING:
    from attn_dispatch_cpu.numba_backend import NumbaPlan
    from attn_dispatch_cpu.planning import Work

NDArray = npt.NDArray[Any]

# Below this many bytes of new keys and values the caller writes them itself: waking a thread costs more.
WRITE_ALONE_BYTES = 1 << 19
# Below this many key elements, likewise.
ATTEND_ALONE = 1 << 17


def _dense(array: NDArray) -> NDArray:
    """Return the array with neighbouring elements side by side: itself, unless it is transposed."""
    return array if array.strides[-1] == array.itemsize or not array.size else np.ascontiguousarray(array)


class Runner:
    """Fills in the record of one call. It keeps every array that the record points into."""

    def __init__(self, plan: NumbaPlan, layer: LayerParameters, scratch: Callable[[int], NDArray]) -> None:
        spec, view = plan.spec, plan.view
        self._plan = plan
        self._scratch = scratch
        self._job, self._numbers = J.new_job()
        self._ticket = np.zeros(8, np.int64)
        self._kept: list[Any] = []
        self._stored = spec.kv_cache_dtype
        job = self._job
        job[J.TICKET] = self._address(self._ticket)
        job[J.KV_HEADS], job[J.GROUP] = spec.num_kv_heads, spec.group_size
        job[J.DEPTH], job[J.WIDTH] = spec.head_size, spec.value_head_size
        job[J.KV_LENS] = self._address(view.kv_lens)
        job[J.QUERY_START] = self._address(view.query_start_loc)
        job[J.NEW_START] = self._address(view.new_start_loc)
        job[J.LEFT], job[J.RIGHT] = spec.window[0], 0 if spec.causal else spec.window[1]
        flags = 0
        if spec.logits_soft_cap is not None:
            flags |= J.FLAG_CAP
            self._numbers[J.SOFT_CAP] = spec.logits_soft_cap
        if layer.alibi_slopes is not None:
            flags |= J.FLAG_ALIBI
            job[J.SLOPES] = self._address(layer.alibi_slopes)
        if spec.scale <= 0:
            flags |= J.FLAG_ADJUST
        job[J.FLAGS] = flags
        if layer.sinks is not None:
            job[J.SINKS] = self._address(layer.sinks)
        self._layer = layer
        self._numbers[J.SCALE] = spec.scale
        self._numbers[J.OUT_FACTOR] = 1.0

    def _address(self, array: NDArray) -> int:
        self._kept.append(array)
        return array.ctypes.data

    def give(self, q: NDArray, out: NDArray, lse: NDArray | None) -> None:
        """Say where queries are and where results go."""
        q = _dense(q)
        job = self._job
        job[J.Q], job[J.Q_TOKEN], job[J.Q_HEAD] = self._address(q), q.strides[0], q.strides[1]
        job[J.OUT], job[J.OUT_TOKEN], job[J.OUT_HEAD] = self._address(out), out.strides[0], out.strides[1]
        job[J.Q_KIND] = job[J.OUT_KIND] = KINDS[self._plan.spec.dtype]
        if lse is not None:
            job[J.LSE] = self._address(lse)

    def give_cache(self, arrays: Mapping[str, NDArray]) -> None:
        """Say where the cache is. Its arrays may be strided views, with a token's elements side by side."""
        job, view = self._job, self._plan.view
        for name, at in (("key", J.KEY), ("value", J.VALUE)):
            array = arrays[name]
            job[at] = self._address(array)
            job[at + 1], job[at + 2], job[at + 3] = array.strides[:3]
        job[J.TABLE] = self._address(view.pages.block_table)
        job[J.TABLE_ROW] = view.pages.block_table.strides[0]
        job[J.BLOCK_SIZE] = self._plan.spec.block_size
        if is_quantised(self._stored):
            job[J.KEY_SCALES] = self._address(arrays["key_scale"])
            job[J.VALUE_SCALES] = self._address(arrays["value_scale"])
            self._numbers[J.SCALE] *= self._layer.k_scale
            self._numbers[J.OUT_FACTOR] = self._layer.v_scale
            self._numbers[J.KEY_SCALE], self._numbers[J.VALUE_SCALE] = self._layer.k_scale, self._layer.v_scale

    def give_rows(self, k: NDArray, v: NDArray) -> None:
        """Attend to new keys and values as they are, without a cache."""
        job = self._job
        for at, array in ((J.KEY, _dense(k)), (J.VALUE, _dense(v))):
            job[at] = self._address(array)
            job[at + 2], job[at + 3] = array.strides[1], array.strides[0]
        job[J.BLOCK_SIZE] = 1 << 40
        self._stored = self._plan.spec.dtype

    def write(self, k: NDArray, v: NDArray) -> None:
        """Store new keys and values into their slots."""
        view = self._plan.view
        rows = len(k)
        if not view.pages.writes:
            return
        job = self._job
        for at, array in ((J.NEW_KEY, _dense(k)), (J.NEW_VALUE, _dense(v))):
            job[at], job[at + 1], job[at + 2] = self._address(array), array.strides[0], array.strides[1]
        job[J.SLOTS] = self._address(view.pages.slot_mapping)
        job[J.NEW_ROWS] = rows
        threads = self._plan.threads if k.nbytes + v.nbytes > WRITE_ALONE_BYTES else 1
        self._call("write", KINDS[self._stored], False, threads)

    def attend(self, work: list[Work]) -> None:
        """Run the kernels over a step's work."""
        spec, job = self._plan.spec, self._job
        kind = KINDS[self._stored]
        dot = kind == KIND_BF16 and spec.dtype == "bfloat16" and host_isa().bf16_dot
        for each in work:
            if each.kernel == "narrow":
                size = narrow_scratch_bytes(spec.head_size, spec.value_head_size, each.heads, each.rows)
            else:
                size = wide_scratch_bytes(spec.head_size, spec.value_head_size)
            size = -(-size // 4096) * 4096
            job[J.SCRATCH] = self._address(self._scratch(size * self._plan.threads + 64))
            job[J.SCRATCH_BYTES] = size
            job[J.TILES], job[J.ITEMS] = self._address(each.tiles), len(each.tiles)
            if each.parts:
                entries = each.parts * spec.num_kv_heads * each.partial_rows
                job[J.PARTIAL_OUT] = self._address(np.empty((entries, spec.value_head_size), np.float32))
                job[J.PARTIAL_LSE] = self._address(np.empty(entries, np.float32))
                job[J.PARTIAL_ROWS] = each.partial_rows
            self._call(each.kernel, kind, dot, each.threads)
            if each.parts:
                job[J.GROUPS], job[J.ITEMS] = self._address(each.groups), len(each.groups) * spec.num_kv_heads
                self._call("merge", 0, False, 1 if self._plan.threads <= 4 else each.threads)

    def _call(self, name: str, kind: int, dot: bool, threads: int) -> None:
        self._ticket[0] = 0
        POOL.run(kernel(name, kind, dot), self._job.ctypes.data, threads)


__all__ = ["Runner"]
