"""A case, and those that show what each feature of the contract is.

A case is a spec and the lengths of a batch. What a backend cannot run it refuses by verdict; nothing here names a
vendor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attn_dispatch.contract import AttentionSpec

__all__ = ["BASIC_CASES", "CHUNKED", "MIXED", "Case", "layer"]


@dataclass(frozen=True)
class Case:
    """One problem that every backend computes or refuses.

    Attributes:
        name: unique.
        feature: its row of the support table.
        spec: the layer.
        context: tokens that each sequence has in the cache before the step.
        new: tokens that the step adds to each.
        encoder: of a cross layer, encoder tokens of each sequence; `context` > 0 says they are in the cache already.
        padding: the batch ends with a padding sequence (length 0, slots -1) of so many tokens.
        skipped_slots: every third new token has slot -1, because it is in the cache already.
        scales: the layer's k_scale and v_scale.
        fixed: fields of the spec that the case is about: a backend that refuses them refuses the case. Another dtype
            and another block size are taken where these are refused.
        magnitude: factor on the queries: of 1, scores have unit variance.
        shift: what is added to every score.
        sink: added to the layer's sinks, which are of unit variance around 1.
        shared: tokens that all sequences begin with, in blocks that all tables name. A layer that writes shares whole
            blocks alone; of one that does not, the first sequence ends inside a block that the second goes on in.
        unused: what lies in unused slots: "nan" where the backend survives it, or "ordinary" numbers.
        arrays: "whole", or "strided" (views of a fused projection).
        out: the output is given: "none", or "given" (its old contents are NaN).
        first_block: the lowest block id.
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
    fixed: tuple[str, ...] = ()
    magnitude: float = 1.0
    shift: float = 0.0
    sink: float = 0.0
    shared: int = 0
    unused: str = "nan"
    arrays: str = "whole"
    out: str = "none"
    first_block: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        own = [c + n for c, n in zip(self.context, self.new, strict=True)]
        return max([*own, *(self.encoder or ())], default=0)

    @property
    def scores(self) -> int:
        """Scores that are computed, of all heads: what the case costs an interpreter."""
        lengths = self.encoder or tuple(c + n for c, n in zip(self.context, self.new, strict=True))
        return self.spec.num_heads * sum(n * length for n, length in zip(self.new, lengths, strict=True))


_DTYPE = ("dtype",)

DECODE = ((37, 1, 95, 160), (1, 1, 1, 1))
PREFILL = ((0, 0, 0), (33, 5, 64))
CHUNKED = ((40, 96, 7), (20, 3, 9))
MIXED = ((63, 0, 20, 130), (1, 17, 12, 1))


def layer(**fields: Any) -> AttentionSpec:
    """Return a small layer: heads 4/2 of 64, float32, unless said otherwise."""
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32"}
    return AttentionSpec(**(plain | fields))


def _cases() -> Iterator[Case]:
    batches = {"decode": DECODE, "prefill": PREFILL, "chunked prefill": CHUNKED, "mixed": MIXED}
    for dtype in ("float32", "float16", "bfloat16"):
        for feature, (context, new) in batches.items():
            yield Case(f"{feature} {dtype}", feature, layer(dtype=dtype), context, new, fixed=_DTYPE)
        yield Case(f"type {dtype}", dtype, layer(dtype=dtype, num_heads=8, num_kv_heads=2), *MIXED, fixed=_DTYPE)
        for feature, fields in _features().items():
            yield Case(f"{feature} {dtype}", feature, layer(dtype=dtype, **fields), *MIXED, fixed=_DTYPE)
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
    for heads, kv_heads, feature in ((4, 4, "MHA"), (8, 2, "GQA"), (9, 3, "GQA"), (4, 1, "MQA"), (32, 8, "GQA"),
                                     (6, 2, "GQA"), (5, 1, "MQA"), (12, 2, "GQA"), (7, 1, "MQA"), (24, 2, "GQA"),
                                     (10, 10, "MHA"), (24, 12, "GQA")):  # fmt: skip
        yield Case(f"heads {heads}/{kv_heads}", feature, layer(num_heads=heads, num_kv_heads=kv_heads), *MIXED)
    for size in (8, 16, 32, 33, 72, 80, 96, 100, 112, 128, 192, 256, 512):
        feature = f"head size {size}" if size % 8 == 0 else "odd head size"
        yield Case(f"head size {size}", feature, layer(head_size=size), *MIXED)
    for size in (33, 128, 256):
        yield Case(
            f"head size {size} bfloat16",
            f"head size {size}",
            layer(head_size=size, dtype="bfloat16"),
            *MIXED,
            fixed=_DTYPE,
        )
    yield Case("head sizes 64/128", "Dv != D", layer(value_head_size=128), *MIXED)
    yield Case("head sizes 192/128", "Dv != D", layer(head_size=192, value_head_size=128, dtype="bfloat16"), *MIXED)
    for size in (1, 8, 16, 17, 32, 48, 64, 128, 256):
        yield Case(f"block size {size}", f"block size {size}", layer(block_size=size), *MIXED, fixed=("block_size",))
    yield Case("scale 0.3", "scale", layer(scale=0.3), *MIXED)
    yield Case("scale 1 MQA 256", "scale", layer(scale=1 / 256, num_kv_heads=1, head_size=256), *MIXED)


