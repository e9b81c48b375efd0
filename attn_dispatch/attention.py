"""`Attention`: one layer's spec on its backend. What a user calls; the last check before a vendor's kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from attn_dispatch import dispatch
from attn_dispatch.backend import Backend, Call, Plan, Verdict
from attn_dispatch.block_size import accepted_sizes, resolved
from attn_dispatch.contract import (
    Array,
    AttentionMetadata,
    AttentionSpec,
    BatchView,
    CacheLayout,
    KVCache,
    LayerParameters,
    layout_named,
)
from attn_dispatch.contract.adoption import adopt
from attn_dispatch.contract.array_checks import check_out, check_plain
from attn_dispatch.contract.arrays import as_library, empty_like, library_of
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.contract.gradient import without_gradient
from attn_dispatch.errors import ArrayError, BackendRefusedError, CacheError, MetadataError, PlanError, SpecError
from attn_dispatch.observe import log_plan, run_observer

__all__ = ["Attention", "attention"]

_WRITTEN = "attn_dispatch.attention.write"
"""Where a cache remembers the step that was written into it last."""


class Attention:
    """One layer: a spec, the backend that runs it, and what the layer owns.

    Attributes:
        spec: what the layer needs.
        backend: who runs it (equal to its name).
        parameters: the layer's slopes, sinks and scales.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: Backend,
        parameters: LayerParameters,
        requested: tuple[str | None, str] = (None, "the backend= argument"),
    ) -> None:
        self.spec = spec
        self._requested = requested
        self.backend = backend
        self.parameters = parameters
        self._name = backend.name
        self._libraries = frozenset(backend.capabilities.libraries)
        self._q_row = (spec.num_heads, spec.head_size)
        self._k_row = (spec.num_kv_heads, spec.head_size)
        self._v_row = (spec.num_kv_heads, spec.value_head_size)
        self._out_row = (spec.num_heads, spec.value_head_size)
        self._has_lse = spec.returns_lse

    @cached_property
    def explanation(self) -> dispatch.Explanation:
        """The verdict table of this layer's spec, asked when first wanted, and what decided when it was chosen."""
        table = dispatch.explain(self.spec, self.backend, scaled=self.parameters.scaled)
        return replace(table, requested=self._requested[0], source=self._requested[1])

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """Block sizes that this layer's backend accepts, the preferred first; `spec.block_size` is one of them."""
        return accepted_sizes(self.backend, self.spec)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What each candidate says of the spec, this layer's backend first."""
        return self.explanation.verdicts

    def allocate(self, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache for one layer, in this backend's layout.

        Args:
            num_blocks: N, 1 or more.
            device: where, as the backend's library names it (None: its default).

        Raises:
            CacheError: no blocks.
        """
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
            raise CacheError(f"num_blocks={num_blocks!r} must be a whole number, 1 or more")
        try:
            return self.backend.allocate(self.spec, num_blocks, device)
        except (MemoryError, OverflowError) as error:
            raise CacheError(f"num_blocks={num_blocks} of {self.spec.geometry} cannot be had: {error}") from error

    def adopt(self, key: Array, value: Array | None = None, *, layout: str | CacheLayout | None = None) -> KVCache:
        """Return a cache over memory that an engine owns: checked, not copied, not zeroed.

        What unused slots hold is then the engine's to answer for (clause 2: finite, unless the backend is `nan_safe`).

        Args:
            key: the array of keys in the layout's order, or the one array of a joint layout.
            value: the array of values (None: the layout is joint).
            layout: the order of their axes (None: this backend's).

        Raises:
            CacheError: another layout than the backend's, a shape, type, device or strides that would give wrong
                results or lose what is written.
        """
        expected = self.backend.layout(self.spec)
        actual = expected if layout is None else layout_named(layout) if isinstance(layout, str) else layout
        if actual != expected:
            raise CacheError(f"{self._name} reads layout {expected.name}, the arrays are in {actual.name}")
        names = [name for name, _ in actual.arrays]
        given = [array for array in (key, value) if array is not None]
        if len(given) != len(names) or actual.per_token_scales:
            raise CacheError(
                f"layout {actual.name} consists of {', '.join(names)}: it cannot be made of {len(given)} arrays"
            )
        arrays = dict(zip(names, given, strict=True))
        return adopt(self.backend, self.spec.geometry, actual, arrays, self.backend.capabilities.cache_views)

    def plan(self, metadata: AttentionMetadata) -> Plan:
        """Prepare a step, once for all the layers of this spec.

        Raises:
            MetadataError: the batch is not one that this kind of layer can have.
        """
        spec = self.spec
        view = metadata.view(spec.kind)
        if view.side.has_blocks and metadata.block_size != spec.block_size:
            raise MetadataError(f"the batch has block_size={metadata.block_size}, the layer {spec.block_size}")
        if not view.side.has_blocks and spec.kind != "encoder" and view.max_kv_len:
            raise MetadataError(f"a {spec.kind} layer reads a cache, but the batch has no block tables")
        if spec.causal and view.side.start_loc is not view.query_start_loc:
            self._check_positions(view)
        plan = self.backend.plan(spec, metadata)
        plan.backend = self.backend.name
        log_plan(plan.backend, plan)
        return plan

    def _check_positions(self, view: BatchView) -> None:
        """Refuse queries of a causal layer before the first key, of a batch that is not the sequences' own tokens."""
        short = (view.kv_lens < view.query_lens) & (view.kv_lens > 0)
        if short.any():
            s = int(np.argmax(short))
            raise MetadataError(
                f"sequence {s}: {int(view.query_lens[s])} queries over {int(view.kv_lens[s])} keys: the last query "
                "of a causal layer is at the last key, and so the first ones would be before the first"
            )

    def write(self, plan: Plan, k: Array, v: Array, cache: KVCache) -> None:
        """Write a step's new keys and values, and attend to nothing: for engines that have k and v before q.

        `run` with the same plan and cache is then given neither k nor v, and attends alone.

        Args:
            plan: of this step, from `plan`.
            k: [rows, K, D].
            v: [rows, K, Dv].
            cache: the layer's.

        Raises:
            ArrayError, CacheError, PlanError: before anything has been written.
        """
        spec = self.spec
        if not spec.writes_kv:
            raise PlanError(f"the layer reads another's cache (writes_kv=False): {spec}")
        self._check_plan(plan)
        layer = self._half(spec)
        half = plan.halves.get("write")
        if half is None:
            half = plan.halves["write"] = layer.plan(AttentionMetadata.write_only(plan.view.side))
        layer.run(half, empty_like(k, (0, *self._q_row)), k, v, cache)
        cache.backend_state[_WRITTEN] = plan

    def _half(self, spec: AttentionSpec) -> Attention:
        """Return the plain decoder layer that writes this one's cache."""
        plain = replace(
            spec, kind="decoder", causal=True, window=(-1, -1), logits_soft_cap=None, alibi=False, sinks=False,
            returns_lse=False,
        )  # fmt: skip
        scales = LayerParameters(plain, k_scale=self.parameters.k_scale, v_scale=self.parameters.v_scale)
        layer: Attention = self.parameters.memoize(_WRITTEN, lambda: Attention(plain, self.backend, scales))
        return layer

    def _read_plan(self, plan: Plan) -> Plan:
        """Return the plan of a step whose keys and values `write` has written."""
        half = plan.halves.get("read")
        if half is None:
            reads = replace(self.spec, writes_kv=False)
            half = plan.halves["read"] = self.backend.plan(reads, AttentionMetadata.of_view(plan.view))
            half.backend = self._name
        return half

    def run(
        self,
        plan: Plan,
        q: Array,
        k: Array | None = None,
        v: Array | None = None,
        cache: KVCache | None = None,
        out: Array | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Write the new keys and values into their slots, then attend.

        Args:
            plan: of this step, from `plan` of a layer with an equal spec and the same backend.
            q: [T, H, D].
            k: [T, K, D]. (Of a cross layer: the encoder's new tokens.) A layer with `writes_kv=False` needs none, and
                does not look at them; nor does a step that `write` has written into this cache.
            v: [T, K, Dv], likewise. Finite: a NaN may reach earlier rows of its own sequence (masked by a product
                with 0), and reaches no other sequence.
            cache: the layer's cache. None only for an encoder layer.
            out: [T, H, Dv] to write into, of the library that q is of.
            return_lse: also return the log-sum-exp, natural log, f32[T, H]; it includes the sink.

        Returns:
            [T, H, Dv], or that and the LSE, of the library that q is of.

        Raises:
            ArrayError, CacheError, PlanError: before anything has been written.
        """
        spec = self.spec
        if (plan.spec is not spec and plan.spec != spec) or plan.backend != self._name:
            self._check_plan(plan)
        try:
            library = library_of(q)
        except ArrayError as error:
            raise ArrayError(f"q: {error}") from None
        self._check_array("q", q, (plan.num_tokens, *self._q_row), library)
        if k is not None and v is not None:
            self._check_array("k", k, (plan.num_new, *self._k_row), library)
            self._check_array("v", v, (plan.num_new, *self._v_row), library)
            if not spec.writes_kv and cache is not None:
                k = v = None  # the other layer has written its own
            elif cache is not None:
                cache.check_writable()
        elif k is None and v is None and cache is not None and cache.backend_state.get(_WRITTEN) is plan:
            plan = self._read_plan(plan)
        else:
            self._check_nothing_to_write(plan, k, v)
        if out is not None:
            self._check_array("out", out, (plan.num_tokens, *self._out_row), library)
            check_out(out, (("q", q), ("k", k), ("v", v)), library)
        if cache is not None:
            if cache.geometry != spec.geometry:
                raise CacheError(f"the cache is {cache!r}; the layer needs {spec.geometry}")
            if plan.highest_block >= cache.num_blocks:
                plan.view.side.check_fits(cache.num_blocks)
            if not plan.view.side.has_blocks and plan.view.max_kv_len:
                raise CacheError("a cache was given, but the batch has no block tables")
            layout = self.backend.layout(spec) if cache.owner is not self.backend else None
            if layout is not None and cache.layout != layout:
                raise CacheError(
                    f"{self.backend.name} reads layout {layout.name}, the cache of {cache.owner.name} has "
                    f"{cache.layout.name}: convert it with cache.to_layout({layout.name!r})"
                )
        elif spec.kind != "encoder":
            raise CacheError(f"a {spec.kind} layer needs its cache; allocate(num_blocks) makes one")
        if return_lse and not self._has_lse:
            self._require_lse()
        call = Call(plan, q, k, v, cache, self.parameters, out, return_lse)
        if library == "torch":
            devices = {x.device for x in (q, k, v, out) if x is not None}
            if len(devices) > 1:
                where = ", ".join(f"{n} on {x.device}" for n, x in zip("qkv", (q, k, v), strict=True) if x is not None)
                where += "" if out is None else f", out on {out.device}"
                raise ArrayError(f"a step's arrays must be on one device: {where}")
            if q.requires_grad or (k is not None and (k.requires_grad or v.requires_grad)):  # type: ignore[union-attr]
                return self._run_detached(call)
        if library in self._libraries:
            return self._execute(call)
        return self._run_exchanged(call, library)

    def _execute(self, call: Call) -> Any:
        """Run, in a profiler's range and counted where somebody looks."""
        observer = run_observer()
        if observer is None:
            return self.backend.run(call)
        with observer(self.backend.name, call.plan):
            return self.backend.run(call)

    def _run_detached(self, call: Call) -> Any:
        """Run on tensors that are part of a graph: on their values, and whoever asks for a gradient is told."""
        inputs = (call.q, call.k, call.v)
        call.q, call.k, call.v = (None if x is None else x.detach() for x in inputs)
        result = self._execute(call) if "torch" in self._libraries else self._run_exchanged(call, "torch")
        return without_gradient(result, inputs)

    def _check_plan(self, plan: Plan) -> None:
        """Refuse another layer's or backend's plan; one of the backend's own (fixed plans) need not say whose it is."""
        if plan.spec != self.spec:
            raise PlanError(f"the plan is for {plan.spec}; this layer is {self.spec}")
        if plan.backend not in ("", self._name):
            raise PlanError(
                f"the plan was made by {plan.backend}, this layer runs on {self._name}: plan with this layer"
            )

    def _run_exchanged(self, call: Call, library: str) -> Any:
        """Run on the same memory as arrays of a library that the backend computes on."""
        target, out = self.backend.capabilities.libraries[0], call.out
        for name in ("q", "k", "v", "out"):
            array = getattr(call, name)
            if array is not None:
                setattr(call, name, as_library(array, target))
        result = self._execute(call)
        if call.return_lse:
            return (as_library(result[0], library) if out is None else out), as_library(result[1], library)
        return as_library(result, library) if out is None else out

    def _check_array(self, name: str, array: Array, shape: tuple[int, ...], library: str) -> None:
        if array.shape != shape:
            raise ArrayError(f"{name} has shape {tuple(array.shape)}, expected {shape}")
        try:
            dtype, whose = dtype_name(array.dtype), library_of(array)
        except (SpecError, ArrayError) as error:
            raise ArrayError(f"{name}: {error}") from None
        if dtype != self.spec.dtype:
            raise ArrayError(f"{name} is {dtype}, the layer's dtype is {self.spec.dtype}")
        if whose != library:
            raise ArrayError(f"{name} is an array of {whose}, q of {library}: give both of one library")
        if library == "torch":
            check_plain(name, array)

    def _check_nothing_to_write(self, plan: Plan, k: Array | None, v: Array | None) -> None:
        if (k is None) != (v is None):
            raise ArrayError("k and v must both be given: one of them is None")
        if self.spec.kind == "encoder" and not plan.view.side.has_blocks:
            raise ArrayError("an encoder layer without a cache attends to k and v: both must be given")
        if self.spec.writes_kv and plan.view.side.num_written:
            raise ArrayError(
                f"this step writes {plan.view.side.num_written} tokens: k and v must be given "
                "(a layer that shares another's cache says writes_kv=False)"
            )

    def _require_lse(self) -> None:
        verdict = self.backend.verdict(replace(self.spec, returns_lse=True))
        if not verdict:
            raise BackendRefusedError(f"return_lse=True: {self.backend.name} says no: {verdict}")
        self._has_lse = True

    def __repr__(self) -> str:
        return f"Attention({self.spec}, backend={self.backend.name})"


def attention(
    spec: AttentionSpec,
    backend: str | Backend | None = None,
    *,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Attention:
    """Choose a backend for a layer.

    Args:
        spec: what the layer needs.
        backend: the one to use (strict), by name or as an object; None: chosen.
        alibi_slopes: f32[H], with `spec.alibi`.
        sinks: f32[H], with `spec.sinks`.
        k_scale: per-tensor scale of a quantised cache's keys: stored = round(x / scale).
        v_scale: likewise for its values.

    Raises:
        NoBackendError, BackendRefusedError, UnknownBackendError, EnvironmentVariableError: see `choose`.
        SpecError: a parameter does not fit the spec.
    """
    parameters = LayerParameters(spec, alibi_slopes=alibi_slopes, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    selection = dispatch.select(spec, backend, scaled=parameters.scaled)
    spec = resolved(selection.backend, spec)
    return Attention(spec, selection.backend, parameters, (selection.requested, selection.source))
