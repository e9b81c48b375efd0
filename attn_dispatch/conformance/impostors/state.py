"""Impostors that remember what they must not, or are not what the protocol asks for."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from attn_dispatch.backend import Call, Plan, Refusal, Verdict
from attn_dispatch.conformance.impostors.honest import FixedPlan, Floats, Honest, impostor
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, LayerParameters
from attn_dispatch.merge import merge_states


@impostor("the first layer's sinks for all of a plan", "two layers and two caches on one plan")
class FirstSinks(Honest):
    """Kept with the plan."""

    def run(self, call: Call) -> Any:
        kept: dict[int, LayerParameters] = self.__dict__.setdefault("kept", {})
        self.__dict__.setdefault("plans", []).append(call.plan)  # ids stay unique
        call.layer = kept.setdefault(id(call.plan), call.layer)
        return super().run(call)


@impostor("the first cache for all of a plan", "two layers and two caches on one plan")
class FirstCache(Honest):
    """Bound at the first run."""

    def run(self, call: Call) -> Any:
        kept: dict[int, Any] = self.__dict__.setdefault("kept", {})
        self.__dict__.setdefault("plans", []).append(call.plan)
        call.cache = kept.setdefault(id(call.plan), call.cache)
        return super().run(call)


@impostor("results in one buffer that is used again", "two layers and two caches on one plan")
class OneBuffer(Honest):
    """Faster, until somebody keeps a result."""

    def output(self, call: Call, spec: AttentionSpec) -> Floats:
        if call.out is not None:
            return super().output(call, spec)
        shape = (call.plan.num_tokens, spec.num_heads, spec.value_head_size)
        buffers: dict[Any, Floats] = self.__dict__.setdefault("buffers", {})
        return buffers.setdefault((shape, str(call.q.dtype)), np.empty(shape, call.q.dtype))


@impostor("a plan that can be run once", "one plan, run again", "two layers and two caches on one plan")
class Once(Honest):
    """Its second run finds nothing to do."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        ran: list[Plan] = self.__dict__.setdefault("ran", [])
        if any(plan is call.plan for plan in ran):
            out[...] = 0
        ran.append(call.plan)
        return super().returned(call, out, lse)


@impostor("the last plan made is the one that runs", "plans run in another order")
class LastPlan(Honest):
    """Global state between plan and run."""

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        self.last = super().plan(spec, metadata)
        return self.last

    def run(self, call: Call) -> Any:
        if call.plan.num_tokens == self.last.num_tokens or call.plan is self.last:
            call.plan = self.last
            return super().run(call)
        result = super().run(call)
        out = result[0] if isinstance(result, tuple) else result
        out[...] = 0
        return result


@impostor("one scratch array for all threads", "four threads")
class Scratch(Honest):
    """Another thread's numbers."""

    def queries(self, q: Floats) -> Floats:
        self.scratch = np.array(q)
        time.sleep(0.002)
        return self.scratch if self.scratch.shape == q.shape else q


@impostor("a fixed plan that is not renewed", "fixed plans")
class NotRenewed(Honest):
    """It stays what it was."""

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> Plan:
        class Stays(FixedPlan):
            def renew(self, metadata: AttentionMetadata) -> None:
                pass

        return Stays(spec=spec, view=metadata.view(spec.kind), max_seq_len=max_seq_len)


@impostor("a fixed plan that takes any batch", "fixed plans")
class TakesAny(Honest):
    """It checks nothing."""

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> Plan:
        class Any_(FixedPlan):
            def renew(self, metadata: AttentionMetadata) -> None:
                self.view = metadata.view(self.spec.kind)
                self.highest_block = self.view.side.highest_block

        return Any_(spec=spec, view=metadata.view(spec.kind), max_seq_len=max_seq_len)


@impostor("fixed plans declared and not written", "fixed plans")
class NoFixedPlans(Honest):
    """The default raises."""

    fixed_plan = Honest.__mro__[1].fixed_plan  # type: ignore[attr-defined]


