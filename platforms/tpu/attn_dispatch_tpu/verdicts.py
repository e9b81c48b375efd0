"""What the kernel computes, and what it does not: the one place. No vendor is imported here.

Each refusal here is one of the compiler's or of the kernel's signature; `compile_cell.py` holds both directions against
the TPU's own compiler.
"""

from __future__ import annotations

from collections.abc import Iterator

from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .tiles import LANES, PAGE_BYTES_LIMIT, page_bytes

__all__ = ["CACHE_TYPES", "TYPES", "refusals"]

TYPES = ("bfloat16", "float32")
"""Of queries: Mosaic has no float16 or float64 vectors that the kernel could use."""

CACHE_TYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8")
"""Of the cache: what the kernel can pick keys and values apart in, and convert to the queries' type."""


def refusals(spec: AttentionSpec) -> Iterator[Refusal]:
    """Yield every reason against a spec."""
    if spec.kind != "decoder":
        yield Refusal("kind", spec.kind, "the kernel is causal self-attention over pages: decoder layers")
    elif not spec.causal:
        yield Refusal("causal", spec.causal, "the kernel is causal, and nothing else", "Use another backend")
    if spec.dtype not in TYPES:
        accepts = f"Mosaic compiles this kernel for {' and '.join(TYPES)}"
        yield Refusal("dtype", spec.dtype, accepts, "Ask for bfloat16")
    if spec.kv_cache_dtype not in CACHE_TYPES:
        accepts = f"the kernel reads pages of {', '.join(CACHE_TYPES)}"
        yield Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for bfloat16")
    for name in ("head_size", "value_head_size"):
        size = getattr(spec, name)
        if size > LANES and (name == "head_size" or size != spec.head_size):
            yield Refusal(name, size, f"the kernel's heads have {LANES} elements (smaller ones are padded)")
    if spec.alibi:
        yield Refusal("alibi", True, "the kernel has no bias")
    if spec.sinks:
        yield Refusal("sinks", True, "the kernel's softmax has no sink")
    if spec.returns_lse:
        yield Refusal("returns_lse", True, "the kernel keeps its log-sum-exp to itself")
    if spec.kv_cache_dtype in CACHE_TYPES and (taken := page_bytes(spec)) > PAGE_BYTES_LIMIT:
        fits = spec.block_size * PAGE_BYTES_LIMIT // taken
        accepts = f"two pages of {taken >> 11} KiB each do not fit VMEM beside the scores; {fits} tokens would"
        yield Refusal("block_size", spec.block_size, accepts, f"Ask for block_size={fits} or less")
