"""Layers as `torch.library` operators, so that `torch.compile` takes a model whole, whatever backend it is on.

    from attn_dispatch.integrations import torch_library

    layer = torch_library.Layer(attn, attn.allocate(num_blocks))    # once per layer of the model
    out = layer(q, k, v)                                            # in the model's forward
    model = torch.compile(model, fullgraph=True)

    with torch_library.step(batch):                                 # around each forward, outside of what is compiled
        model(x)

A layer's call is one opaque operator that declares what it writes, the cache's arrays, so reads and writes of one cache
keep their order whatever the compiler moves. The batch is no argument of the graph: it is that of the `step` around the
call, and each distinct (backend, spec) is planned once per step. A new batch compiles nothing anew; another number of
tokens is a matter of torch's dynamic shapes, as in any model.

The step is a context variable, so each thread and each asyncio task has its own; a thread that is started within a step
has none. torch runs a compiled forward on the thread that calls it. (Its backward would run on others; attention over a
cache has none.)

Functionalisation turns the writes into copies, which Inductor removes again: it computes in place. `aot_eager`, which
is for debugging, keeps them, and copies each cache at each call.

CUDA graphs. A graph keeps the addresses of its plan, so give a plan whose buffers stay:
`with step(plans={attn: attn.backend.fixed_plan(...)})` around the capture, `plan.renew(batch)` before each replay.
Capture with a step's own plan is refused. The operators say that they are unsafe for graphs that Inductor captures by
itself (`mode="reduce-overhead"`), so that a torch that knows the tag leaves them out.

`torch/sdpa` has operators of its own (`attn_dispatch_torch.ops`) that take the batch and everything else as tensors and
numbers: those are for programs that are exported, and run on torch alone. These are for every backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from attn_dispatch.attention import Attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, KVCache
from attn_dispatch.contract.arrays import as_library, library_of
from attn_dispatch.errors import ArrayError, CacheError, PlanError

__all__ = ["Layer", "Step", "step"]

NAMESPACE = "attn_dispatch"

_CALL = "(Tensor q, Tensor? k, Tensor? v, Tensor(a!)[] cache, Tensor layer, SymInt value_head_size"


class _Group:
    """What layers of an equal spec on one backend have in common: a key that costs nothing to look up."""

    __slots__ = ("__weakref__",)


_groups: WeakValueDictionary[tuple[Backend, AttentionSpec], _Group] = WeakValueDictionary()
_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
# They are lengths of tensors (see `Layer.handle`), larger than any other length: torch.compile takes two that are equal
# once to be equal always.
_numbers = itertools.count(1 << 40)


def _group_of(attention: Attention) -> _Group:
    return _groups.setdefault((attention.backend, attention.spec), _Group())


class Step:
    """One forward of a model: its batch, and its plans."""

    __slots__ = ("_given", "_plans", "batch")

    def __init__(self, batch: AttentionMetadata | None, plans: Mapping[Attention, Plan]) -> None:
        self.batch = batch
        self._given = {_group_of(attention): plan for attention, plan in plans.items()}
        self._plans = dict(self._given)

    def plan(self, layer: Layer, *, captured: bool = False) -> Plan:
        """Return the plan of a layer, made once for all that share its backend and spec.

        Args:
            layer: of the model.
            captured: a graph is being captured, so that the plan must be one that was given.

        Raises:
            PlanError: no plan was given, and there is no batch to make one of (or a graph is being captured).
            MetadataError: the batch is not one that this kind of layer can have.
        """
        group = layer.group
        if captured and group not in self._given:
            raise PlanError(
                f"a graph is being captured, and would replay this batch for ever: {layer.attention} needs a plan "
                "whose buffers stay. Make it with the backend's fixed_plan, and capture within "
                "step(plans={attention: plan})"
            )
        plan = self._plans.get(group)
        if plan is None:
            if self.batch is None:
                raise PlanError(
                    f"step() was given no plan for {layer.attention}, and no batch to make it of: give step(batch), "
                    "or this layer's plan too"
                )
            plan = self._plans[group] = layer.attention.plan(self.batch)
        return plan


_current: ContextVar[Step | None] = ContextVar("attn_dispatch_step", default=None)


@contextmanager
def step(batch: AttentionMetadata | None = None, *, plans: Mapping[Attention, Plan] | None = None) -> Iterator[Step]:
    """Make this batch the one that layers attend to, in this thread (or task), until the block is left.

    Steps may be nested: the inner one holds until it is left. Enter it outside of what is compiled.

    Args:
        batch: of the step.
        plans: plans in hand, by an `Attention` that each is for; they serve every layer of an equal spec on the same
            backend. Other layers plan `batch`.

    Raises:
        PlanError: a plan is for another spec than its `Attention` has.
    """
    for attention, plan in (plans or {}).items():
        if plan.spec != attention.spec:
            raise PlanError(f"the plan is for {plan.spec}; it was given for {attention}")
    entered = Step(batch, plans or {})
    token = _current.set(entered)
    try:
        yield entered
    finally:
        _current.reset(token)


class Layer:
    """One layer of a model: `Attention.run` on its cache, as an operator.

    Its arrays are the cache's own memory. It is no `torch.nn.Module` and owns no parameter; a module holds it as an
    attribute. Compiled code holds it weakly: when the model is gone, so is the
    cache. Copies of a model need layers (and caches) of their own.

    Attributes:
        attention: what runs.
        cache: the layer's cache, or that of the layer whose keys and values it reads (None: an encoder's).
        group: what it shares with layers of an equal spec on the same backend.
        arrays: the cache's memory as tensors, in its layout's order.
        handle: u8[0, number], which says to the operator which layer it is.
        value_head_size: Dv.
    """

    def __init__(self, attention: Attention, cache: KVCache | None = None) -> None:
        """Make a layer.

        Raises:
            CacheError: the layer needs a cache, or torch cannot write to this one's memory.
        """
        spec = attention.spec
        if cache is None and spec.kind != "encoder":
            raise CacheError(f"a {spec.kind} layer needs its cache; allocate(num_blocks) makes one")
        arrays = () if cache is None else _shared(cache)
        self.attention = attention
        self.cache = cache
        self.group = _group_of(attention)
        self.value_head_size = spec.value_head_size
        self.arrays = tuple(arrays)
        number = next(_numbers)
        # Which layer, as the length of a tensor without elements. A number or a name would be a constant of the graph:
        # blocks of a model that are compiled each by itself would be compiled once per layer.
        with torch.inference_mode(False):
            self.handle = torch.empty((0, number), dtype=torch.uint8, device=arrays[0].device if arrays else None)
        _layers[number] = self

    def __call__(self, q: Any, k: Any = None, v: Any = None, out: Any = None, *, return_lse: bool = False) -> Any:
        """Write the new keys and values into their slots, then attend; see `Attention.run`.

        Args:
            q: [T, H, D].
            k: [T, K, D], or None of a layer that reads another's cache.
            v: [T, K, Dv], likewise.
            out: [T, H, Dv] to write into.
            return_lse: also return the log-sum-exp, natural log, f32[T, H].

        Returns:
            [T, H, Dv], or that and the LSE.

        Raises:
            PlanError: no step is active in this thread, or it has no plan for this layer.
            MetadataError, ArrayError, CacheError: before anything has been written.
        """
        if torch.is_grad_enabled() and (
            q.requires_grad or (k is not None and k.requires_grad) or (v is not None and v.requires_grad)
        ):
            raise ArrayError(
                "q, k or v needs a gradient, and attention over a cache has none: call the model under "
                "torch.no_grad() or torch.inference_mode()"
            )
        given = (q, k, v, self.arrays, self.handle, self.value_head_size)
        if out is None:
            return run_lse(*given) if return_lse else run(*given)
        if return_lse:
            return out, run_lse_out(*given, out)
        run_out(*given, out)
        return out

    def __reduce__(self) -> Any:
        raise CacheError(
            "a layer is neither copied nor pickled, its cache's memory least of all: make a Layer for the copy"
        )

    def __repr__(self) -> str:
        return f"Layer({self.attention}, {self.cache})"


def _shared(cache: KVCache) -> Sequence[Any]:
    """Return a cache's arrays as torch tensors that can be written to."""
    libraries = {library_of(array) for array in cache.arrays.values()}
    if "jax" in libraries:
        raise CacheError(f"{cache!r} is JAX's, whose arrays are never written to: compile the model with jax.jit")
    return tuple(cache.arrays_as("torch").values())


