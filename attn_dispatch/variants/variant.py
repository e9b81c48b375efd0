"""`Variant`: what every variant has in common: passes over page tables of its own making, merged where they meet."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_dispatch.attention import Attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.contract import Array, AttentionSpec, KVCache
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import ArrayError, CacheError, PlanError, SpecError
from attn_dispatch.variants.rows import Rows, new, put, take
from attn_dispatch.variants.writing import Writer

__all__ = ["Group", "Pass", "Variant", "VariantPlan", "attend", "refuse_fields"]


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
    groups: tuple[Group, ...]
    write: Plan | None = None
    copies: tuple[Any, Any] | None = None
    highest_block: int = field(default=-1)


def refuse_fields(what: str, spec: AttentionSpec, *names: str) -> None:
    """Refuse what a variant has no meaning for.

    Raises:
        SpecError: naming the field.
    """
    plain = AttentionSpec(num_heads=spec.num_heads, head_size=spec.head_size, kind=spec.kind)
    for name in names:
        found, expected = getattr(spec, name), getattr(plain, name)
        if found != expected:
            raise SpecError(f"{what}: {name}={found} has no meaning here; leave it at {expected}")


def attend(
    spec: AttentionSpec,
    groups: Sequence[Group],
    queries: Sequence[Array],
    k: Array | None,
    v: Array | None,
    cache: KVCache,
    out: Array | None,
    return_lse: bool,
) -> Any:
    """Run every group's passes and merge what belongs together.

    Returns:
        out [T, H, Dv], or (out, lse f32[T, H]).
    """
    whole = groups[0]
    if len(groups) == 1 and len(whole.passes) == 1 and whole.rows is None:
        only = whole.passes[0]
        new_kv = (k, v) if only.writes else (None, None)
        return only.attn.run(only.plan, queries[only.query], *new_kv, cache, out, return_lse=return_lse)
    q = queries[0]
    result = out if out is not None else new(q, (q.shape[0], spec.num_heads, spec.value_head_size))
    lse = new(q, (q.shape[0], spec.num_heads), "float32") if return_lse else None
    for group in groups:
        merging = len(group.passes) > 1
        states = []
        for one in group.passes:
            new_kv = (k, v) if one.writes else (None, None)
            found = one.attn.run(
                one.plan, take(queries[one.query], group.rows), *new_kv, cache, return_lse=merging or return_lse
            )
            states.append(found if merging or return_lse else (found, None))
        part, part_lse = group.passes[0].attn.backend.merge_states(states) if merging else states[0]
        result = put(result, group.rows, part)
        if lse is not None:
            lse = put(lse, group.rows, part_lse)
    return result if lse is None else (result, lse)


class Variant(abc.ABC):
    """A layer whose attention is several passes of one backend over one cache.

    Attributes:
        spec: the layer as its user sees it: the shapes of q, k, v, the output and the cache.
        backend: who runs the passes.
    """

    spec: AttentionSpec
    backend: Backend
    _cache_attn: Attention  # whose layout the cache has
    _writer: Writer | None = None

    def allocate(self, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache for one layer; see `Attention.allocate`."""
        return self._cache_attn.allocate(num_blocks, device)

    def run(
        self,
        plan: VariantPlan,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: KVCache,
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
        return self._run(plan, (q,), k, v, cache, out, return_lse)

    def _run(
        self,
        plan: VariantPlan,
        queries: Sequence[Array],
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        out: Array | None,
        return_lse: bool,
    ) -> Any:
        self._check(plan, queries, cache, out)
        if plan.write is not None:
            assert self._writer is not None
            self._writer.write(plan.write, queries[0], k, v, cache)
        if plan.copies is not None:
            cache.copy_slots(*plan.copies)
        return self._attend(plan, queries, k, v, cache, out, return_lse)

    def _attend(
        self,
        plan: VariantPlan,
        queries: Sequence[Array],
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        out: Array | None,
        return_lse: bool,
    ) -> Any:
        return attend(self.spec, plan.groups, queries, k, v, cache, out, return_lse)

    def _check(self, plan: VariantPlan, queries: Sequence[Array], cache: KVCache, out: Array | None) -> None:
        """Refuse what a pass would refuse, while nothing has been written."""
        spec = self.spec
        if plan.spec != spec:
            raise PlanError(f"the plan is for {plan.spec}; this layer is {spec}")
        shapes = [("q", q, (plan.num_tokens, spec.num_heads, spec.head_size)) for q in queries]
        if out is not None:
            shapes.append(("out", out, (plan.num_tokens, spec.num_heads, spec.value_head_size)))
        for name, array, shape in shapes:
            if tuple(array.shape) != shape or dtype_name(array.dtype) != spec.dtype:
                raise ArrayError(
                    f"{name} is {dtype_name(array.dtype)} {tuple(array.shape)}, this step needs {spec.dtype} {shape}"
                )
        if cache.geometry != spec.geometry:
            raise CacheError(f"the cache is {cache!r}; the layer needs {spec.geometry}")
        if plan.highest_block >= cache.num_blocks:
            raise CacheError(
                f"block {plan.highest_block} is outside the cache, which has {cache.num_blocks} blocks "
                f"(0..{cache.num_blocks - 1}); nothing was written"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec}, backend={self.backend.name})"
