"""What several commands take: a layer, said on the command line."""

from __future__ import annotations

from attn_dispatch.contract import AttentionSpec

__all__ = ["spec_of"]


def spec_of(heads: int, kv_heads: int, head_size: int, dtype: str, block_size: int) -> AttentionSpec:
    """Return the spec of a plain decoder layer.

    Raises:
        SpecError: there is no such layer.
    """
    return AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, dtype=dtype, block_size=block_size
    )
