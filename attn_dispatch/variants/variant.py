"""`Variant`: what every variant has in common: passes over page tables of its own making, merged where they meet."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from attn_dispatch.attention import Attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec
from attn_dispatch.contract.array_checks import check_out
from attn_dispatch.contract.arrays import library_of
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import ArrayError, CacheError, PlanError, SpecError
from attn_dispatch.variants.rows import Rows, new, put, take
from attn_dispatch.variants.writing import Writer

__all__ = ["Group", "Pass", "Variant", "VariantCall", "VariantPlan", "attend", "check_plan", "refuse_fields"]


class Scales(TypedDict, total=False):
    """Scales of a layer's quantised cache; see `ad.attention`."""

    k_scale: float
    v_scale: float


class LayerOptions(Scales, total=False):
    """What a layer has beside its spec; see `ad.attention`.

    `sinks` are f32[H], learned logits, with `spec.sinks`.
    """

    sinks: Array


def scales_of(options: LayerOptions) -> Scales:
    """Return the scales among a layer's options."""
    return {"k_scale": options.get("k_scale", 1.0), "v_scale": options.get("v_scale", 1.0)}


def is_scaled(options: LayerOptions | Scales) -> bool:
    """Tell whether a scale is not 1: a backend that ignores scales cannot run such a layer."""
    return options.get("k_scale", 1.0) != 1.0 or options.get("v_scale", 1.0) != 1.0


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a backend.

    Attributes:
        attn: the layer that runs it.
        plan: its batch, over the rows of its group.
        query: which of the variant's queries it takes (a variant may have several of each token).
        writes: it is given the step's keys and values, and writes them.
    """

    attn: Attention
    plan: Plan
    query: int = 0
    writes: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that the same passes attend for, on disjoint sets of keys. A later group replaces an earlier one's rows."""

    passes: tuple[Pass, ...]
    rows: Rows = None


@dataclass(frozen=True, eq=False)
class VariantPlan:
    """One step of a variant, for every layer that is equal to the one that made it.

    Attributes:
        spec: the variant's spec.
        num_tokens: rows of q, T.
        groups: what is run.
        write: the plan of the writes that come first (None: a pass writes, or nothing is written).
        copies: (slots, slots) to copy between writing and reading.
        highest_block: the highest block that the step reads or writes.
    """

    spec: AttentionSpec
    num_tokens: int
    groups: tuple[Group, ...] = ()
    write: Plan | None = None
    copies: tuple[Any, Any] | None = None
    highest_block: int = field(default=-1)


@dataclass(slots=True, eq=False)
class VariantCall:
    """One run of a variant: made by `Variant.run`, handed down whole.

    Attributes:
        plan: the step.
        queries: [T, H, D] each: a variant may have several forms of each token's query.
        k: [T, K, D], or None when the step writes nothing.
        v: [T, K, Dv], likewise.
        cache: the layer's.
        out: [T, H, Dv] to write into.
        return_lse: f32[T, H] is wanted too.
    """

    plan: Any
    queries: tuple[Array, ...]
    k: Array | None
    v: Array | None
    cache: Any
    out: Array | None = None
    return_lse: bool = False


def refuse_fields(what: str, spec: AttentionSpec, *names: str) -> None:
    """Refuse what a variant has no meaning for.

    Raises:
        SpecError: naming the field.
    """
    if not spec.has_block_size:
        raise SpecError(f"{what}: block_size=None is for plain layers; choose one (ad.attention(spec).block_sizes)")
    plain = AttentionSpec(num_heads=spec.num_heads, head_size=spec.head_size, kind=spec.kind)
    for name in names:
        value, expected = getattr(spec, name), getattr(plain, name)
        if value != expected:
            raise SpecError(f"{what}: {name}={value} has no meaning here; leave it at {expected}")


