"""One call: the kernels' arguments filled in, kernels run. Imported when something is first planned.

A step has dozens of layers, so what does not change between them is found once: a plan's part of the arguments with the
plan, a cache's with the cache. A call copies them and fills in its own arrays.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch import AttentionSpec, KVCache
from attn_dispatch.adapters.environment import num_threads
from attn_dispatch.backend import Call, Plan
from attn_dispatch.contract import Array, BatchView, LayerParameters
from attn_dispatch.contract.dtypes import is_quantised, numpy_dtype
from attn_dispatch.errors import ArrayError, PlanError
from attn_dispatch_cpu.kernels import arguments as A
from attn_dispatch_cpu.kernels.kinds import KINDS
from attn_dispatch_cpu.machine_code import kernel
from attn_dispatch_cpu.planning import Work, cut
from attn_dispatch_cpu.threads import POOL

NDArray = npt.NDArray[Any]
Words = npt.NDArray[np.int64]

# Below this many bytes of new keys and values the caller writes them itself: waking a thread costs more.
WRITE_ALONE_BYTES = 1 << 19
CACHED_BYTES = 1 << 24  # keys and values of a step that a CPU's caches hold: fetching them early only costs
FEW_THREADS = 4  # with no more, merging is done before another thread would have woken up
KEY_TO_TOKEN = slice(A.KEY, A.KEY_TOKEN + 1)
VALUE_TO_TOKEN = slice(A.VALUE, A.VALUE_TOKEN + 1)

_local = threading.local()


@dataclass(slots=True, eq=False, kw_only=True)
class NumbaPlan(Plan):
    """A step cut into work.

    Attributes:
        threads: how many there are.
        template: the arguments as far as they are known.
        arrays: what they point into.
        table_at: the address of the block table.
        work: by whether keys lie in blocks, or one after the other (for an encoder without a cache).
    """

    threads: int
    template: Words
    arrays: list[NDArray]
    table_at: int
    work: dict[bool, list[Work]] = field(default_factory=dict)


def make_plan(spec: AttentionSpec, view: BatchView) -> NumbaPlan:
    """Return a step's plan."""
    words, numbers = A.new_arguments()
    side = view.side
    arrays = [
        np.ascontiguousarray(array)  # a batch made by hand may hold views
        for array in (side.table, view.kv_lens, view.query_start_loc, view.new_start_loc, side.slots)
    ]
    table_at, words[A.KV_LENS], words[A.QUERY_START], words[A.NEW_START], words[A.SLOTS] = map(address, arrays)
    words[A.TABLE_ROW] = arrays[0].strides[0]  # where the table is says that there is one: filled in with a cache
    words[A.KV_HEADS], words[A.GROUP_SIZE] = spec.num_kv_heads, spec.group_size
    words[A.HEAD_SIZE], words[A.VALUE_HEAD_SIZE] = spec.head_size, spec.value_head_size
    words[A.LEFT], words[A.RIGHT] = spec.window[0], 0 if spec.causal else spec.window[1]
    words[A.Q_KIND] = words[A.OUT_KIND] = KINDS[spec.dtype]
    words[A.FLAGS] = (
        A.FLAG_CAP * (spec.logits_soft_cap is not None) | A.FLAG_ALIBI * spec.alibi | A.FLAG_ADJUST * (spec.scale <= 0)
    )
    words[A.BLOCK_SIZE] = spec.block_size
    row_bytes = spec.num_kv_heads * (spec.head_size + spec.value_head_size) * numpy_dtype(spec.kv_cache_dtype).itemsize
    words[A.PREFETCH] = int(view.kv_lens.sum(dtype=np.int64)) * row_bytes > CACHED_BYTES
    numbers[A.SOFT_CAP] = spec.logits_soft_cap or 0.0
    numbers[A.SCALE] = spec.scale
    numbers[A.OUT_FACTOR] = numbers[A.KEY_SCALE] = numbers[A.VALUE_SCALE] = 1.0
    plan = NumbaPlan(spec=spec, view=view, threads=num_threads(), template=words, arrays=arrays, table_at=table_at)
    if side.has_blocks:
        work_of(plan, in_blocks=True)
    return plan


def work_of(plan: NumbaPlan, in_blocks: bool) -> list[Work]:
    """Return a plan's work, cut once for each way that keys can lie."""
    if in_blocks not in plan.work:
        plan.work[in_blocks] = cut(plan.spec, plan.view, plan.threads, in_blocks)
    return plan.work[in_blocks]


