"""The table of named cases: one list that serves the kit, `verify`'s support table and the benchmarks.

A case is a spec and the lengths of a batch. What a backend cannot run it refuses by verdict; nothing here names a
vendor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import is_quantised

__all__ = ["CASES", "FEATURES", "Case", "mutations"]


@dataclass(frozen=True)
class Case:
    """One problem that every backend computes or refuses.

    Attributes:
        name: unique.
        feature: its column in the support table.
        spec: the layer.
        context: tokens that each sequence has in the cache before the step.
        new: tokens that the step adds to each.
        encoder: of a cross layer, encoder tokens of each sequence; `context` > 0 says they are in the cache already.
        padding: the batch ends with a padding sequence (length 0, slots -1) of so many tokens.
        skipped_slots: every third new token has slot -1, because it is in the cache already.
        scales: the layer's k_scale and v_scale.
    """

    name: str
    feature: str
    spec: AttentionSpec
    context: tuple[int, ...]
    new: tuple[int, ...]
    encoder: tuple[int, ...] | None = None
    padding: int = 0
    skipped_slots: bool = False
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence: what it costs to simulate."""
        return max((c + n for c, n in zip(self.context, self.new, strict=True)), default=0)


DECODE = ((37, 1, 95, 160), (1, 1, 1, 1))
PREFILL = ((0, 0, 0), (33, 5, 64))
CHUNKED = ((40, 96, 7), (20, 3, 9))
MIXED = ((63, 0, 20, 130), (1, 17, 12, 1))


def _spec(**fields: Any) -> AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32"}
    return AttentionSpec(**(plain | fields))


def _cases() -> Iterator[Case]:
    batches = {"decode": DECODE, "prefill": PREFILL, "chunked prefill": CHUNKED, "mixed": MIXED}
    for dtype in ("float32", "float16", "bfloat16"):
        for feature, (context, new) in batches.items():
            yield Case(f"{feature} {dtype}", feature, _spec(dtype=dtype), context, new)
        yield Case(f"type {dtype}", dtype, _spec(dtype=dtype, num_heads=8, num_kv_heads=2), *MIXED)
        for feature, fields in _features().items():
            yield Case(f"{feature} {dtype}", feature, _spec(dtype=dtype, **fields), *MIXED)
    yield from _shapes()
    yield from _windows()
    yield from _other_kinds()
    yield from _quantised()
    yield from _batches()


def _features() -> dict[str, dict[str, Any]]:
    return {
        "window": {"window": (24, 0)},
        "soft-cap": {"logits_soft_cap": 1.5},
        "ALiBi": {"alibi": True},
        "sinks": {"sinks": True},
        "non-causal": {"causal": False},
        "Dv != D": {"value_head_size": 32},
        "LSE": {"returns_lse": True},
    }


def _shapes() -> Iterator[Case]:
    for heads, kv_heads, feature in ((4, 4, "MHA"), (8, 2, "GQA"), (9, 3, "GQA"), (4, 1, "MQA"), (32, 8, "GQA")):
        yield Case(f"heads {heads}/{kv_heads}", feature, _spec(num_heads=heads, num_kv_heads=kv_heads), *MIXED)
    for size in (8, 16, 32, 33, 72, 80, 96, 100, 112, 128, 192, 256, 512):
        feature = f"head size {size}" if size % 8 == 0 else "odd head size"
        yield Case(f"head size {size}", feature, _spec(head_size=size), *MIXED)
    for size in (33, 128, 256):
        yield Case(f"head size {size} bfloat16", f"head size {size}", _spec(head_size=size, dtype="bfloat16"), *MIXED)
    yield Case("head sizes 64/128", "Dv != D", _spec(value_head_size=128), *MIXED)
    yield Case("head sizes 192/128", "Dv != D", _spec(head_size=192, value_head_size=128, dtype="bfloat16"), *MIXED)
    for size in (1, 8, 16, 17, 32, 48, 64, 128, 256):
        yield Case(f"block size {size}", f"block size {size}", _spec(block_size=size), *MIXED)
    yield Case("scale 0.3", "scale", _spec(scale=0.3), *MIXED)
    yield Case("scale 1 MQA 256", "scale", _spec(scale=1 / 256, num_kv_heads=1, head_size=256), *MIXED)


def _windows() -> Iterator[Case]:
    for left in (0, 1, 31, 32, 33, 1000):
        yield Case(f"window of {left + 1}", "window", _spec(window=(left, 0)), *MIXED)
        yield Case(f"window of {left + 1}, long decode", "window", _spec(window=(left, 0)), (300, 64), (1, 1))
    yield Case("window, chunked", "window", _spec(window=(15, 0)), *CHUNKED)
    both = {"window": (20, 0), "logits_soft_cap": 1.5}
    yield Case("window and soft-cap", "window + soft-cap", _spec(**both), *MIXED)
    yield Case("window and ALiBi", "window + ALiBi", _spec(window=(20, 0), alibi=True), *MIXED)
    yield Case("window and sinks", "window + sinks", _spec(window=(20, 0), sinks=True), *MIXED)
    yield Case("sinks and LSE", "sinks + LSE", _spec(sinks=True, returns_lse=True), *MIXED)
    everything = {"window": (20, 0), "logits_soft_cap": 1.5, "alibi": True, "sinks": True, "returns_lse": True}
    yield Case("everything", "everything at once", _spec(**everything), *MIXED)
    yield Case("soft-cap and ALiBi", "soft-cap + ALiBi", _spec(logits_soft_cap=1.5, alibi=True), *MIXED)


