"""A batch and a call as the op's arguments: what it writes, what is written before it, the output. Imports OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import get_ident
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch import AttentionSpec, Call, KVCache, LayerParameters, Plan
from attn_dispatch.contract import Array, BatchView
from attn_dispatch.contract.arrays import as_library, as_numpy, library_of
from attn_dispatch.contract.dtypes import numpy_dtype, quantise
from attn_dispatch.errors import BackendRefusedError, CacheError

from .device_batch import DeviceBatch, Tree, cacheless_batch, paged_batch, tree_bias
from .layer_request import BoundCache, cache_tensors
from .layouts import PackedLayout
from .program import ELEMENT, Program, ProgramKey, compiled, core
from .releases import Release, Target
from .step_tensors import StepTensors

__all__ = ["BACKEND", "PagedPlan", "make_plan", "run", "share_with_device"]

BACKEND = "openvino/paged"

Arrays = npt.NDArray[Any]


class _PerThread(threading.local):
    """What a thread keeps, the most recently used: tensors by the size of a step, caches for layers without one."""

    def __init__(self) -> None:
        self.step_tensors = lru_cache(maxsize=16)(StepTensors)
        self.cache = lru_cache(maxsize=4)(lambda allocate, spec, num_blocks: allocate(spec, num_blocks))


_kept = _PerThread()


@dataclass(slots=True, eq=False, kw_only=True)
class PagedPlan(Plan):
    """A step for the op.

    Attributes:
        batch: what the op is given; None: no row attends to anything.
        program: what is run; None: one per layer (see `ProgramKey.constants`), or nothing.
        key: what the program depends on.
        op_writes: the op writes the step's keys and values itself; else NumPy does, before.
        tree: the masks among new tokens, if the step has them.
        rewritten_slots: where each row's key lies, for releases whose op always writes.
        tensors: those that were last used, and the thread that they belong to.
        cacheless: the same step over blocks of the backend's own, and how many, for an encoder layer without a cache.
    """

    batch: DeviceBatch | None
    program: Program | None
    key: ProgramKey
    op_writes: bool
    tree: Tree | None
    rewritten_slots: npt.NDArray[np.int64] | None
    tensors: tuple[int, StepTensors | None] = (-1, None)
    cacheless: tuple[PagedPlan, int] | None = None


def make_plan(
    spec: AttentionSpec,
    view: BatchView,
    target: Target,
    masks: Sequence[npt.NDArray[np.bool_] | None] | None = None,
) -> PagedPlan:
    """Prepare a step.

    Args:
        spec: the layers.
        view: the batch as they see it.
        target: what computes.
        masks: of a tree of new tokens, per sequence.

    Raises:
        BackendRefusedError: a tree's last block is read by a sequence that has more tokens in it.
        MetadataError: a mask does not fit its sequence.
    """
    release, side, batch, tree = target.release, view.side, None, None
    if side.has_blocks:
        # Without token types, a row that is given alone is the only one that sees all keys.
        batch = paged_batch(
            view,
            causal=spec.causal,
            rows_at_once=1 if spec.sees_every_key and not release.token_types else None,
            clears_tails=release.clears_keys or spec.kv_cache_dtype in ("float32", "bfloat16"),
        )
    if masks is not None and batch is not None:
        if batch.parted:
            raise BackendRefusedError(
                f"{BACKEND}: a tree's last block is shared with a sequence that has more tokens in it; give the "
                "tree a copy of the block (cache.copy_blocks)"
            )
        tree = tree_bias(masks, view.query_lens, batch.sequences)
    op_writes = (
        batch is not None
        and spec.writes_kv
        and not (spec.sees_every_key or batch.parted)
        and side.num_written == batch.num_rows
        and (side.start_loc is view.query_start_loc or np.array_equal(side.start_loc, view.query_start_loc))
    )
    return _prepared(spec, view, target, batch, op_writes, tree)


def _prepared(
    spec: AttentionSpec, view: BatchView, target: Target, batch: DeviceBatch | None, op_writes: bool, tree: Tree | None
) -> PagedPlan:
    reads_only = target.release.reads_only
    key = ProgramKey(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        value_head_size=spec.value_head_size,
        dtype=spec.dtype,
        cache_dtype=spec.kv_cache_dtype,
        alibi=spec.alibi,
        sinks=spec.sinks,
        token_types=not spec.causal and target.release.token_types,
        tree=tree is not None,
        writes=op_writes or not reads_only,
        target=target,
    )
    rewritten = None if batch is None or op_writes or reads_only else batch.slots(view, spec.block_size)
    return PagedPlan(
        spec=spec,
        view=view,
        backend=BACKEND,
        batch=batch,
        program=compiled(key) if batch is not None and target.device == "CPU" else None,
        key=key,
        op_writes=op_writes,
        tree=tree,
        rewritten_slots=rewritten,
    )


def run(call: Call, allocate: Callable[[AttentionSpec, int], KVCache]) -> Array:
    """Write the step's keys and values (the op does, if the plan says so), then attend.

    Args:
        call: the layer's.
        allocate: makes a cache, for a layer that has none.

    Raises:
        ArrayError: an array is not in host memory.
        CacheError: the cache cannot be bound as it is.
    """
    plan, cache = call.plan, call.cache
    assert isinstance(plan, PagedPlan)
    if cache is None:
        if plan.cacheless is None:
            plan.cacheless = _cacheless(plan)
        plan, num_blocks = plan.cacheless
        # Sizes are powers of two, so that few caches serve all steps.
        cache = _kept.cache(allocate, plan.spec, 1 << max(num_blocks - 1, 0).bit_length())
    bound: Any = cache.backend_state.get(BACKEND)
    if bound is None:
        bound = _bind(cache, plan.key.target)
    with bound.lock:
        if not plan.op_writes and call.k is not None and plan.view.side.num_written:
            _write(cache, as_numpy(call.k), as_numpy(call.v), plan.view.side.slots)
        if plan.batch is None:
            return _zeros(plan, call)
        return _attend(plan, plan.batch, bound, cache, call)


def _attend(plan: PagedPlan, batch: DeviceBatch, bound: BoundCache, cache: KVCache, call: Call) -> Array:
    q, out, rows = call.q, call.out, batch.rows
    k, v = (call.k, call.v) if plan.op_writes else (None, None)
    if rows is not None:
        q = q[rows]
        if k is not None and v is not None:
            k, v = k[rows], v[rows]
    if plan.rewritten_slots is not None:
        k, v = (as_library(x, library_of(q)) for x in _stored(cache, plan.rewritten_slots, plan.spec.dtype))
    thread, tensors = plan.tensors
    if thread != get_ident() or tensors is None or tensors.batch is not batch:
        tensors = _load_tensors(plan, batch)
    spec = plan.spec
    window = spec.window[0] + 1 if spec.window[0] >= 0 else 0
    request = bound.request(plan.program or _layer_program(plan.key, spec.scale, window, call.layer))
    request.bind_layer(spec.scale, window, call.layer)
    if rows is None:
        return request.infer_rows(tensors, batch, q, k, v, out)
    attended = request.infer_rows(tensors, batch, q, k, v, None)
    out = _zeros(plan, call)
    out[rows] = attended
    return out


def _load_tensors(plan: PagedPlan, batch: DeviceBatch) -> StepTensors:
    """Return this thread's tensors of the batch's size, with its numbers in them."""
    tensors = _kept.step_tensors(plan.key, len(batch.past_lens), len(batch.blocks), batch.num_rows, plan.tree)
    if tensors.batch is not batch:
        tensors.load(batch)
    plan.tensors = get_ident(), tensors
    return tensors


def _layer_program(key: ProgramKey, scale: float, window: int, layer: LayerParameters) -> Program:
    slopes, sinks = (
        None if numbers is None else tuple(numbers.tolist()) for numbers in (layer.alibi_slopes, layer.sinks)
    )
    return compiled(key._replace(constants=(scale, window, slopes, sinks)))


def _cacheless(plan: PagedPlan) -> tuple[PagedPlan, int]:
    """Return a plan that attends to k and v themselves, and how many blocks it writes them into."""
    spec = replace(plan.spec, kv_cache_dtype=plan.spec.dtype)
    batch, num_blocks = cacheless_batch(plan.view, spec.block_size)
    return _prepared(spec, plan.view, plan.key.target, batch, True, None), num_blocks


def _bind(cache: KVCache, target: Target) -> BoundCache:
    if target.device != "CPU":
        raise CacheError(
            f"{cache!r} is not in memory that the GPU shares: allocate it with ATTN_DISPATCH_OPENVINO_DEVICE set"
        )
    bound = BoundCache(cache_tensors(cache), _cleared(cache, target.release))
    kept = cache.backend_state.setdefault(BACKEND, bound)
    assert isinstance(kept, BoundCache)
    return kept


def _cleared(cache: KVCache, release: Release) -> tuple[Arrays, ...]:
    arrays = cache.arrays_as("numpy")
    return (arrays["key"], arrays["value"]) if release.clears_keys else (arrays["value"],)


def share_with_device(cache: KVCache, target: Target) -> None:
    """Put a new cache into host memory that a GPU reads and writes in place, and bind it: never run by this project."""
    context = core().get_default_context(target.device)
    tensors = {
        name: context.create_host_tensor(ELEMENT[cache.geometry.dtype], ov.Shape(list(array.shape)))
        for name, array in cache.arrays.items()
    }
    for name, tensor in tensors.items():
        cache.arrays[name] = tensor.data
        cache.arrays[name][...] = 0
    cache.backend_state[BACKEND] = BoundCache((tensors["key"], tensors["value"]), _cleared(cache, target.release))


def _write(cache: KVCache, k: Arrays, v: Arrays, slots: npt.NDArray[np.int64]) -> None:
    """Store rows in their slots; a slot of -1 is not written."""
    arrays = cache.arrays_as("numpy")
    written = slots >= 0
    block, offset = np.divmod(slots[written], cache.geometry.block_size)
    if isinstance(cache.layout, PackedLayout):
        for name, rows in (("key", k), ("value", v)):
            arrays[name][block, :, offset] = cache.layout.encode(rows[written])
        return
    for array, rows in zip(cache.layout.to_logical(arrays), (k, v), strict=True):
        array[block, :, offset] = quantise(rows[written], cache.geometry.dtype, 1.0)


def _stored(cache: KVCache, slots: npt.NDArray[np.int64], dtype: str) -> tuple[Arrays, Arrays]:
    """Return the keys and values that lie in slots, as rows for an op that writes them again."""
    block, offset = np.divmod(slots, cache.geometry.block_size)
    key, value = cache.layout.to_logical(cache.arrays_as("numpy"))
    element = numpy_dtype(dtype)
    return key[block, :, offset].astype(element), value[block, :, offset].astype(element)


def _zeros(plan: PagedPlan, call: Call) -> Array:
    """Return the output of rows that attend to nothing."""
    out = call.out
    if out is None:
        shape = (plan.num_tokens, plan.spec.num_heads, plan.spec.value_head_size)
        return as_library(np.zeros(shape, numpy_dtype(plan.spec.dtype)), library_of(call.q))
    out[...] = 0
    return out
