"""JAX's own kernel, `ragged_paged_attention`. Imports JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from .options import ProgramOptions

__all__ = ["attend"]

Array = Any


def attend(pages: Array, q: Array, parts: dict[str, Array], options: ProgramOptions) -> Array:
    """Return the output [tokens, H, Dv] of what the pages hold.

    Args:
        pages: [N, B, 2K', 128].
        q: [tokens, H, D].
        parts: the batch.
        options: static.
    """
    lanes, batch = options.lanes, options.batch
    grouped = q.reshape(len(q), options.kv_heads, -1, options.head_size)
    more = options.padded_kv_heads - options.kv_heads, options.group - grouped.shape[2], lanes - options.head_size
    padded = jnp.pad(grouped, ((0, 0), *((0, n) for n in more)))
    convert = 1.0 if pages.dtype != q.dtype else None  # a scale makes the kernel convert to q's type
    out = ragged_paged_attention(
        padded.reshape(len(q), -1, lanes),
        pages,
        parts["lengths"],
        parts["table"].reshape(batch.sequences, batch.pages_per_seq),
        parts["starts"],
        parts["counts"][:1],
        sm_scale=options.scale,
        sliding_window=options.window,
        soft_cap=options.soft_cap,
        k_scale=convert,
        v_scale=convert,
        num_kv_pages_per_block=options.tile_pages,
        num_queries_per_block=options.tile_queries,
    )
    out = out.reshape(len(q), options.padded_kv_heads, options.group, lanes)
    out = out[:, : options.kv_heads, : options.heads // options.kv_heads, : options.value_size]
    return out.reshape(len(q), options.heads, options.value_size)
