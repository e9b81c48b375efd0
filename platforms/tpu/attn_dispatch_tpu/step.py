"""One step of one layer as a single JAX computation: write the new keys and values, then attend. Imports JAX.

The pages are donated: what comes back is the same memory. Everything that differs from step to step is one vector of
integers (`Packed` says what lies where in it), so that a step costs one small transfer to the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised

__all__ = ["StepOptions", "attend", "attend_and_write"]

Array = Any


@dataclass(frozen=True)
class StepOptions:
    """All that a computation is compiled for. Equal options and shapes share one.

    Attributes:
        heads, kv_heads, head_size, value_size: of the spec: H, K, D, Dv.
        padded_kv_heads, group: what the kernel sees: K' and G' (see `tiles.Padding`).
        cache_dtype: what the pages hold.
        scale, window, soft_cap: of the spec; the window counts tokens, the query's own included.
        tokens, sequences, pages_per_seq: sizes of the batch, rounded up.
        tile_pages, tile_queries: `tiles.Tiles`.
        masks_rows: some rows attend to nothing.
        simulated: how it is interpreted, or "" on a TPU.
    """

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    padded_kv_heads: int
    group: int
    cache_dtype: str
    scale: float
    window: int | None
    soft_cap: float | None
    tokens: int
    sequences: int
    pages_per_seq: int
    tile_pages: int
    tile_queries: int
    masks_rows: bool
    simulated: str = ""

    @property
    def packed_sizes(self) -> tuple[int, ...]:
        """How many integers each part of the batch's vector has."""
        seqs = self.sequences
        return (self.tokens, seqs, seqs * self.pages_per_seq, seqs + 1, 1, self.tokens if self.masks_rows else 0)


@partial(jax.jit, static_argnames=("options", "scaled"), donate_argnames=("pages",))
def attend_and_write(
    pages: Array, q: Array, k: Array, v: Array, batch: Array, scales: Array, *, options: StepOptions, scaled: bool
) -> tuple[Array, Array]:
    """Write, then attend.

    Args:
        pages: [N, B, 2K', 128], donated.
        q: [tokens, H, D].
        k: [tokens, K, D].
        v: [tokens, K, Dv].
        batch: i32, see `StepOptions.packed_sizes`.
        scales: f32[2], the layer's k_scale and v_scale.
        options: static.
        scaled: static: a scale is not 1.

    Returns:
        The output [tokens, H, Dv], and the next version of the pages.
    """
    slots = batch[: options.tokens]
    stored = [_stored(x, options.cache_dtype, scale if scaled else None) for x, scale in ((k, scales[0]), (v, scales[1]))]
    rows = _interleaved(*stored, options, pages.shape[-1])
    flat = pages.reshape(-1, *pages.shape[2:])
    # What must not be written has a slot far outside, and is dropped.
    pages = flat.at[slots].set(rows.reshape(-1, *pages.shape[2:]), mode="drop").reshape(pages.shape)
    return _attend(pages, q, batch, scales, options, scaled), pages


@partial(jax.jit, static_argnames=("options", "scaled"))
def attend(pages: Array, q: Array, batch: Array, scales: Array, *, options: StepOptions, scaled: bool) -> Array:
    """Attend to what the pages hold; arguments as `attend_and_write`."""
    return _attend(pages, q, batch, scales, options, scaled)


def _stored(x: Array, dtype: str, scale: Array | None) -> Array:
    """Return what the cache holds for x: `contract.dtypes.quantise`, in JAX."""
    if not is_quantised(dtype):
        return x.astype(dtype)
    limit = FINITE_MAX[dtype]
    wide = x.astype(jnp.float32)
    if scale is not None:
        # A plain quotient by one number is compiled into a product with its reciprocal, which rounds otherwise. XLA
        # cannot see that these are all one number.
        wide = wide / jax.lax.optimization_barrier(jnp.broadcast_to(scale, wide.shape))
    clipped = jnp.clip(wide, -limit, limit)
    return (jnp.rint(clipped) if dtype == "int8" else clipped).astype(dtype)


def _interleaved(k: Array, v: Array, options: StepOptions, lanes: int) -> Array:
    """Return rows K0, V0, K1, V1... [tokens, 2K', lanes], with zeros where the spec has no head and no element."""
    more = options.padded_kv_heads - options.kv_heads
    padded = [jnp.pad(x, ((0, 0), (0, more), (0, lanes - x.shape[2]))) for x in (k, v)]
    return jnp.stack(padded, axis=2).reshape(len(k), 2 * options.padded_kv_heads, lanes)


def _attend(pages: Array, q: Array, batch: Array, scales: Array, options: StepOptions, scaled: bool) -> Array:
    sizes = options.packed_sizes
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    _, lengths, table, starts, count, valid = jnp.split(batch, ends[:-1])
    lanes = pages.shape[-1]
    if scaled:  # q . (stored * scale) = (q * scale) . stored, so one program serves every layer's scales
        q = (q.astype(jnp.float32) * scales[0]).astype(q.dtype)
    grouped = q.reshape(len(q), options.kv_heads, -1, options.head_size)
    more = options.padded_kv_heads - options.kv_heads, options.group - grouped.shape[2], lanes - options.head_size
    padded = jnp.pad(grouped, ((0, 0), *((0, n) for n in more)))
    # Without a word from us the hardware multiplies float32 as bfloat16: far outside clause 11.
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else nullcontext()
    convert = 1.0 if pages.dtype != q.dtype else None  # a scale makes the kernel convert to q's type
    with exact:
        out = ragged_paged_attention(
            padded.reshape(len(q), options.padded_kv_heads * options.group, lanes),
            pages.reshape(*pages.shape[:2], 2 * options.padded_kv_heads, lanes),
            lengths,
            table.reshape(options.sequences, options.pages_per_seq),
            starts,
            count,
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
    out = out.reshape(len(q), options.heads, options.value_size)
    if scaled:
        out = (out.astype(jnp.float32) * scales[1]).astype(out.dtype)
    return jnp.where(valid[:, None, None] != 0, out, 0) if options.masks_rows else out
