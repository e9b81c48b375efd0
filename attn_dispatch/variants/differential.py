"""`Differential`: differential attention (Ye et al., arXiv 2410.05258).

Heads come in pairs, striped: heads 2i and 2i + 1 are the two maps of pair i, and the pair's values are those of both
side by side, 2D wide. Its output is `norm((map_1 - lambda * map_2) values) * (1 - lambda_init)`.

A cache keeps a pair's keys side by side as it does its values: [N, K/2, B, 2D], the very bytes of an ordinary cache
with NHD order. Over it, one ordinary pass computes both maps of all pairs: the query of map 1 is followed by D zeros,
that of map 2 preceded by them. Each key and each value is read once (the reference implementation reads each twice, in
four passes): that is what a decode costs. A prefill costs arithmetic, and half of the scores' is with zeros: where a
backend reads views of a cache, steps of many tokens are two passes over the same cache, one for each half of the keys.
Chunked prefill, prefix sharing, copy-on-write are those of any cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

import numpy as np
import numpy.typing as npt

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Plan, Refusal
from attn_dispatch.contract import (
    Array,
    AttentionMetadata,
    AttentionSpec,
    CacheGeometry,
    CacheLayout,
    KVCache,
    register_layout,
)
from attn_dispatch.contract.arrays import as_library, library_of
from attn_dispatch.contract.dtypes import dtype_name, numpy_dtype
from attn_dispatch.dispatch import choose, verdict_of
from attn_dispatch.errors import ArrayError, CacheError, SpecError
from attn_dispatch.variants.pair_cache import PairCache
from attn_dispatch.variants.rows import concatenate, module_of, new, put
from attn_dispatch.variants.strided import key_and_value, why_not
from attn_dispatch.variants.variant import (
    Scales,
    Variant,
    VariantCall,
    VariantPlan,
    check_plan,
    is_scaled,
    refuse_fields,
)

__all__ = ["DIFFERENTIAL", "Differential", "Form", "reference_cache"]

Form = Literal["one", "two", "four"]
"""Passes: one over pairs of keys, two with values of both (Dv = 2D), four as the reference implementation."""

DIFFERENTIAL = register_layout(CacheLayout("differential", (("pages", "K%2 2 N B K/2 D"),)))
"""The reference implementation's cache, (2, 2, N, B, K/2, D): which of the pair, key or value, block, token, pair."""


@dataclass(frozen=True, eq=False)
class DifferentialPlan(VariantPlan):
    """A step of a differential layer.

    Attributes:
        plans: of its passes; two passes over halves of the keys share one.
        halves: it is two passes over halves of the keys.
    """

    plans: tuple[Plan, ...] = ()
    halves: bool = False


_MANY_TOKENS = 8
"""New tokens per sequence from which on arithmetic costs more than reading the cache does."""
_VIEWS = "attn_dispatch.variants.differential"


