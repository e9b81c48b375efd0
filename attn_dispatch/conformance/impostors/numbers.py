"""Impostors that compute other numbers: order, scale, softmax, precision, heads, the LSE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from attn_dispatch.backend import Call
from attn_dispatch.conformance.impostors.honest import Floats, Honest, computing, impostor
from attn_dispatch.contract import AttentionSpec, LayerParameters

impostor("the soft-cap dropped", "soft-cap float32", "soft-cap of 30", "encoder soft-cap")(
    computing(lambda spec: replace(spec, logits_soft_cap=None))
)
impostor("soft-caps of 20 and more dropped", "soft-cap of 30", "soft-cap of 50")(
    computing(lambda spec: replace(spec, logits_soft_cap=None) if (spec.logits_soft_cap or 0) >= 20 else spec)
)
impostor("the cap before the scale", "soft-cap float32", "everything")(
    computing(
        lambda spec: replace(spec, logits_soft_cap=spec.logits_soft_cap / spec.scale) if spec.logits_soft_cap else spec
    )
)
impostor("the scale always 1 / sqrt(D)", "scale 0.3", "scale 1 MQA 256")(
    computing(lambda spec: replace(spec, scale=spec.head_size**-0.5))
)
impostor("the scale forgotten", "decode float32", "cross, later step bfloat16")(
    computing(lambda spec: replace(spec, scale=1.0))
)
impostor("the scale of the padded head size", "head size 80", "head size 33")(
    computing(lambda spec: replace(spec, scale=(-(-spec.head_size // 64) * 64) ** -0.5))
)


@impostor("ALiBi before the cap", "soft-cap and ALiBi", "everything")
class BiasFirst(Honest):
    """tokamax's order."""

    def scores(self, spec: AttentionSpec, layer: LayerParameters, product: Floats, distance: Floats) -> Floats:
        scores = super().scores(replace(spec, logits_soft_cap=None), layer, product, distance)
        cap = spec.logits_soft_cap
        return scores if cap is None else (cap * np.tanh(scores / cap)).astype(scores.dtype)


@impostor("softmax without its maximum", "large scores float32", "scores around 150", "scores around -150")
class NoMaximum(Honest):
    """exp() of the score itself."""

    def softmax(self, scores: Floats, sinks: Floats | None) -> tuple[Floats, Floats]:
        with np.errstate(all="ignore"):
            weights = np.exp(scores)
            total = weights.sum(axis=2, keepdims=True)
            if sinks is not None:
                total = total + np.exp(sinks[:, None, None])
            return weights / np.where(total == 0, 1, total), np.log(total)[:, :, 0]


@impostor("sinks ignored", "sinks float32", "cross, sinks", "sinks around 26 without LSE")
class NoSinks(Honest):
    """The denominator has keys alone."""

    def sinks(self, layer: LayerParameters) -> Floats | None:
        return None


@impostor("sinks of 20 and more cut off", "sinks around 26", "sinks around 26 without LSE")
class CutSinks(Honest):
    """Clamped, lest they overflow."""

    def sinks(self, layer: LayerParameters) -> Floats | None:
        return None if layer.sinks is None else np.minimum(layer.sinks, 20)


@impostor("the first head's sink for all", "sinks float32", "sinks, heads 9/3")
class OneSink(Honest):
    """A scalar where there are H."""

    def sinks(self, layer: LayerParameters) -> Floats | None:
        return None if layer.sinks is None else np.full_like(layer.sinks, layer.sinks[0])


@impostor("ALiBi ignored", "ALiBi float32", "encoder ALiBi")
class NoSlopes(Honest):
    """No bias."""

    def slopes(self, layer: LayerParameters) -> Floats | None:
        return None


@impostor("the usual slopes instead of the layer's", "ALiBi float32", "ALiBi, heads 12/4")
class UsualSlopes(Honest):
    """2^(-8i/H), whatever the layer has."""

    def slopes(self, layer: LayerParameters) -> Floats | None:
        if layer.alibi_slopes is None:
            return None
        heads = len(layer.alibi_slopes)
        return (2.0 ** (-8 * (np.arange(heads) + 1) / heads)).astype(np.float32)


@impostor("slopes wrong for odd numbers of heads", "ALiBi, heads 5/5", "ALiBi, heads 7/1")
class OddSlopes(Honest):
    """The last head of an odd number has the slope of the one before."""

    def slopes(self, layer: LayerParameters) -> Floats | None:
        slopes = layer.alibi_slopes
        if slopes is None or len(slopes) % 2 == 0:
            return slopes
        return np.concatenate([slopes[:-1], slopes[-2:-1]])


@impostor("ALiBi with a sign on the right", "encoder ALiBi")
class SignedDistance(Honest):
    """No absolute value: what lies ahead is favoured."""

    def scores(self, spec: AttentionSpec, layer: LayerParameters, product: Floats, distance: Floats) -> Floats:
        scores = super().scores(spec, layer, product, distance)
        slopes = layer.alibi_slopes
        ahead = np.minimum(distance, 0)
        return scores if slopes is None else scores - (2 * slopes[:, None, None] * ahead).astype(scores.dtype)