def _other_kinds() -> Iterator[Case]:
    lengths = ((0, 0, 0), (33, 1, 70))
    for dtype in ("float32", "bfloat16"):
        yield Case(f"encoder {dtype}", "encoder", _spec(kind="encoder", dtype=dtype), *lengths)
        yield Case(
            f"cross, first step {dtype}", "cross", _spec(kind="cross", dtype=dtype), (0, 0, 0), (3, 1, 4), (50, 7, 33)
        )
        yield Case(
            f"cross, later step {dtype}", "cross", _spec(kind="cross", dtype=dtype), (4, 1, 9), (1, 1, 1), (50, 7, 33)
        )
    yield Case("encoder window", "two-sided window", _spec(kind="encoder", window=(5, 9)), *lengths)
    yield Case("encoder window, right open", "two-sided window", _spec(kind="encoder", window=(5, -1)), *lengths)
    yield Case("encoder ALiBi", "encoder + ALiBi", _spec(kind="encoder", alibi=True), *lengths)
    yield Case("encoder soft-cap", "encoder + soft-cap", _spec(kind="encoder", logits_soft_cap=1.5), *lengths)
    yield Case("encoder LSE", "encoder + LSE", _spec(kind="encoder", returns_lse=True), *lengths)
    yield Case("causal encoder", "causal encoder", _spec(kind="encoder", causal=True), *lengths)
    yield Case(
        "cross, an empty encoder", "empty context", _spec(kind="cross", returns_lse=True), (0, 0), (3, 2), (0, 9)
    )
    yield Case("cross, sinks", "cross + sinks", _spec(kind="cross", sinks=True), (0, 0), (3, 2), (20, 9))
    yield Case("shared cache", "reads another's cache", _spec(writes_kv=False), (63, 20, 130), (1, 12, 1))
    yield Case(
        "shared cache bfloat16", "reads another's cache", _spec(writes_kv=False, dtype="bfloat16"), (63, 20), (1, 12)
    )


def _quantised() -> Iterator[Case]:
    for stored in ("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "uint4"):
        for dtype in ("float32", "bfloat16"):
            spec = _spec(dtype=dtype, kv_cache_dtype=stored)
            # int8 without a scale of its own would store small whole numbers: the layer's scale is part of it.
            scales = (1.0, 1.0) if stored.startswith(("float8", "uint")) else (0.03, 0.04)
            yield Case(f"{stored} cache {dtype}", f"{stored} cache", spec, *MIXED, scales=scales)
        scaled = _spec(dtype="bfloat16", kv_cache_dtype=stored)
        yield Case(f"{stored} cache, scaled", f"{stored} cache, scaled", scaled, *MIXED, scales=(0.05, 0.02))
    yield Case("float16 cache of float32", "float16 cache of float32", _spec(kv_cache_dtype="float16"), *MIXED)
    yield Case("bfloat16 cache of float32", "bfloat16 cache of float32", _spec(kv_cache_dtype="bfloat16"), *MIXED)


def _batches() -> Iterator[Case]:
    yield Case("no tokens", "empty batch", _spec(), (), ())
    yield Case("a sequence without new tokens", "idle sequence", _spec(), (40, 33, 5), (1, 0, 2))
    yield Case("padding sequence", "padding", _spec(returns_lse=True), (40, 33), (1, 1), padding=1)
    yield Case("nothing but padding", "padding", _spec(), (), (), padding=2)
    yield Case("padding sequence of 3 without LSE", "padding", _spec(), (40, 0), (1, 9), padding=3)
    yield Case("tokens with slot -1", "slots of -1", _spec(), (40, 20), (9, 12), skipped_slots=True)
    yield Case("decodes first", "mixed", _spec(), (63, 130, 20, 0), (1, 1, 12, 17))
    yield Case("one long sequence", "long context", _spec(num_heads=8), (700,), (1,))
    yield Case("one long sequence bfloat16", "long context", _spec(num_heads=8, dtype="bfloat16"), (700,), (1,))
    yield Case("speculative verify", "several tokens per decode", _spec(), (70, 33, 5), (4, 4, 4))
    yield Case("many sequences", "large batch", _spec(), tuple(range(3, 67, 2)), (1,) * 32)
    yield Case("block boundaries", "decode", _spec(), (31, 32, 63, 64, 0), (1, 1, 1, 1, 1))


CASES: tuple[Case, ...] = tuple(_cases())
"""Every case. Names are unique."""

FEATURES: tuple[str, ...] = tuple(dict.fromkeys(case.feature for case in CASES))
"""Columns of the support table, in order."""


def mutations(case: Case) -> Iterator[tuple[str, AttentionSpec]]:
    """Yield what the case must notice: (what is wrong, the spec that a wrong backend would compute)."""
    spec = case.spec
    wide = max((c + n for c, n in zip(case.context, case.new, strict=True)), default=0)
    if not case.new or max(case.new) == 0:
        return
    left, right = spec.window
    if 0 <= left < wide - 1:
        yield "window one token wider", replace(spec, window=(left + 1, right))
        if left > 0:
            yield "window one token narrower", replace(spec, window=(left - 1, right))
        yield "window dropped", replace(spec, window=(-1, right if not spec.causal else -1))
    if not spec.causal and 0 <= right < wide - 1:
        yield "right side of the window one token wider", replace(spec, window=(left, right + 1))
    if spec.logits_soft_cap is not None:
        yield "soft-cap dropped", replace(spec, logits_soft_cap=None)
        yield "soft-cap off by a half", replace(spec, logits_soft_cap=1.5 * spec.logits_soft_cap)
    if spec.kind != "cross" and max(case.new) > 1:
        yield "causality turned round", replace(spec, causal=not spec.causal, window=(left, -1))
    # One key has weight 1 whatever its score: with at least a few, the scale must matter.
    if wide > 8 and left != 0 and not is_quantised(spec.kv_cache_dtype):
        yield "scale off by a fifth", replace(spec, scale=1.2 * spec.scale)
