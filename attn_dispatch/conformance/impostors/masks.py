"""Impostors whose mask is wrong: windows, causality, and where kernels stop at a size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from attn_dispatch.backend import Call, Plan
from attn_dispatch.conformance.impostors.honest import Floats, Honest, computing, impostor
from attn_dispatch.contract import AttentionSpec, BatchView, LayerParameters


def _window(change: Any) -> Any:
    def changed(spec: AttentionSpec) -> AttentionSpec:
        left, right = spec.window
        return replace(spec, window=change(left, right)) if left >= 0 or right >= 0 else spec

    return computing(changed)


def _dropped_if(large: Any) -> Any:
    return _window(lambda left, right: (-1, right if right > 0 else -1) if large(left) else (left, right))


impostor("a window one token wider", "window of 33", "window of 64", "encoder window")(
    _window(lambda left, right: (left + 1, right))
)
impostor("a window one token narrower", "window of 33", "window of 256")(
    _window(lambda left, right: (max(left - 1, 0), right))
)
impostor("windows dropped", "window of 2", "window float32")(_dropped_if(lambda left: True))
impostor("windows of more than 64 tokens dropped", "window of 100", "window of 128")(
    _dropped_if(lambda left: left > 63)
)
impostor("windows of more than 2,048 tokens dropped", "window of 2,101")(_dropped_if(lambda left: left > 2048))
impostor("a window of one token taken for none", "window of 1", "window of 1, long decode")(
    _dropped_if(lambda left: left == 0)
)
impostor("the right side of a window ignored", "encoder window")(_window(lambda left, right: (left, -1)))
impostor("the right side one token wider", "encoder window", "encoder window, wide")(
    _window(lambda left, right: (left, right + 1 if right > 0 else right))
)
impostor("encoders are causal", "encoder float32")(
    computing(lambda spec: replace(spec, causal=True) if spec.kind == "encoder" else spec)
)
impostor("decoders are always causal", "non-causal float32")(
    computing(lambda spec: replace(spec, causal=True) if spec.kind == "decoder" else spec)
)
impostor("causality ignored", "prefill float32", "mixed bfloat16")(
    computing(lambda spec: replace(spec, causal=False, window=(spec.window[0], -1)))
)


@impostor("causality aligned to the top left", "chunked prefill float32", "speculative verify")
class TopLeft(Honest):
    """A chunk's queries take themselves for the sequence's first."""

    def first(self, n: int, m: int) -> int:
        return 0 if n > 1 else m - n


@impostor("several tokens of a decode see each other", "speculative verify")
class FewAreFree(Honest):
    """No mask for steps of up to four tokens."""

    def visible(self, spec: AttentionSpec, ahead: Any) -> Any:
        return ahead < 1000 if 1 < len(ahead) <= 4 else super().visible(spec, ahead)


@impostor("windows ignored in decode", "window of 33, long decode", "window of 2,101")
class DecodeWithoutWindow(Honest):
    """Two kernels, of which one knows windows."""

    def visible(self, spec: AttentionSpec, ahead: Any) -> Any:
        return super().visible(replace(spec, window=(-1, -1)) if len(ahead) <= 3 and spec.causal else spec, ahead)


@impostor("a query does not see itself", "decode float32", "chunked prefill float16")
class NotItself(Honest):
    """An off-by-one in the causal mask."""

    def visible(self, spec: AttentionSpec, ahead: Any) -> Any:
        return super().visible(spec, ahead + 1 if spec.causal else ahead)


@impostor("only the context is seen", "chunked prefill float32")
class ContextOnly(Honest):
    """A chunk's own tokens are masked."""

    def visible(self, spec: AttentionSpec, ahead: Any) -> Any:
        seen = super().visible(spec, ahead)
        n, m = ahead.shape
        if n > 1 and m > n:
            seen[:, m - n :] = False
        return seen


def _longest(limit: int, name: str, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Cut(Honest):
        def length(self, view: BatchView, s: int) -> int:
            return min(super().length(view, s), limit)


_longest(701, "keys beyond 701 are not read", "context of 1,500")
_longest(4096, "keys beyond 4,096 are not read", "context of 4,200")
_longest(32768, "keys beyond 32,768 are not read", "context of 33,000")


def _most_rows(limit: int, name: str, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Stops(Honest):
        def sequence(
            self, spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
        ) -> tuple[Floats, Floats]:
            out, lse = super().sequence(spec, q, key, value, layer)
            out[limit:] = 0
            return out, lse


_most_rows(70, "new tokens after the 70th are not computed", "prefill of 130")
_most_rows(512, "new tokens after the 512th are not computed", "prefill of 600", "chunk of 520 after 300")


def _most_sequences(limit: int, name: str, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Stops(Honest):
        def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
            starts = call.plan.view.query_start_loc
            if len(starts) > limit:
                out[starts[limit] :] = 0
            return super().returned(call, out, lse)


_most_sequences(32, "sequences after the 32nd are not computed", "40 decodes")
_most_sequences(256, "sequences after the 256th are not computed", "300 decodes", "280 short prefills")


@impostor("an idle sequence shifts those behind it", "a sequence without new tokens")
class IdleShifts(Honest):
    """Sequences without new tokens are left out of the block tables, not of the rows."""

    def table(self, view: BatchView, s: int) -> Any:
        busy = np.flatnonzero(view.query_lens == 0)
        return super().table(view, max(s - int((busy < s).sum()), 0))


@impostor("a plan made for the longest query alone", "mixed float32", "decodes first")
class OneLength(Honest):
    """Every sequence is taken to have as many new tokens as the first."""

    def slots(self, plan: Plan) -> Any:
        slots = np.array(super().slots(plan))
        lens = plan.view.query_lens
        if len(lens) and lens.min() != lens.max():
            slots[int(lens[0]) * len(lens) :] = -1
        return slots