def _merging(name: str, merge: Any, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Merges(Honest):
        def merge_states(self, states: Any) -> Any:
            return merge(list(states))


def _nan(states: Any) -> Any:
    return merge_states(
        [(np.where(np.isinf(lse)[..., None], np.nan, out).astype(out.dtype), lse) for out, lse in states]
    )


_merging(
    "merging in base 2",
    lambda states: merge_states([(out, lse * np.float32(np.log(2))) for out, lse in states]),
    "merging 2 parts, float32", "merging 5 parts, bfloat16",
)  # fmt: skip
_merging(
    "merging without the last part", lambda states: merge_states(states[:-1] or states), "merging 2 parts, float32"
)
_merging("merging empty rows to NaN", _nan, "merging 2 parts, float32")
_merging(
    "merging by a plain mean",
    lambda states: (sum(out for out, _ in states) / out_dtype(states, len(states)), merge_states(states)[1]),
    "merging 2 parts, float32", "merging 5 parts, float32",
)  # fmt: skip


def out_dtype(states: Any, number: int) -> Any:
    """Return a number in the outputs' type."""
    return states[0][0].dtype.type(number)


@impostor("a yes to everything", "uint4 cache float32", "uint8 cache bfloat16")
class Yes(Honest):
    """It has no such layout."""

    def verdict(self, spec: AttentionSpec) -> Verdict:
        return self.accept()


@impostor("another verdict each time", "verdicts name fields")
class Moody(Honest):
    """Who asks twice gets two answers."""

    def verdict(self, spec: AttentionSpec) -> Verdict:
        self.asked = getattr(self, "asked", 0) + 1
        return super().verdict(spec) if self.asked % 2 else self.refuse(Refusal("dtype", spec.dtype, "another"))


@impostor("a refusal that names no field", "verdicts name fields")
class NoField(Honest):
    """Of something that is no field of a spec."""

    def verdict(self, spec: AttentionSpec) -> Verdict:
        return self.refuse(Refusal("mood", 1, "another")) if spec.sinks else super().verdict(spec)


@impostor("a refusal that does not say what is accepted", "verdicts name fields")
class NoReason(Honest):
    """No."""

    def verdict(self, spec: AttentionSpec) -> Verdict:
        return self.refuse(Refusal("sinks", True, "")) if spec.sinks else super().verdict(spec)


@impostor("no capabilities", "decode float32", "verdicts name fields")
class NoCapabilities(Honest):
    """Forgotten."""

    capabilities = None  # type: ignore[assignment]


@impostor("a plan that is a dict", "decode float32")
class DictPlan(Honest):
    """Not a Plan."""

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Any:
        return {"spec": spec, "view": metadata.view(spec.kind)}


@impostor("no LSE although it was asked for", "LSE float32", "the LSE on demand")
class NoLse(Honest):
    """The output alone."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        return out if call.out is None else call.out


@impostor("an LSE although nobody asked", "decode float32")
class AlwaysLse(Honest):
    """A pair, always."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        return out, lse


@impostor("an output without its last rows", "prefill float32", "padding sequence")
class Short(Honest):
    """One row less."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        return super().returned(call, out[:-1] if len(out) > 1 else out, lse)


@impostor("wrong only the first time", "decode float32", "one plan, run again")
class Cold(Honest):
    """Before it is warm."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        warm: set[Any] = self.__dict__.setdefault("warm", set())
        key = (call.plan.num_tokens, call.plan.spec)
        if key not in warm:
            out[...] = 0
        warm.add(key)
        return super().returned(call, out, lse)


@impostor("keys of a cross layer are written in every step", "cross, later step float32")
class CrossAgain(Honest):
    """The decoder's own tokens, into the encoder's blocks."""

    def run(self, call: Call) -> Any:
        if call.plan.spec.kind == "cross" and call.k is None and call.cache is not None:
            for array in call.cache.arrays.values():
                array[int(call.plan.view.side.table[0, 0])] += array.dtype.type(1)
        return super().run(call)


@impostor("a layer that shares a cache writes into it", "shared cache")
class Writes(Honest):
    """writes_kv is not looked at."""

    def run(self, call: Call) -> Any:
        if not call.plan.spec.writes_kv and call.cache is not None:
            call.cache.arrays["key"][int(call.plan.view.side.table[0, 0])] = 0
        return super().run(call)


@impostor("a shared prefix read by the first sequence alone", "a prefix of whole blocks is shared")
class PrefixOnce(Honest):
    """A block that was read is not read again."""

    def read(self, blocks: Floats, view: Any, s: int, scale: float) -> Floats:
        tokens = super().read(blocks, view, s, scale)
        size = view.side.block_size
        seen = {int(b) for t in range(s) for b in self.table(view, t)}
        for i, block in enumerate(self.table(view, s)):
            if int(block) in seen:
                tokens[i * size : (i + 1) * size] = 0
        return tokens


@impostor("the second of two equal layers computes the first's scale", "two layers and two caches on one plan")
class FirstScales(Honest):
    """Scales kept by spec."""

    def scales(self, spec: AttentionSpec, layer: LayerParameters) -> tuple[float, float]:
        kept: dict[AttentionSpec, tuple[float, float]] = self.__dict__.setdefault("scales_kept", {})
        return kept.setdefault(spec, super().scales(spec, layer))


@impostor("without the LSE another result", "decode float32")
class WithoutLse(Honest):
    """Two kernels; the one without LSE is wrong."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        if not call.return_lse:
            out *= out.dtype.type(0.5)
        return super().returned(call, out, lse)


def refuses_everything() -> Honest:
    """Return a backend that is available and accepts no layer: the whole kit must fail, though no check does."""

    class Refuses(Honest):
        def verdict(self, spec: AttentionSpec) -> Verdict:
            return self.refuse(Refusal("dtype", spec.dtype, "something else"))

    return Refuses("refuses everything")
