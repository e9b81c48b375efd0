"""Running a step: writing what the op cannot, binding, inferring. Imports OpenVINO."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from attn_dispatch import AttentionSpec, KVCache, LayerParameters
from attn_dispatch.contract import Array
from attn_dispatch.contract.arrays import as_library, as_numpy, library_of
from attn_dispatch.contract.dtypes import numpy_dtype, quantise
from attn_dispatch.errors import CacheError

from .device import device_name, num_threads
from .frames import Frame, Frames
from .layouts import PackedLayout
from .model import ELEMENT, Program, compiled, core
from .requests import Binding, BoundRequest, cache_tensors
from .steps import Step, own_pages_step

if TYPE_CHECKING:
    from .paged import PagedBackend, PagedPlan
    from .releases import Release

__all__ = ["Executor", "Work"]

Arrays = npt.NDArray[Any]
_serials = itertools.count()


@dataclass(frozen=True, eq=False)
class Route:
    """What steps of one kind of layer have in common; made once, compared by identity.

    Attributes:
        program: the compiled model's.
        scale: on the scores.
        window: tokens that a query sees, itself included; 0: all.
        serial: part of a frame's key.
    """

    program: Program
    scale: float
    window: int
    serial: int


@dataclass(slots=True, eq=False)
class Work:
    """A plan's step with all that is looked up once.

    Attributes:
        step: what the op is given.
        route: see there.
        op_writes: the op is to write the step's keys and values.
        plain: all rows, nothing to write again.
        frame_key: which frame it fits.
        tree: the op's mask among new tokens, if it has one.
        old_slots: where each row's key lies, for releases that cannot but write.
        frame: the frame that was last used, and the thread that it belongs to.
    """

    step: Step
    route: Route
    op_writes: bool
    plain: bool
    frame_key: tuple[object, ...]
    tree: tuple[Arrays, Arrays] | None = None
    old_slots: npt.NDArray[np.int64] | None = None
    frame: tuple[int, Any] = (-1, None)


class _OwnPages(threading.local):
    """Each thread's caches for encoder layers that have none."""

    def __init__(self) -> None:
        self.caches: dict[AttentionSpec, KVCache] = {}


