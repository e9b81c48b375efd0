"""One layer's step as a single JAX computation: write the new keys and values, then attend. Imports JAX.

Functions to be compiled, the pages donated: what comes back is the same memory. Everything that differs from step to
step is one vector of integers (`BatchShape.parts`), so that a step costs one small transfer to the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised

from . import fused, ragged
from .options import ProgramOptions

__all__ = ["attend", "attend_and_write", "write"]

Array = Any


def attend_and_write(
    pages: Array,
    q: Array,
    k: Array,
    v: Array,
    integers: Array,
    layer: Array,
    *,
    options: ProgramOptions,
    scaled: bool = False,
) -> tuple[Array, Array]:
    """Write, then attend.

    Args:
        pages: [N, B, ...] in the kernel's layout, donated.
        q: [tokens, H, D].
        k: [tokens, K, D].
        v: [tokens, K, Dv].
        integers: i32, the batch.
        layer: f32[2 + H], its k_scale, v_scale and sinks (zeros if it has none).
        options: static.
        scaled: static: a scale is not 1.

    Returns:
        The output [tokens, H, Dv], and the next version of the pages.
    """
    parts = _parts(integers, options)
    if options.batch.writes_last:
        return _attend(pages, q, parts, layer, options, scaled, _stored_rows(k, v, layer, options, scaled))
    pages = write(pages, k, v, integers, layer, options=options, scaled=scaled)
    return _attend(pages, q, parts, layer, options, scaled, None)


def write(
    pages: Array, k: Array, v: Array, integers: Array, layer: Array, *, options: ProgramOptions, scaled: bool = False
) -> Array:
    """Write only, and return the next version of the pages; arguments as `attend_and_write`."""
    rows = _interleaved(*_stored_rows(k, v, layer, options, scaled), options, pages.shape[2:])
    flat = pages.reshape(-1, *pages.shape[2:])
    # What must not be written has a slot far outside, and is dropped.
    return flat.at[_parts(integers, options)["slots"]].set(rows, mode="drop").reshape(pages.shape)


def attend(
    pages: Array, q: Array, integers: Array, layer: Array, *, options: ProgramOptions, scaled: bool = False
) -> tuple[Array, Array | None]:
    """Attend to what the pages hold; arguments as `attend_and_write`.

    Returns:
        The output, and the pages where the kernel was given them to keep (`ProgramOptions.keeps_pages`): a fused kernel
        hands on the pages that it reads, and they would be copied first.
    """
    out, pages = _attend(pages, q, _parts(integers, options), layer, options, scaled, None)
    return out, pages if options.keeps_pages else None


def _parts(integers: Array, options: ProgramOptions) -> dict[str, Array]:
    parts, at = {}, 0
    for name, size in options.batch.parts:
        parts[name] = integers[at : at + size]
        at += size
    return parts


def _stored_rows(k: Array, v: Array, layer: Array, options: ProgramOptions, scaled: bool) -> tuple[Array, Array]:
    """Return what the cache holds for keys and values."""
    scales = (layer[0], layer[1]) if scaled else (None, None)
    return _stored(k, options.cache_dtype, scales[0]), _stored(v, options.cache_dtype, scales[1])


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


def _interleaved(k: Array, v: Array, options: ProgramOptions, tail: tuple[int, ...]) -> Array:
    """Return rows K0, V0, K1, V1... [tokens, *tail], with zeros where the spec has no head and no element."""
    more = options.padded_kv_heads - options.kv_heads
    padded = [jnp.pad(x, ((0, 0), (0, more), (0, options.lanes - x.shape[2]))) for x in (k, v)]
    return jnp.stack(padded, axis=2).reshape(len(k), *tail)


def _attend(
    pages: Array,
    q: Array,
    parts: dict[str, Array],
    layer: Array,
    options: ProgramOptions,
    scaled: bool,
    new: tuple[Array, ...] | None,
) -> tuple[Array, Array]:
    """Return the output and the pages, into which a fused kernel has written `new`."""
    if scaled:  # q . (stored * scale) = (q * scale) . stored, so that one program serves every layer's scales
        q = (q.astype(jnp.float32) * layer[0]).astype(q.dtype)
    if options.batch.permutes:
        q = q[parts["order"]]
        new = None if new is None else tuple(x[parts["order"]] for x in new)
    # By default the hardware multiplies float32 as bfloat16: far outside clause 11.
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else nullcontext()
    with exact:
        if options.kernel == "ragged":
            out = ragged.attend(pages, q, parts, options)
        else:
            out, pages = fused.attend(pages, q, new, parts, layer[2:], options)
    if options.batch.permutes:
        out = out[parts["back"]]
    if scaled:
        out = (out.astype(jnp.float32) * layer[1]).astype(out.dtype)
    return (jnp.where(parts["valid"][:, None, None] != 0, out, 0) if options.batch.masks_rows else out), pages