def _heads(name: str, change: Any, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class Heads(Honest):
        def heads(self, spec: AttentionSpec) -> Any:
            return np.minimum(change(spec, np.arange(spec.num_heads)), spec.num_kv_heads - 1)


_heads("query heads take key heads in turn", lambda spec, h: h % spec.num_kv_heads, "heads 8/2", "decode float32")
_heads("groups of three taken for four", lambda spec, h: h // {3: 4}.get(spec.group_size, spec.group_size), "heads 9/3")
_heads(
    "groups rounded up to a power of two",
    lambda spec, h: h // (1 << (spec.group_size - 1).bit_length()),
    "heads 6/2", "heads 12/2", "decode, heads 10/2", "decode, heads 14/2",
)  # fmt: skip
_heads("groups of more than eight cut", lambda spec, h: h // min(spec.group_size, 8), "heads 24/2")
_heads("key heads after the eighth not read", lambda spec, h: np.minimum(h // spec.group_size, 7), "heads 10/10")
_heads("all heads read the first key head", lambda spec, h: 0 * h, "heads 4/4", "heads 32/8")


@impostor("heads in another order", "decode float32", "encoder float32")
class OtherOrder(Honest):
    """Reversed."""

    def queries(self, q: Floats) -> Floats:
        return q[:, ::-1]


@impostor("float64 computed in float32", "mixed float64", "window float64", "encoder float64")
class Single(Honest):
    """Whatever comes in."""

    def sequence(
        self, spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
    ) -> tuple[Floats, Floats]:
        q, key, value = (x.astype(np.float32) for x in (q, key, value))
        return super().sequence(spec, q, key, value, layer)


@impostor("float32 computed in float16", "decode float32", "mixed float64")
class Half(Honest):
    """Tensor cores with the wrong flag."""

    def sequence(
        self, spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
    ) -> tuple[Floats, Floats]:
        if spec.dtype in ("float32", "float64"):
            q, key, value = (x.astype(np.float16).astype(np.float32) for x in (q, key, value))
        return super().sequence(spec, q, key, value, layer)


@impostor("weights rounded to eight bits", "decode bfloat16", "mixed float16")
class EightBits(Honest):
    """fp8 in the second product."""

    def softmax(self, scores: Floats, sinks: Floats | None) -> tuple[Floats, Floats]:
        weights, lse = super().softmax(scores, sinks)
        return weights.astype(ml_dtypes.float8_e4m3fn).astype(scores.dtype), lse


@impostor("one per cent off", "decode float32", "context of 33,000")
class Roughly(Honest):
    """A wrong constant."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        out *= out.dtype.type(1.01)
        return super().returned(call, out, lse)


@impostor(
    "nothing computed", "decode float32", "context of 33,000", "context of 4,200", "300 decodes", "decode bfloat16"
)
class Zeros(Honest):
    """Zeros."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        out[...] = 0
        return super().returned(call, out, lse)


@impostor("NaN where there is no key", "padding sequence", "cross, an empty encoder")
class NotANumber(Honest):
    """0 / 0."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        out[np.isneginf(lse)] = np.nan
        return super().returned(call, out, lse)


def _lse(name: str, change: Any, *caught_by: str) -> None:
    @impostor(name, *caught_by)
    class OtherLse(Honest):
        def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
            with np.errstate(all="ignore"):
                return super().returned(call, out, change(lse))


_lse("an LSE in base 2", lambda lse: lse / np.float32(np.log(2)), "LSE float32", "the LSE on demand")
_lse("an LSE in float64", lambda lse: lse.astype(np.float64), "LSE float32")
_lse("an LSE of 0 where there is no key", lambda lse: np.where(np.isinf(lse), np.float32(0), lse), "padding sequence")
_lse("an LSE of heads by rows", lambda lse: np.ascontiguousarray(lse.T), "LSE float32")
_lse("an LSE without its exponent", lambda lse: np.exp(lse), "LSE bfloat16")


@impostor("an LSE without the sink", "sinks and LSE", "everything", "sinks around 26")
class LseOfKeys(Honest):
    """The kernel's own, before the sink is taken in."""

    def softmax(self, scores: Floats, sinks: Floats | None) -> tuple[Floats, Floats]:
        return super().softmax(scores, sinks)[0], super().softmax(scores, None)[1]


@impostor("an output in float64", "decode float32", "encoder float32")
class Wide(Honest):
    """As the accumulator is."""

    def returned(self, call: Call, out: Floats, lse: Floats) -> Any:
        return super().returned(call, out.astype(np.float64), lse)


@impostor("values as wide as keys", "Dv != D float32", "head sizes 64/128")
class SameSizes(Honest):
    """Columns of the values after D are left 0, or taken from elsewhere."""

    def sequence(
        self, spec: AttentionSpec, q: Floats, key: Floats, value: Floats, layer: LayerParameters
    ) -> tuple[Floats, Floats]:
        out, lse = super().sequence(spec, q, key, value, layer)
        out[..., spec.head_size :] = 0
        return (out if spec.value_head_size >= spec.head_size else out[..., ::-1]), lse