def _windows() -> Iterator[Case]:
    for left in (0, 1, 31, 32, 33, 1000):
        yield Case(f"window of {left + 1}", "window", layer(window=(left, 0)), *MIXED)
        yield Case(f"window of {left + 1}, long decode", "window", layer(window=(left, 0)), (300, 64), (1, 1))
    yield Case("window, chunked", "window", layer(window=(15, 0)), *CHUNKED)
    both = {"window": (20, 0), "logits_soft_cap": 1.5}
    yield Case("window and soft-cap", "window + soft-cap", layer(**both), *MIXED)
    yield Case("window and ALiBi", "window + ALiBi", layer(window=(20, 0), alibi=True), *MIXED)
    yield Case("window and sinks", "window + sinks", layer(window=(20, 0), sinks=True), *MIXED)
    yield Case("sinks and LSE", "sinks + LSE", layer(sinks=True, returns_lse=True), *MIXED)
    everything = {"window": (20, 0), "logits_soft_cap": 1.5, "alibi": True, "sinks": True, "returns_lse": True}
    yield Case("everything", "everything at once", layer(**everything), *MIXED)
    yield Case("soft-cap and ALiBi", "soft-cap + ALiBi", layer(logits_soft_cap=1.5, alibi=True), *MIXED)


def _other_kinds() -> Iterator[Case]:
    lengths = ((0, 0, 0), (33, 1, 70))
    for dtype in ("float32", "bfloat16"):
        yield Case(f"encoder {dtype}", "encoder", layer(kind="encoder", dtype=dtype), *lengths, fixed=_DTYPE)
        yield Case(
            f"cross, first step {dtype}",
            "cross",
            layer(kind="cross", dtype=dtype),
            (0, 0, 0),
            (3, 1, 4),
            (50, 7, 33),
            fixed=_DTYPE,
        )
        yield Case(
            f"cross, later step {dtype}",
            "cross",
            layer(kind="cross", dtype=dtype),
            (4, 1, 9),
            (1, 1, 1),
            (50, 7, 33),
            fixed=_DTYPE,
        )
    yield Case("encoder window", "two-sided window", layer(kind="encoder", window=(5, 9)), *lengths)
    yield Case("encoder window, right open", "two-sided window", layer(kind="encoder", window=(5, -1)), *lengths)
    yield Case("encoder ALiBi", "encoder + ALiBi", layer(kind="encoder", alibi=True), *lengths)
    yield Case("encoder soft-cap", "encoder + soft-cap", layer(kind="encoder", logits_soft_cap=1.5), *lengths)
    yield Case("encoder LSE", "encoder + LSE", layer(kind="encoder", returns_lse=True), *lengths)
    yield Case("causal encoder", "causal encoder", layer(kind="encoder", causal=True), *lengths)
    yield Case(
        "cross, an empty encoder", "empty context", layer(kind="cross", returns_lse=True), (0, 0), (3, 2), (0, 9)
    )
    yield Case("cross, sinks", "cross + sinks", layer(kind="cross", sinks=True), (0, 0), (3, 2), (20, 9))
    yield Case("shared cache", "reads another's cache", layer(writes_kv=False), (63, 20, 130), (1, 12, 1))
    yield Case(
        "shared cache bfloat16",
        "reads another's cache",
        layer(writes_kv=False, dtype="bfloat16"),
        (63, 20),
        (1, 12),
        fixed=_DTYPE,
    )


def _quantised() -> Iterator[Case]:
    for stored in ("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "uint4"):
        for dtype in ("float32", "bfloat16"):
            spec = layer(dtype=dtype, kv_cache_dtype=stored)
            # int8 without a scale of its own would store small whole numbers: the layer's scale is part of it.
            scales = (1.0, 1.0) if stored.startswith(("float8", "uint")) else (0.03, 0.04)
            yield Case(f"{stored} cache {dtype}", f"{stored} cache", spec, *MIXED, scales=scales, fixed=_DTYPE)
        scaled = layer(dtype="bfloat16", kv_cache_dtype=stored)
        yield Case(f"{stored} cache, scaled", f"{stored} cache, scaled", scaled, *MIXED, scales=(0.05, 0.02))
    for stored in ("float16", "bfloat16"):
        name = f"{stored} cache of float32"
        yield Case(name, name, layer(kv_cache_dtype=stored), *MIXED, fixed=_DTYPE)


def _batches() -> Iterator[Case]:
    yield Case("no tokens", "empty batch", layer(), (), ())
    yield Case("a sequence without new tokens", "idle sequence", layer(), (40, 33, 5), (1, 0, 2))
    yield Case("padding sequence", "padding", layer(returns_lse=True), (40, 33), (1, 1), padding=1)
    yield Case("nothing but padding", "padding", layer(), (), (), padding=2)
    yield Case("padding sequence of 3 without LSE", "padding", layer(), (40, 0), (1, 9), padding=3)
    yield Case("tokens with slot -1", "slots of -1", layer(), (40, 20), (9, 12), skipped_slots=True)
    yield Case("decodes first", "mixed", layer(), (63, 130, 20, 0), (1, 1, 12, 17))
    yield Case("one long sequence", "long context", layer(num_heads=8), (700,), (1,))
    yield Case(
        "one long sequence bfloat16", "long context", layer(num_heads=8, dtype="bfloat16"), (700,), (1,), fixed=_DTYPE
    )
    yield Case("speculative verify", "several tokens per decode", layer(), (70, 33, 5), (4, 4, 4))
    yield Case("many sequences", "large batch", layer(), tuple(range(3, 67, 2)), (1,) * 32)
    yield Case("block boundaries", "decode", layer(), (31, 32, 63, 64, 0), (1, 1, 1, 1, 1))


BASIC_CASES: tuple[Case, ...] = tuple(_cases())
"""What each feature of the contract is, at small sizes. Names are unique."""
