"""Cases where real kernels break: sizes past a tile, a warp, an index type; numbers past a type's range; views.

Cost is kept down by few heads: what breaks at 33,000 keys breaks with one head as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attn_dispatch.conformance.case import CHUNKED, MIXED, Case, layer

__all__ = ["HARD_CASES"]

_DTYPE = ("dtype",)


def _cases() -> Iterator[Case]:
    yield from _long()
    yield from _wide_windows()
    yield from _large_numbers()
    yield from _double()
    yield from _memory()
    yield from _heads()


def _long() -> Iterator[Case]:
    few = layer(num_heads=2, num_kv_heads=1)
    yield Case("prefill of 130", "many new tokens", few, (0, 50), (130, 75))
    yield Case("prefill of 600", "many new tokens", few, (0, 9), (600, 1))
    yield Case("chunk of 520 after 300", "many new tokens", few, (300, 5), (520, 2))
    yield Case("context of 1,500", "long context", few, (1500, 40), (1, 5))
    yield Case("context of 4,200", "long context", layer(num_heads=2, num_kv_heads=1, returns_lse=True), (4200,), (1,))
    yield Case("context of 4,200 without LSE", "long context", few, (4200, 9), (3, 1))
    single = layer(num_heads=1, num_kv_heads=1)
    yield Case("context of 33,000", "very long context", single, (33000,), (1,))
    yield Case("context of 33,000, two new tokens", "very long context", single, (33000, 77), (2, 1))
    yield Case("40 decodes", "large batch", few, tuple(range(1, 81, 2)), (1,) * 40)
    yield Case("300 decodes", "large batch", single, tuple(i % 50 for i in range(300)), (1,) * 300)
    lengths = tuple(1 + i % 3 for i in range(280))
    yield Case("280 short prefills", "large batch", single, tuple(5 * (i % 4) for i in range(280)), lengths)


def _wide_windows() -> Iterator[Case]:
    few = {"num_heads": 2, "num_kv_heads": 1}
    for left in (63, 64, 99, 127, 128, 255):
        yield Case(f"window of {left + 1}", "window", layer(window=(left, 0), **few), (300, 0, 140), (5, 90, 1))
    yield Case("window of 2,101", "window", layer(window=(2100, 0), **few), (3000, 40), (1, 3))
    yield Case("window of 2,048, prefill", "window", layer(window=(2047, 0), **few), (2040, 9), (40, 1))
    yield Case(
        "encoder window, wide", "two-sided window", layer(kind="encoder", window=(70, 66), **few), (0, 0), (150, 9)
    )


def _large_numbers() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16", "float16"):
        yield Case(f"large scores {dtype}", "large scores", layer(dtype=dtype), *MIXED, fixed=_DTYPE, magnitude=30.0)
    for shift in (-150.0, 150.0):
        yield Case(f"scores around {shift:.0f}", "large scores", layer(returns_lse=True), *MIXED, shift=shift)
        yield Case(f"scores around {shift:.0f}, no LSE", "large scores", layer(), (700, 3), (1, 40), shift=shift)
    sinks = layer(sinks=True, returns_lse=True)
    yield Case("sinks around 26", "large sinks", sinks, *MIXED, shift=22.0, sink=25.0)
    yield Case("sinks around -24", "large sinks", sinks, *MIXED, shift=-28.0, sink=-25.0)
    yield Case("sinks around 26 without LSE", "large sinks", layer(sinks=True), *MIXED, shift=22.0, sink=25.0)
    for cap in (30.0, 50.0):
        yield Case(f"soft-cap of {cap:.0f}", "large soft-cap", layer(logits_soft_cap=cap), *MIXED, magnitude=cap / 2)


def _double() -> Iterator[Case]:
    features: dict[str, dict[str, Any]] = {
        "mixed": {}, "window": {"window": (24, 0)}, "ALiBi": {"alibi": True}, "soft-cap": {"logits_soft_cap": 1.5},
        "sinks": {"sinks": True}, "LSE": {"returns_lse": True}, "non-causal": {"causal": False},
    }  # fmt: skip
    for feature, fields in features.items():
        yield Case(f"{feature} float64", "float64", layer(dtype="float64", **fields), *MIXED, fixed=_DTYPE)
    yield Case("chunked prefill float64", "float64", layer(dtype="float64"), *CHUNKED, fixed=_DTYPE)
    yield Case("decode float64", "float64", layer(dtype="float64"), (37, 1, 95, 160), (1, 1, 1, 1), fixed=_DTYPE)
    yield Case(
        "encoder float64",
        "float64",
        layer(dtype="float64", kind="encoder", window=(5, 9)),
        (0, 0),
        (33, 70),
        fixed=_DTYPE,
    )


def _memory() -> Iterator[Case]:
    yield Case("ordinary numbers in unused slots", "unused slots", layer(), *MIXED, unused="ordinary")
    yield Case(
        "ordinary numbers in unused slots, decodes",
        "unused slots",
        layer(),
        (37, 1, 95, 160),
        (1,) * 4,
        unused="ordinary",
    )
    yield Case("ordinary numbers, window", "unused slots", layer(window=(24, 0)), *MIXED, unused="ordinary")
    yield Case("strided arrays", "strided arrays", layer(), *MIXED, arrays="strided")
    yield Case(
        "strided arrays, decodes", "strided arrays", layer(num_heads=8), (37, 1, 95), (1, 1, 1), arrays="strided"
    )
    yield Case(
        "strided arrays of an encoder", "strided arrays", layer(kind="encoder"), (0, 0), (33, 5), arrays="strided"
    )
    yield Case("out given", "given output", layer(), *MIXED, out="given")
    yield Case("out given, with LSE", "given output", layer(returns_lse=True), *MIXED, out="given")
    yield Case(
        "out given, padding and idle sequences", "given output", layer(), (40, 33, 5), (1, 0, 2), padding=2, out="given"
    )
    yield Case(
        "out given and strided",
        "given output",
        layer(),
        (40, 33, 5),
        (1, 0, 2),
        padding=1,
        out="given",
        arrays="strided",
    )
    yield Case("a prefix of whole blocks is shared", "shared prefix", layer(), (300, 280, 257), (1, 5, 9), shared=256)
    yield Case(
        "a prefix that ends in a block is shared",
        "shared prefix",
        layer(writes_kv=False),
        (290, 300, 301),
        (0, 1, 5),
        shared=290,
    )
    yield Case(
        "all decodes share their prefix",
        "shared prefix",
        layer(num_heads=8),
        (513, 520, 600, 512),
        (1,) * 4,
        shared=512,
    )
    few = layer(num_heads=1, num_kv_heads=1, block_size=16)
    yield Case("block ids over 32,767", "high block ids", few, (70, 3, 40), (1, 20, 1), first_block=33_000)
    yield Case("block ids over 65,535", "high block ids", few, (70, 3), (1, 2), first_block=66_000)


def _heads() -> Iterator[Case]:
    for heads, kv_heads in ((5, 5), (6, 3), (12, 4), (7, 1)):
        spec = layer(num_heads=heads, num_kv_heads=kv_heads, alibi=True)
        yield Case(f"ALiBi, heads {heads}/{kv_heads}", "ALiBi", spec, *MIXED)
    yield Case("sinks, heads 9/3", "sinks", layer(num_heads=9, num_kv_heads=3, sinks=True), *MIXED)
    for heads, kv_heads in ((10, 2), (14, 2), (16, 1)):
        spec = layer(num_heads=heads, num_kv_heads=kv_heads)
        yield Case(f"decode, heads {heads}/{kv_heads}", "GQA" if kv_heads > 1 else "MQA", spec, (37, 1, 95), (1, 1, 1))


HARD_CASES: tuple[Case, ...] = tuple(_cases())
"""Every one of them. Names are unique, here and among the basic ones."""
