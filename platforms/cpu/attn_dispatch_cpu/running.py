"""One `run`: the job's record filled in, kernels called. Imported when something is first planned.

A step has dozens of layers, so what does not change between them is found once: a plan's part of the record with the
plan, a cache's with the cache, a layer's with the layer. A call copies the record and fills in its own arrays.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attn_dispatch import AttentionSpec, KVCache
from attn_dispatch.contract import Array, BatchView, LayerParameters
from attn_dispatch.contract.dtypes import is_quantised
from attn_dispatch.errors import ArrayError
from attn_dispatch_cpu.kernels import job as J
from attn_dispatch_cpu.kernels.elements import KIND_BF16, KINDS
from attn_dispatch_cpu.kernels.isa import host_isa
from attn_dispatch_cpu.kernels.narrow import narrow_scratch_bytes
from attn_dispatch_cpu.kernels.wide import wide_scratch_bytes
from attn_dispatch_cpu.machine_code import kernel
from attn_dispatch_cpu.planning import Work, cut
from attn_dispatch_cpu.threads import POOL

if TYPE_CHECKING:
    from attn_dispatch_cpu.numba_backend import NumbaPlan

NDArray = npt.NDArray[Any]
Words = npt.NDArray[np.int64]

# Below this many bytes of new keys and values the caller writes them itself: waking a thread costs more.
WRITE_ALONE_BYTES = 1 << 19
KEY_TO_TOKEN = slice(J.KEY, J.KEY_TOKEN + 1)
VALUE_TO_TOKEN = slice(J.VALUE, J.VALUE_TOKEN + 1)

_local = threading.local()


def address(array: NDArray) -> int:
    """Return where an array's first element lies (`array.ctypes.data` takes ten times as long)."""
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


def located(array: Array, kept: list[Any]) -> tuple[int, Sequence[int]]:
    """Return where an array of NumPy or torch lies and its strides in bytes, elements of a row side by side.

    Torch's tensors are asked themselves: to make NumPy's arrays of three, and torch's of one, costs as much as a small
    step. What must live as long as the address is used is appended to `kept`.

    Raises:
        ArrayError: it is on a device.
    """
    if isinstance(array, np.ndarray):
        if array.strides[-1] != array.itemsize and array.size:
            array = np.ascontiguousarray(array)
        kept.append(array)
        return address(array), array.strides
    if not array.is_cpu:
        raise ArrayError(f"an array on {array.device} cannot be read as host memory; move it to the CPU first")
    if array.stride(-1) != 1:
        array = array.contiguous()
    kept.append(array)
    size = array.element_size()
    return array.data_ptr(), [stride * size for stride in array.stride()]


def scratch(size: int) -> int:
    """Return the address of memory of at least this many bytes, the calling thread's own."""
    if getattr(_local, "size", 0) < size:
        _local.memory, _local.size = np.empty(size, np.uint8), size
        _local.address = address(_local.memory)
    return _local.address  # type: ignore[no-any-return]


def prepare(spec: AttentionSpec, view: BatchView) -> tuple[Words, list[NDArray]]:
    """Return the part of the record that a plan knows, and the arrays that it points into."""
    job, numbers = J.new_job()
    side = view.side
    kept = [
        np.ascontiguousarray(array)  # a batch made by hand may hold views
        for array in (side.table, view.kv_lens, view.query_start_loc, view.new_start_loc, side.slots)
    ]
    _, job[J.KV_LENS], job[J.QUERY_START], job[J.NEW_START], job[J.SLOTS] = map(address, kept)
    job[J.TABLE_ROW] = kept[0].strides[0]  # where the table is says that there is one: filled in with a cache
    job[J.KV_HEADS], job[J.GROUP] = spec.num_kv_heads, spec.group_size
    job[J.DEPTH], job[J.WIDTH] = spec.head_size, spec.value_head_size
    job[J.LEFT], job[J.RIGHT] = spec.window[0], 0 if spec.causal else spec.window[1]
    job[J.Q_KIND] = job[J.OUT_KIND] = KINDS[spec.dtype]
    job[J.FLAGS] = (
        J.FLAG_CAP * (spec.logits_soft_cap is not None) | J.FLAG_ALIBI * spec.alibi | J.FLAG_ADJUST * (spec.scale <= 0)
    )
    numbers[J.SOFT_CAP] = spec.logits_soft_cap or 0.0
    numbers[J.SCALE] = spec.scale
    numbers[J.OUT_FACTOR] = numbers[J.KEY_SCALE] = numbers[J.VALUE_SCALE] = 1.0
    job[J.BLOCK_SIZE] = spec.block_size
    return job, kept


def _cache_words(cache: KVCache) -> tuple[Words, Words, int, int]:
    """Return what a cache knows: key and value addresses with their strides, addresses of scales (0: none).

    Its arrays may be strided views, as long as a token's elements lie side by side.
    """
    arrays = cache.arrays_as("numpy")
    sides = [np.array([address(arrays[name]), *arrays[name].strides[:3]], np.int64) for name in ("key", "value")]
    scales = [address(arrays[name]) if name in arrays else 0 for name in ("key_scale", "value_scale")]
    return sides[0], sides[1], scales[0], scales[1]