class Differential(Variant):
    """A differential layer of a decoder.

    Attributes:
        spec: the layer as its user sees it: H query and K key/value heads of size D, both even.
        backend: who runs the passes.
        form: how it is computed: "one", "two" or "four" passes.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        lambda_full: float | npt.NDArray[np.float32],
        lambda_init: float,
        norm_weight: Array | None = None,
        *,
        norm_epsilon: float = 1e-5,
        form: Form | None = None,
        backend: str | Backend | None = None,
        **options: Unpack[Scales],
    ) -> None:
        """Choose a backend and a form.

        Args:
            spec: a decoder.
            lambda_full: lambda (`lambda_of` computes it), or one for each pair of heads, f32[H / 2].
            lambda_init: what lambda began with in training; the output is scaled by 1 minus it.
            norm_weight: f32[2D] of the RMS norm of each pair's output, of the library that q will be of (None: ones).
            norm_epsilon: of that norm.
            form: how to compute it (None: the first of one, two and four that the backend accepts).
            backend: the one to use (strict); None: chosen.
            options: k_scale, v_scale: see `ad.attention`.

        Raises:
            SpecError: odd heads, unequal head sizes, or a field that means nothing here.
            NoBackendError: no backend runs it.
        """
        refuse_fields("Differential", spec, "alibi", "sinks", "returns_lse")
        if (
            spec.kind != "decoder"
            or spec.num_heads % 2
            or spec.num_kv_heads % 2
            or spec.head_size != spec.value_head_size
        ):
            raise SpecError(
                f"Differential: kind={spec.kind}, heads={spec.num_heads}/{spec.num_kv_heads}, head sizes "
                f"{spec.head_size}/{spec.value_head_size}: needs a decoder with even numbers of heads of one size"
            )
        self.spec = spec
        self.lambda_init, self.norm_weight, self.norm_epsilon = lambda_init, norm_weight, norm_epsilon
        self._lambda = np.asarray(lambda_full, np.float64)
        if self._lambda.shape not in ((), (spec.num_heads // 2,)):
            raise SpecError(f"lambda_full has shape {self._lambda.shape}: one number, or one per pair of heads")
        scaled = is_scaled(options)
        forms: tuple[Form, ...] = ("one", "two", "four") if form is None else (form,)
        choices = tuple(self.passes(spec, f)[0] for f in forms)
        refuses = partial(self._refuses, forms)
        self.backend = choose([choices], backend, scaled=scaled, purpose="Differential", refuses=refuses)
        self.form: Form = next(f for f in forms if verdict_of(self.backend, self.passes(spec, f), scaled))
        self._attns = [attention(one, self.backend, **options) for one in self.passes(spec, self.form)]
        self._halves: Attention | None = None
        if self.form == "one" and verdict_of(self.backend, self.passes(spec, "two"), scaled):
            halves = attention(self.passes(spec, "two")[0], self.backend, **options)
            if not why_not(halves, lambda num_blocks: self._half_cache(self._attns[0].allocate(num_blocks), halves, 1)):
                self._halves = halves

    @staticmethod
    def passes(spec: AttentionSpec, form: Form) -> list[AttentionSpec]:
        """Return the different specs of a form's passes."""
        pairs = replace(spec, num_heads=spec.num_heads // 2, num_kv_heads=spec.num_kv_heads // 2)
        wide = 2 * spec.head_size
        if form == "one":
            return [replace(spec, num_kv_heads=spec.num_kv_heads // 2, head_size=wide, value_head_size=wide)]
        if form == "two":
            return [replace(pairs, value_head_size=wide)]
        return [pairs, replace(pairs, writes_kv=False)]

    @staticmethod
    def lambda_of(q1: Any, k1: Any, q2: Any, k2: Any, lambda_init: float) -> float:
        """Return lambda of a layer's four learned vectors: `exp(q1 . k1) - exp(q2 . k2) + lambda_init`."""
        first, second = (
            float(np.dot(np.asarray(a, np.float64), np.asarray(b, np.float64))) for a, b in ((q1, k1), (q2, k2))
        )
        return math.exp(first) - math.exp(second) + lambda_init

    @staticmethod
    def lambda_init_of(layer: int) -> float:
        """Return what the paper begins with in a layer, the first one being 1."""
        return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))

    def allocate(self, num_blocks: int, device: str | None = None) -> KVCache | PairCache:
        """Return a zeroed cache for one layer: a `KVCache` of pairs (form "one"), or one for each side of the pairs."""
        first = self._attns[0].allocate(num_blocks, device)
        return first if self.form == "one" else PairCache(first, self._attns[0].allocate(num_blocks, device))

    def plan(self, batch: AttentionMetadata) -> DifferentialPlan:
        """Prepare a step, once for all the layers of this spec and form; see `Attention.plan`."""
        halves = self._halves is not None and batch.num_tokens >= _MANY_TOKENS * batch.num_seqs
        attns = [self._halves] if halves and self._halves is not None else self._attns
        plans = tuple(attn.plan(batch) for attn in attns)
        highest = max(plan.highest_block for plan in plans)
        return DifferentialPlan(self.spec, batch.num_tokens, highest_block=highest, plans=plans, halves=halves)

    def _refuses(self, forms: tuple[Form, ...], backend: Backend) -> Refusal | None:
        """Refuse a backend whose cache layout cannot hold the pairs, before one is allocated."""
        for form in forms:
            spec = self.passes(self.spec, form)[0]
            if not backend.verdict(spec):
                continue
            layout = backend.layout(spec)
            try:
                layout.shapes(spec.geometry, 1)
            except CacheError as error:
                return Refusal("value_head_size", spec.value_head_size, str(error), "Use another backend")
            if form == "four" and layout.is_joint:  # which read the keys of one cache with the values of another
                accepts = f"in four passes layout {layout.name}, one array of keys and values, cannot be taken apart"
                return Refusal("head_size", self.spec.head_size, accepts, "Use another backend")
            return None
        return None

    def _half_cache(self, cache: KVCache, halves: Attention, side: int) -> KVCache | None:
        """Return the cache of pairs with one half of its keys, as a view; None where its layout has no such view."""
        arrays = key_and_value(cache)
        if arrays is None or self.backend.layout(halves.spec) != cache.layout:
            return None
        size = self.spec.head_size
        views = {"key": arrays[0][..., side * size : (side + 1) * size], "value": arrays[1]}
        return KVCache(cache.owner, halves.spec.geometry, cache.layout, cache.num_blocks, views, cache.device)

    def _attend(self, call: VariantCall) -> Array:
        """Run the passes: q and k in stripes of pairs; pair i's output, 2D wide, lies in heads 2i and 2i + 1."""
        plan, cache = call.plan, call.cache
        arrays = (call.queries[0], call.k, call.v)
        by_pairs = [None if x is None else x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2]) for x in arrays]
        if plan.halves and isinstance(cache, KVCache):
            assert self._halves is not None
            cache = self._halved(cache, self._halves)
        if isinstance(cache, PairCache):
            both = self._run_four if self.form == "four" else self._run_two
            first, second = both(plan.plans, by_pairs[0], by_pairs[1], by_pairs[2], cache)
        else:
            first, second = self._run_one(plan.plans, by_pairs[0], by_pairs[1], by_pairs[2], cache)
        result = self._difference(first, second, arrays[0])
        return result if call.out is None else put(call.out, None, result)

    def _check(self, call: VariantCall) -> None:
        spec = self.spec
        if call.return_lse:
            raise SpecError("Differential: the difference of two attentions has no log-sum-exp")
        if isinstance(call.cache, PairCache) == (self.form == "one"):
            raise CacheError(f"a layer of form {self.form!r} takes the cache that its own allocate() makes")
        check_plan(spec, call.plan, call.cache.num_blocks)
        arrays = [("q", call.queries[0], spec.num_heads), ("out", call.out, spec.num_heads)]
        for name, array, heads in (*arrays, ("k", call.k, spec.num_kv_heads), ("v", call.v, spec.num_kv_heads)):
            if array is not None and (len(array.shape) != 3 or tuple(array.shape[1:]) != (heads, spec.head_size)):
                raise ArrayError(f"{name} has shape {tuple(array.shape)}, expected [T, {heads}, {spec.head_size}]")

    def _run_one(self, plan: tuple[Plan, ...], q: Array, k: Array, v: Array, cache: KVCache) -> tuple[Array, Array]:
        """Return both maps' outputs, [T, H / 2, 2D] each; q, k and v are [T, pairs, 2, D]."""
        tokens, pairs, _, size = q.shape
        zeros = new(q, (tokens, pairs, 1, size))
        rows = concatenate([concatenate([q[:, :, :1], zeros], 3), concatenate([zeros, q[:, :, 1:]], 3)], 2).reshape(
            tokens, 2 * pairs, 2 * size
        )
        k, v = (None if x is None else x.reshape(x.shape[0], x.shape[1], 2 * size) for x in (k, v))
        out = self._attns[0].run(plan[0], rows, k, v, cache).reshape(tokens, pairs, 2, 2 * size)
        return out[:, :, 0], out[:, :, 1]

    def _run_two(self, plan: tuple[Plan, ...], q: Array, k: Array, v: Array, cache: PairCache) -> tuple[Array, Array]:
        attn, size = self._halves or self._attns[0], q.shape[3]
        values = None if v is None else v.reshape(v.shape[0], v.shape[1], 2 * size)
        first, second = (attn.run(plan[0], _half(q, i), _half(k, i), values, one) for i, one in enumerate(cache.caches))
        return first, second

    def _halved(self, cache: KVCache, halves: Attention) -> PairCache:
        """Return both halves of a cache of pairs, made once."""
        views: Any = cache.backend_state.get(_VIEWS)
        if views is None or any(views[0][name] is not array for name, array in cache.arrays.items()):
            first, second = (self._half_cache(cache, halves, side) for side in (0, 1))
            assert first is not None  # it was tried
            assert second is not None
            views = cache.backend_state[_VIEWS] = (dict(cache.arrays), PairCache(first, second))
        return views[1]  # type: ignore[no-any-return]

    def _run_four(self, plan: tuple[Plan, ...], q: Array, k: Array, v: Array, cache: PairCache) -> tuple[Array, Array]:
        writes, reads = self._attns
        same = [writes.run(plan[0], _half(q, i), _half(k, i), _half(v, i), one) for i, one in enumerate(cache.caches)]
        # Keys of one side with values of the other: everything has been written by now.
        other = [reads.run(plan[1], _half(q, i), None, None, one) for i, one in enumerate(cache.crossed())]
        return concatenate([same[0], other[0]], 2), concatenate([other[1], same[1]], 2)

    def _difference(self, first: Array, second: Array, q: Array) -> Array:
        """Return norm(first - lambda * second) * (1 - lambda_init) as [T, H, D], in q's type."""
        wide = "float64" if self.spec.dtype == "float64" else "float32"
        if self._lambda.shape:
            weight = put(new(q, self._lambda.shape, wide), None, _like(self._lambda, q))[None, :, None]
        else:
            weight = float(self._lambda)
        out = _cast(first, wide) - weight * _cast(second, wide)
        library = module_of(q)
        mean = library.einsum("tpd,tpd->tp", out, out) / out.shape[2]
        out = out * ((1.0 - self.lambda_init) / library.sqrt(mean + self.norm_epsilon))[..., None]
        if self.norm_weight is not None:
            out = out * _cast(self.norm_weight, wide)
        return _cast(out, self.spec.dtype).reshape(q.shape)

    def from_reference(self, array: Array) -> KVCache | PairCache:
        """Return a new cache with the contents of the reference implementation's, [2, 2, N, B, K / 2, D]."""
        key, value = DIFFERENTIAL.to_logical({"pages": array})
        num_blocks, heads, size, width = key.shape
        cache = self.allocate(num_blocks)
        sides = [x.reshape(num_blocks, heads // 2, 2, size, width) for x in (key, value)]
        wide_key, wide_value = (concatenate([x[:, :, 0], x[:, :, 1]], 3) for x in sides)
        if isinstance(cache, KVCache):
            _put(cache, wide_key, wide_value)
            return cache
        for i, one in enumerate(cache.caches):
            values = wide_value if self.form == "two" else sides[1][:, :, i]
            _put(one, sides[0][:, :, i], values)
        return cache

    def __repr__(self) -> str:
        return f"Differential({self.spec}, form={self.form!r}, backend={self.backend.name})"


def _put(cache: KVCache, key: Array, value: Array) -> None:
    """Write logical keys and values into a whole cache."""
    if library_of(key) != "jax":
        cache.layout.put_logical(cache.arrays, key, value)
        return
    arrays = {name: np.array(array) for name, array in cache.arrays.items()}  # JAX's own are not written
    cache.layout.put_logical(arrays, np.asarray(key), np.asarray(value))
    cache.arrays.update({name: as_library(array, "jax") for name, array in arrays.items()})


def reference_cache(array: Array, owner: Backend) -> KVCache:
    """Return the reference implementation's cache [2, 2, N, B, K / 2, D] as a `KVCache` of K heads, without a copy.

    Its `gather` and `to_layout` give the keys and values in the usual orders.
    """
    _, _, num_blocks, size, pairs, width = array.shape
    geometry = CacheGeometry(2 * pairs, width, width, size, dtype_name(array.dtype))
    return KVCache(owner, geometry, DIFFERENTIAL, num_blocks, {"pages": array})


def _half(x: Array, side: int) -> Array:
    """Return one side of the pairs of [T, pairs, 2, D], its numbers next to each other."""
    if x is None:
        return None
    picked = x[:, :, side]
    if library_of(picked) == "jax":
        return picked  # whose arrays have no strides
    return picked.contiguous() if library_of(picked) == "torch" else np.ascontiguousarray(picked)


def _cast(x: Array, dtype: str) -> Array:
    if dtype_name(x.dtype) == dtype:
        return x
    return x.to(getattr(module_of(x), dtype)) if library_of(x) == "torch" else x.astype(numpy_dtype(dtype))


def _like(x: npt.NDArray[np.float64], q: Array) -> Array:
    return module_of(q).asarray(x)