def run(call: Call) -> Array | tuple[Array, Array]:
    """Write the new keys and values, then attend."""
    plan, q, out = call.plan, call.q, call.out
    if not isinstance(plan, NumbaPlan):
        raise PlanError(f"cpu/numba cannot run a {type(plan).__name__}: plan(spec, metadata) with the same backend")
    spec = plan.spec
    shape = (plan.num_tokens, spec.num_heads, spec.value_head_size)
    result = _empty(q, shape) if out is None else out
    target = result if out is None or _rows_are_dense(out) else _empty(q, shape)
    lse = _empty(q, shape[:2], "float32") if call.return_lse else None
    launch = Launch(plan, call.layer, call.cache)
    launch.put_queries(q, target, lse)
    if call.cache is None:
        launch.put_rows(call.k, call.v)
    elif call.k is not None:
        launch.write(call.k, call.v)
    launch.attend()
    if target is not result:
        result[...] = target
    return result if lse is None else (result, lse)


class Launch:
    """The arguments of one call's kernels, and every array that they point into."""

    __slots__ = ("_arrays", "_at", "_next_call", "_plan", "_stored", "_words")

    def __init__(self, plan: NumbaPlan, layer: LayerParameters, cache: KVCache | None) -> None:
        self._plan = plan
        self._words = words = plan.template.copy()
        self._at = address(words)
        self._arrays: list[Any] = [plan, layer, cache]
        self._next_call = A.CALLS
        self._stored = plan.spec.dtype
        if plan.spec.alibi and layer.alibi_slopes is not None:
            words[A.SLOPES] = address(layer.alibi_slopes)
        if plan.spec.sinks and layer.sinks is not None:
            words[A.SINKS] = address(layer.sinks)
        if cache is not None:
            self._put_cache(cache, layer)

    def _put_cache(self, cache: KVCache, layer: LayerParameters) -> None:
        plan, words = self._plan, self._words
        self._stored = plan.spec.kv_cache_dtype
        state: Any = cache.backend_state.get("cpu/numba")
        if state is None:
            state = cache.backend_state["cpu/numba"] = _cache_words(cache)
        words[KEY_TO_TOKEN], words[VALUE_TO_TOKEN], words[A.KEY_SCALES], words[A.VALUE_SCALES] = state
        words[A.TABLE] = plan.table_at
        if is_quantised(self._stored):
            numbers = words.view(np.float64)
            numbers[A.SCALE] *= layer.k_scale
            numbers[A.OUT_FACTOR] = layer.v_scale
            numbers[A.KEY_SCALE], numbers[A.VALUE_SCALE] = layer.k_scale, layer.v_scale

    def put_queries(self, q: Array, out: Array, lse: Array | None) -> None:
        """Say where queries are and where results go (their rows are dense)."""
        words, arrays = self._words, self._arrays
        words[A.Q], (words[A.Q_TOKEN], words[A.Q_HEAD], _) = locate(q, arrays)
        words[A.OUT], (words[A.OUT_TOKEN], words[A.OUT_HEAD], _) = locate(out, arrays)
        if lse is not None:
            words[A.LSE], _ = locate(lse, arrays)

    def put_rows(self, k: Array, v: Array) -> None:
        """Attend to new keys and values as they are, without a cache."""
        for where, array in ((KEY_TO_TOKEN, k), (VALUE_TO_TOKEN, v)):
            at, strides = locate(array, self._arrays)
            self._words[where] = at, 0, strides[1], strides[0]

    def write(self, k: Array, v: Array) -> None:
        """Store new keys and values into their slots."""
        if not self._plan.view.side.num_written:
            return
        words = self._words
        for at, array in ((A.NEW_KEY, k), (A.NEW_VALUE, v)):
            words[at], (words[at + 1], words[at + 2], _) = locate(array, self._arrays)
        words[A.NEW_ROWS] = len(k)
        count = self._plan.threads if k.nbytes + v.nbytes > WRITE_ALONE_BYTES else 1
        self._run("write", KINDS[self._stored], "fma", count)

    def attend(self) -> None:
        """Run the kernels over the step's work."""
        plan, words = self._plan, self._words
        spec = plan.spec
        for work in work_of(plan, in_blocks=bool(words[A.TABLE])):
            layout = work.scratch
            words[A.SCRATCH], words[A.SCRATCH_BYTES] = self._scratch(layout.num_bytes * plan.threads), layout.num_bytes
            words[A.SCRATCH_OFFSETS] = layout.offsets_at
            words[A.ITEM_TABLE], words[A.NUM_ITEMS] = work.items_at, len(work.items)
            if work.parts:
                entries = work.parts * spec.num_kv_heads * work.partial_rows
                outs, lses = np.empty((entries, spec.value_head_size), np.float32), np.empty(entries, np.float32)
                self._arrays += outs, lses
                words[A.PARTIAL_OUT], words[A.PARTIAL_LSE] = address(outs), address(lses)
                words[A.PARTIAL_ROWS] = work.partial_rows
            self._run(work.kernel, KINDS[self._stored], work.path, work.threads)
            if work.parts:
                words[A.SCRATCH_OFFSETS], words[A.SCRATCH_BYTES] = (
                    work.merge_scratch.offsets_at,
                    work.merge_scratch.num_bytes,
                )
                words[A.SPLITS], words[A.NUM_ITEMS] = address(work.splits), len(work.splits) * spec.num_kv_heads
                self._run("merge", 0, "fma", 1 if plan.threads <= FEW_THREADS else work.threads)

    def attend_again(self) -> None:
        """Run the same kernels once more, as a benchmark of them does."""
        self._words[A.CALLS :] = 0
        self._next_call = A.CALLS
        self.attend()

    def _scratch(self, size: int) -> int:
        """Return the address of memory of at least this many bytes, the calling thread's own, at a page."""
        if getattr(_local, "size", 0) < size:
            memory = np.empty(size + 4096, np.uint8)
            _local.memory, _local.size, _local.address = memory, size, -(-address(memory) // 4096) * 4096
        self._arrays.append(_local.memory)  # a signal's handler may run a larger step in this thread
        return _local.address  # type: ignore[no-any-return]

    def _run(self, name: str, kind: int, path: str, count: int) -> None:
        at = self._at + 8 * self._next_call
        self._next_call += A.CALL_WORDS
        POOL.run(kernel(name, kind, path), self._at, at, count, self)


def address(array: NDArray) -> int:
    """Return where an array's first element lies (`array.ctypes.data` takes ten times as long)."""
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


def locate(array: Array, arrays: list[Any]) -> tuple[int, Sequence[int]]:
    """Return where an array of NumPy or torch lies and its strides in bytes, elements of a row side by side.

    Torch's tensors are asked themselves: to make NumPy's arrays of three, and torch's of one, costs as much as a small
    step. What must live as long as the address is used is appended to `arrays`.

    Raises:
        ArrayError: it is on a device.
    """
    if isinstance(array, np.ndarray):
        if array.strides[-1] != array.itemsize and array.size:
            array = np.ascontiguousarray(array)
        arrays.append(array)
        return address(array), array.strides
    if not array.is_cpu:
        raise ArrayError(f"an array on {array.device} cannot be read as host memory; move it to the CPU first")
    if array.stride(-1) != 1:
        array = array.contiguous()
    arrays.append(array)
    size = array.element_size()
    return array.data_ptr(), [stride * size for stride in array.stride()]


def _cache_words(cache: KVCache) -> tuple[Words, Words, int, int]:
    """Return what a cache knows: key and value addresses with their strides, addresses of scales (0: none).

    Its arrays may be strided views, as long as a token's elements lie side by side.
    """
    arrays = cache.arrays_as("numpy")
    sides = [np.array([address(arrays[name]), *arrays[name].strides[:3]], np.int64) for name in ("key", "value")]
    scales = [address(arrays[name]) if name in arrays else 0 for name in ("key_scale", "value_scale")]
    return sides[0], sides[1], scales[0], scales[1]


def _empty(like: Array, shape: tuple[int, ...], dtype: str = "") -> Array:
    """Return a new array of the library that `like` is of, and of its dtype unless another is named."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype or like.dtype)
    torch = sys.modules["torch"]
    if not dtype and like.shape == shape and like.is_contiguous():
        return torch.empty_like(like, requires_grad=False)  # half of what asking with a shape costs
    return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype)


def _rows_are_dense(array: Array) -> bool:
    step = array.strides[-1] == array.itemsize if isinstance(array, np.ndarray) else array.stride(-1) == 1
    return bool(step)


__all__ = ["Launch", "NumbaPlan", "make_plan", "run", "work_of"]