class Runner:
    """Fills in the record of one call. It keeps every array that the record points into."""

    def __init__(self, plan: NumbaPlan, layer: LayerParameters) -> None:
        self._plan = plan
        self._job = job = plan.template.copy()
        self._at = address(job)
        job[J.TICKET] = self._at + 8 * J.COUNTER
        self._kept: list[Any] = []
        self._layer = layer
        self._stored = plan.spec.kv_cache_dtype
        if plan.spec.alibi and layer.alibi_slopes is not None:
            job[J.SLOPES] = address(layer.alibi_slopes)
        if plan.spec.sinks and layer.sinks is not None:
            job[J.SINKS] = address(layer.sinks)

    def give(self, q: Array, out: Array, lse: Array | None) -> None:
        """Say where queries are and where results go (their rows are dense)."""
        job, kept = self._job, self._kept
        job[J.Q], (job[J.Q_TOKEN], job[J.Q_HEAD], _) = located(q, kept)
        job[J.OUT], (job[J.OUT_TOKEN], job[J.OUT_HEAD], _) = located(out, kept)
        if lse is not None:
            job[J.LSE], _ = located(lse, kept)

    def give_cache(self, cache: KVCache) -> None:
        """Say where the cache is."""
        words: Any = cache.backend_state.get("cpu/numba")
        if words is None:
            words = cache.backend_state["cpu/numba"] = _cache_words(cache)
        job = self._job
        job[KEY_TO_TOKEN], job[VALUE_TO_TOKEN], job[J.KEY_SCALES], job[J.VALUE_SCALES] = words
        job[J.TABLE] = self._plan.table_at
        if is_quantised(self._stored):
            numbers = job.view(np.float64)
            numbers[J.SCALE] *= self._layer.k_scale
            numbers[J.OUT_FACTOR] = self._layer.v_scale
            numbers[J.KEY_SCALE], numbers[J.VALUE_SCALE] = self._layer.k_scale, self._layer.v_scale

    def give_rows(self, k: Array, v: Array) -> None:
        """Attend to new keys and values as they are, without a cache."""
        for where, array in ((KEY_TO_TOKEN, k), (VALUE_TO_TOKEN, v)):
            at, strides = located(array, self._kept)
            self._job[where] = at, 0, strides[1], strides[0]
        self._stored = self._plan.spec.dtype

    def write(self, k: Array, v: Array) -> None:
        """Store new keys and values into their slots."""
        if not self._plan.view.side.num_written:
            return
        job = self._job
        for at, given in ((J.NEW_KEY, k), (J.NEW_VALUE, v)):
            job[at], (job[at + 1], job[at + 2], _) = located(given, self._kept)
        job[J.NEW_ROWS] = len(k)
        threads = self._plan.threads if k.nbytes + v.nbytes > WRITE_ALONE_BYTES else 1
        self._call("write", KINDS[self._stored], False, threads)

    def attend(self) -> None:
        """Run the kernels over the step's work."""
        plan, job = self._plan, self._job
        spec = plan.spec
        kind = KINDS[self._stored]
        dot = kind == KIND_BF16 and spec.dtype == "bfloat16" and host_isa().bf16_dot
        for each in work_of(plan, in_blocks=bool(job[J.TABLE])):
            job[J.SCRATCH], job[J.SCRATCH_BYTES] = scratch(each.scratch_bytes * plan.threads + 64), each.scratch_bytes
            job[J.TILES], job[J.ITEMS] = each.tiles_at, len(each.tiles)
            if each.parts:
                entries = each.parts * spec.num_kv_heads * each.partial_rows
                outs, lses = np.empty((entries, spec.value_head_size), np.float32), np.empty(entries, np.float32)
                job[J.PARTIAL_OUT], job[J.PARTIAL_LSE] = address(outs), address(lses)
                job[J.PARTIAL_ROWS] = each.partial_rows
            self._call(each.kernel, kind, dot, each.threads)
            if each.parts:
                job[J.GROUPS], job[J.ITEMS] = address(each.groups), len(each.groups) * spec.num_kv_heads
                # Short work: with few threads, done before another one would have woken up.
                self._call("merge", 0, False, 1 if plan.threads <= 4 else each.threads)

    def _call(self, name: str, kind: int, dot: bool, threads: int) -> None:
        self._job[J.COUNTER] = 0
        POOL.run(kernel(name, kind, dot), self._at, threads)


def work_of(plan: NumbaPlan, in_blocks: bool) -> list[Work]:
    """Return a plan's work, cut once for each way that keys can lie (in a cache, or one after the other)."""
    if in_blocks not in plan.work:
        spec = plan.spec
        work = cut(spec, plan.view, plan.threads, in_blocks)
        for each in work:
            if each.kernel == "narrow":
                size = narrow_scratch_bytes(spec.head_size, spec.value_head_size, each.heads, each.rows)
            else:
                size = wide_scratch_bytes(spec.head_size, spec.value_head_size)
            each.scratch_bytes, each.tiles_at = -(-size // 4096) * 4096, address(each.tiles)
        plan.work[in_blocks] = work
    return plan.work[in_blocks]


__all__ = ["Runner", "prepare", "work_of"]
