"""Random specs and batches, for hypothesis: what nobody thought of naming."""

from __future__ import annotations

from hypothesis import strategies as st

from attn_dispatch.conformance.cases import Case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.spec import Kind

__all__ = ["cases"]


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 150) -> Case:
    """Draw a case: any spec of the contract with a batch that fits it.

    Args:
        draw: hypothesis's.
        max_tokens: the longest sequence.
    """
    kinds: list[Kind] = [*["decoder"] * 6, "encoder", "cross"]  # type: ignore[list-item]
    kind = draw(st.sampled_from(kinds))
    kv_heads = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    head_size = draw(st.sampled_from([8, 16, 32, 40, 64, 80, 128]))
    causal = kind == "decoder" and draw(st.sampled_from([True, True, True, False]))
    left = draw(st.sampled_from([-1, -1, -1, 0, 1, 7, 31, 32, 33, 63]))
    right = -1 if causal else draw(st.sampled_from([-1, -1, 0, 5]))
    spec = AttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])),
        num_kv_heads=kv_heads,
        head_size=head_size,
        value_head_size=draw(st.sampled_from([head_size, head_size, 32, 64])),
        dtype=dtype,
        kv_cache_dtype=draw(st.sampled_from([dtype, dtype, dtype, "float8_e4m3fn", "int8", "float16"])),
        block_size=draw(st.sampled_from([8, 16, 32, 32, 32, 64, 5])),
        scale=draw(st.sampled_from([head_size**-0.5, 0.2])),
        causal=causal,
        window=(-1, -1) if kind == "cross" else (left, right),
        logits_soft_cap=draw(st.sampled_from([None, None, 1.5])),
        alibi=kind != "cross" and draw(st.sampled_from([False, False, True])),
        sinks=draw(st.sampled_from([False, False, True])),
        kind=kind,
        writes_kv=draw(st.sampled_from([True] * 5 + [False])) or kind != "decoder",
        returns_lse=draw(st.sampled_from([False, False, True])),
    )
    sequences = draw(st.integers(0, 4))
    context = draw(st.lists(st.integers(0, max_tokens - 40), min_size=sequences, max_size=sequences))
    new = draw(st.lists(st.sampled_from([1, 1, 1, 0, 2, 9, 33]), min_size=sequences, max_size=sequences))
    encoder = None
    if kind == "encoder":
        context = [0] * sequences
    if kind == "cross":
        encoder = tuple(draw(st.lists(st.integers(0, max_tokens), min_size=sequences, max_size=sequences)))
    quantised = spec.kv_cache_dtype == "int8"
    return Case(
        name="random",
        feature="random",
        spec=spec,
        context=tuple(context),
        new=tuple(new),
        encoder=encoder,
        padding=draw(st.sampled_from([0, 0, 1, 2])) if kind == "decoder" and spec.writes_kv else 0,
        skipped_slots=kind == "decoder"
        and spec.writes_kv
        and sum(new) > 0
        and draw(st.sampled_from([False] * 4 + [True])),
        scales=(0.03, 0.04) if quantised else (1.0, 1.0),
    )