class Executor:
    """What a backend keeps while it computes: routes, each thread's frames, each cache's requests (`backend_state`).

    Args:
        backend: whose caches and name they are.
        release: the installed one.
    """

    def __init__(self, backend: PagedBackend, release: Release) -> None:
        self._backend = backend
        self._name = backend.name
        self._release = release
        self._frames = Frames()
        self._own_pages = _OwnPages()
        self._routes: dict[tuple[object, ...], Route] = {}
        self._lock = threading.Lock()
        self._nothing: Any = object()  # the work of a plan in which no row attends to anything

    def run(
        self,
        plan: PagedPlan,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: KVCache | None,
        layer: LayerParameters,
        out: Array | None,
    ) -> Array:
        """Write the step's keys and values (the op does, if the plan says so), then attend."""
        if cache is None:
            return self._run_without_cache(plan, q, k, v, layer, out)
        work = plan.work
        if work is None:
            if plan.step is not None:
                work = plan.work = self._work(plan, plan.spec, plan.step, plan.op_writes)
            else:
                work = plan.work = self._nothing
        if not plan.op_writes and k is not None and plan.view.side.num_written:
            with self._binding(cache).lock:
                _write(cache, as_numpy(k), as_numpy(v), plan.view.side.slots)
        if work is self._nothing:
            return _zeros(plan, q, out)
        return self._attend(work, q, k, v, cache, layer, out)

    def share_with_device(self, cache: KVCache, device: str) -> None:
        """Put a new cache into host memory that a GPU reads and writes in place, and bind it: never run here."""
        context = core().get_default_context(device)
        tensors = {
            name: context.create_host_tensor(ELEMENT[cache.geometry.dtype], ov.Shape(list(array.shape)))
            for name, array in cache.arrays.items()
        }
        for name, tensor in tensors.items():
            cache.arrays[name] = tensor.data
            cache.arrays[name][...] = 0
        cache.backend_state[self._name] = Binding((tensors["key"], tensors["value"]), self._cleared(cache))

    def _run_without_cache(
        self, plan: PagedPlan, q: Array, k: Array | None, v: Array | None, layer: LayerParameters, out: Array | None
    ) -> Array:
        """Attend to k and v themselves: an encoder layer, through pages that belong to this thread."""
        spec = replace(plan.spec, kv_cache_dtype=plan.spec.dtype)
        if plan.own_work is None:
            step, blocks = own_pages_step(plan.view, spec.block_size)
            plan.own_work = None if step is None else self._work(plan, spec, step, True), blocks
        work, blocks = plan.own_work
        if work is None:
            return _zeros(plan, q, out)
        cache = self._own_pages.caches.get(spec)
        if cache is None or cache.num_blocks < blocks:
            cache = self._backend.allocate(spec, 1 << (blocks - 1).bit_length())
            self._own_pages.caches[spec] = cache
        return self._attend(work, q, k, v, cache, layer, out)

    def _work(self, plan: PagedPlan, spec: AttentionSpec, step: Step, writes: bool) -> Work:
        device, threads = device_name(), num_threads()
        key = (spec, writes, plan.tree is not None, device, threads)
        with self._lock:
            route = self._routes.get(key)
            if route is None:
                program = Program(
                    num_heads=spec.num_heads,
                    num_kv_heads=spec.num_kv_heads,
                    head_size=spec.head_size,
                    value_head_size=spec.value_head_size,
                    dtype=spec.dtype,
                    cache_dtype=spec.kv_cache_dtype,
                    alibi=spec.alibi,
                    sinks=spec.sinks,
                    token_types=not spec.causal and self._release.token_types,
                    tree=plan.tree is not None,
                    writes=writes or not self._release.reads_only,
                    device=device,
                    threads=threads,
                    release=self._release,
                )
                window = spec.window[0] + 1 if spec.window[0] >= 0 else 0
                route = self._routes[key] = Route(program, spec.scale, window, next(_serials))
        old_slots = None
        if not writes and route.program.writes:
            old_slots = step.slots(plan.view, spec.block_size)
        # A tree's tensors are its own; all else that has the same sizes shares a frame.
        frame_key = (
            (next(_serials),)
            if plan.tree is not None
            else (route.serial, len(step.past_lens), len(step.blocks), step.num_rows)
        )
        plain = step.rows is None and old_slots is None
        return Work(step, route, writes, plain, frame_key, plan.tree, old_slots)

    def _attend(
        self,
        work: Work,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        layer: LayerParameters,
        out: Array | None,
    ) -> Array:
        binding: Any = cache.backend_state.get(self._name)
        if binding is None:
            binding = self._binding(cache)
        request = binding.requests.get((work.route, layer))
        if request is None:
            request = _new_request(work.route, binding, layer)
        owner, frame = work.frame
        if owner != get_ident() or frame.step is not work.step:
            frame = self._frame(work)
        if not work.op_writes:
            k = v = None
        if work.plain:
            with request.lock:
                return request.infer_rows(frame, work.step, q, k, v, out)
        return self._attend_otherwise(work, request, frame, q, k, v, cache, out)

    def _attend_otherwise(
        self,
        work: Work,
        request: BoundRequest,
        frame: Frame,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        out: Array | None,
    ) -> Array:
        """Attend where some rows are padding, or have to be written again."""
        rows, total, library = work.step.rows, len(q), library_of(q)
        if rows is not None:
            q = q[rows]
            if k is not None and v is not None:
                k, v = k[rows], v[rows]
        if work.old_slots is not None:
            k, v = (as_library(x, library) for x in _stored(cache, work.old_slots, work.route.program.dtype))
        with request.lock:
            found = request.infer_rows(frame, work.step, q, k, v, out if rows is None else None)
        if rows is None:
            return found
        if out is None:
            shape = (total, *found.shape[1:])
            out = as_library(np.zeros(shape, numpy_dtype(work.route.program.dtype)), library)
        else:
            out[...] = 0
        out[rows] = found
        return out

    def _frame(self, work: Work) -> Frame:
        """Return this thread's frame for a step, with its numbers in it."""
        frame = self._frames.get(work.frame_key, work.route.program, work.step, work.tree)
        work.frame = (get_ident(), frame)
        return frame

    def _binding(self, cache: KVCache) -> Binding:
        found = cache.backend_state.get(self._name)
        if isinstance(found, Binding):
            return found
        if device_name() != "CPU":
            raise CacheError(
                f"{cache!r} is not in memory that the GPU shares: allocate it with ATTN_DISPATCH_OPENVINO_DEVICE set"
            )
        binding = cache.backend_state.setdefault(self._name, Binding(cache_tensors(cache), self._cleared(cache)))
        assert isinstance(binding, Binding)
        return binding

    def _cleared(self, cache: KVCache) -> tuple[Arrays, ...]:
        arrays = cache.arrays_as("numpy")
        return (arrays["key"], arrays["value"]) if self._release.clears_keys else (arrays["value"],)


def _new_request(route: Route, binding: Binding, layer: LayerParameters) -> BoundRequest:
    program = route.program
    if program.device != "CPU":
        slopes, sinks = (None if own is None else tuple(own.tolist()) for own in (layer.alibi_slopes, layer.sinks))
        program = replace(program, constants=(route.scale, route.window, slopes, sinks))
    made = BoundRequest(compiled(program), binding, route.scale, route.window, layer)
    return binding.requests.setdefault((route, layer), made)


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
    """Return the keys and values that lie in slots, as rows for an op that cannot but write them again."""
    block, offset = np.divmod(slots, cache.geometry.block_size)
    key, value = cache.layout.to_logical(cache.arrays_as("numpy"))
    wanted = numpy_dtype(dtype)
    return key[block, :, offset].astype(wanted), value[block, :, offset].astype(wanted)


def _zeros(plan: PagedPlan, q: Array, out: Array | None) -> Array:
    """Return the output of a step in which no row attends to anything."""
    if out is None:
        shape = (plan.num_tokens, plan.spec.num_heads, plan.spec.value_head_size)
        return as_library(np.zeros(shape, numpy_dtype(plan.spec.dtype)), library_of(q))
    out[...] = 0
    return out