def _cache_of(layer: Layer, arrays: Sequence[Any]) -> KVCache | None:
    """Return the layer's cache over the arrays that the operator was given.

    They are the layer's own, or copies that functionalisation has made of them: then it is the copies that are written.
    """
    own = layer.cache
    if own is None or all(
        given.data_ptr() == own_array.data_ptr() for given, own_array in zip(arrays, layer.arrays, strict=True)
    ):
        return own
    for given, own_array in zip(arrays, layer.arrays, strict=True):
        if (given.shape, given.dtype, given.device) != (own_array.shape, own_array.dtype, own_array.device):
            raise CacheError(
                f"an array of the cache is {given.dtype} {tuple(given.shape)} on {given.device}, the layer's is "
                f"{own_array.dtype} {tuple(own_array.shape)} on {own_array.device}"
            )
    copies = {
        name: as_library(given, library_of(array))
        for given, (name, array) in zip(arrays, own.arrays.items(), strict=True)
    }
    return KVCache(own.owner, own.geometry, own.layout, own.num_blocks, copies, own.device)


def _run(q: Any, k: Any, v: Any, cache: Sequence[Any], handle: Any, size: int, out: Any = None, *, lse: bool) -> Any:
    layer = _layers.get(handle.shape[1])
    if layer is None:
        raise CacheError("the layer that this graph was made of is gone, and its cache with it: keep the model alive")
    now = _current.get()
    if now is None:
        raise PlanError(
            "no step is active in this thread: call the model within `with torch_library.step(batch):`, on the thread "
            "that runs it"
        )
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    plan = now.plan(layer, captured=captured)
    result = layer.attention.run(plan, q, k, v, _cache_of(layer, cache), out, return_lse=lse)
    if out is not None:
        return result[1].contiguous() if lse else None
    # What the fake says of strides has to be true.
    return (result[0].contiguous(), result[1].contiguous()) if lse else result.contiguous()


def _fake(q: Any, k: Any, v: Any, cache: Any, handle: Any, size: Any, out: Any = None, *, lse: bool) -> Any:
    rows = q.shape[:2]
    sums = q.new_empty(rows, dtype=torch.float32) if lse else None
    if out is not None:
        return sums
    values = q.new_empty((*rows, size))
    return (values, sums) if lse else values


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# cudagraph_unsafe is not known to torch before 2.9 (own_array, capture is refused when it happens).
_TAGS = [
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "needs_exact_strides", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
]


def _define(name: str, schema: str, *, lse: bool) -> Callable[..., Any]:
    # Not `torch.library.custom_op`: its three wrappers in Python cost several times what a plan's check does.
    _library.define(f"{name}{schema}", tags=_TAGS)
    _library.impl(name, partial(_run, lse=lse), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", partial(_fake, lse=lse), lib=_library)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


run = _define("run", f"{_CALL}) -> Tensor", lse=False)
run_lse = _define("run_lse", f"{_CALL}) -> (Tensor, Tensor)", lse=True)
run_out = _define("run_out", f"{_CALL}, Tensor(b!) out) -> ()", lse=False)
run_lse_out = _define("run_lse_out", f"{_CALL}, Tensor(b!) out) -> Tensor", lse=True)