def attend(spec: AttentionSpec, groups: Sequence[Group], call: VariantCall) -> Any:
    """Run every group's passes and merge what belongs together.

    Args:
        spec: shapes of the output.
        groups: what is run.
        call: with the queries, keys and values that the passes are given.

    Returns:
        out [T, H, Dv], or (out, lse f32[T, H]).
    """
    whole = groups[0]
    if len(groups) == 1 and len(whole.passes) == 1 and whole.rows is None:
        only = whole.passes[0]
        new_kv = (call.k, call.v) if only.writes else (None, None)
        query = call.queries[only.query]
        return only.attn.run(only.plan, query, *new_kv, call.cache, call.out, return_lse=call.return_lse)
    q = call.queries[0]
    result = call.out if call.out is not None else new(q, (q.shape[0], spec.num_heads, spec.value_head_size))
    lse = new(q, (q.shape[0], spec.num_heads), "float32") if call.return_lse else None
    for group in groups:
        merging = len(group.passes) > 1
        wants_lse = merging or call.return_lse
        states = []
        for step in group.passes:
            new_kv = (call.k, call.v) if step.writes else (None, None)
            rows = take(call.queries[step.query], group.rows)
            state = step.attn.run(step.plan, rows, *new_kv, call.cache, return_lse=wants_lse)
            states.append(state if wants_lse else (state, None))
        part, part_lse = group.passes[0].attn.backend.merge_states(states) if merging else states[0]
        result = put(result, group.rows, part)
        if lse is not None:
            lse = put(lse, group.rows, part_lse)
    return result if lse is None else (result, lse)


def check_plan(spec: AttentionSpec, plan: VariantPlan, num_blocks: int) -> None:
    """Refuse another layer's plan, or one that reaches beyond a cache.

    Raises:
        PlanError, CacheError: nothing has been written.
    """
    if plan.spec != spec:
        raise PlanError(f"the plan is for {plan.spec}; this layer is {spec}")
    if plan.highest_block >= num_blocks:
        raise CacheError(
            f"block {plan.highest_block} is outside the cache, which has {num_blocks} blocks (0..{num_blocks - 1}); "
            "nothing was written"
        )


class Variant(abc.ABC):
    """A layer whose attention is passes of one backend over one cache: `allocate`, `plan` and `run` as a plain layer's.

    Attributes:
        spec: the layer as its user sees it: the shapes of q, k, v, the output and the cache.
        backend: who runs the passes.
    """

    spec: AttentionSpec
    backend: Backend
    _cache_attn: Attention  # whose layout the cache has
    _writer: Writer | None = None

    def allocate(self, num_blocks: int, device: str | None = None) -> Any:
        """Return a zeroed cache for one layer; see `Attention.allocate`."""
        return self._cache_attn.allocate(num_blocks, device)

    @abc.abstractmethod
    def plan(self, batch: AttentionMetadata) -> VariantPlan:
        """Prepare a step, once for all the layers that are equal to this one."""

    def run(
        self,
        plan: VariantPlan,
        q: Any,
        k: Array | None,
        v: Array | None,
        cache: Any,
        out: Array | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Write the new keys and values, then attend.

        Args:
            plan: of this step.
            q: [T, H, D].
            k: [T, K, D], v: [T, K, Dv]; None when the step writes nothing.
            v: see k.
            cache: the layer's.
            out: [T, H, Dv] to write into.
            return_lse: also return the log-sum-exp, natural log, f32[T, H].

        Returns:
            [T, H, Dv], or that and the LSE, of the library that q is of.

        Raises:
            ArrayError, CacheError, PlanError: before anything has been written.
        """
        return self._run(VariantCall(plan, (q,), k, v, cache, out, return_lse))

    def _run(self, call: VariantCall) -> Any:
        plan = call.plan
        self._check(call)
        if plan.write is not None:
            assert self._writer is not None
            self._writer.write(plan.write, call.queries[0], call.k, call.v, call.cache)
        if plan.copies is not None:
            call.cache.copy_slots(*plan.copies)
        return self._attend(call)

    def _attend(self, call: VariantCall) -> Any:
        return attend(self.spec, call.plan.groups, call)

    def _check(self, call: VariantCall) -> None:
        """Refuse what a pass would refuse, while nothing has been written."""
        spec, tokens = self.spec, call.plan.num_tokens
        check_plan(spec, call.plan, call.cache.num_blocks)
        shapes = [("q", q, (tokens, spec.num_heads, spec.head_size)) for q in call.queries]
        if call.out is not None:
            shapes.append(("out", call.out, (tokens, spec.num_heads, spec.value_head_size)))
            check_out(call.out, [("q", q) for q in call.queries], library_of(call.out))
        for name, array, shape in shapes:
            if tuple(array.shape) != shape or dtype_name(array.dtype) != spec.dtype:
                raise ArrayError(
                    f"{name} is {dtype_name(array.dtype)} {tuple(array.shape)}, expected {spec.dtype} {shape}"
                )
        if call.cache.geometry != spec.geometry:
            raise CacheError(f"the cache is {call.cache!r}; the layer needs {spec.geometry}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec}, backend={self.backend.name})"
