"""torch tensors on a TPU, which JAX does not share: the cache is torch's, and so is the way to the kernel.

    device "torch:tpu"  torch_tpu: the whole step is a JAX function that becomes a torch operator (`jax_op`)
    device "torch:xla"  torch_xla 2.9: its own operator for the same kernel, after an update of the pages in torch

Written against the packages that are released, whose signatures a test holds against what is called here. Neither has
run on a TPU: "interface" is all that may be said of them. Imports torch and JAX.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.contract.dtypes import FINITE_MAX, is_quantised
from attn_dispatch.errors import CacheError, MissingPackageError

from .options import StepOptions

__all__ = ["run", "run_tpu", "run_xla", "zeros"]

PREFIX = "torch:"
"""How a device of torch is named, to tell it from JAX's."""

_PACKAGES = {"tpu": "torch_tpu", "xla": "torch_xla"}
Numbers = npt.NDArray[np.float32]


def zeros(shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
    """Return zeroed pages on a device of torch's.

    Raises:
        MissingPackageError: nothing that is installed gives torch such a device.
        CacheError: torch reaches no TPU by it.
    """
    kind = device.partition(":")[0]
    if kind not in _PACKAGES:
        raise CacheError(f"device='{PREFIX}{device}': torch tensors on a TPU are on {PREFIX}tpu or {PREFIX}xla")
    if kind == "xla" and dtype.startswith("float8"):
        raise CacheError(
            f"{PREFIX}{device}: torch cannot copy rows of {dtype} there; use bfloat16 or int8, or torch_tpu"
        )
    try:
        __import__(_PACKAGES[kind])
    except ImportError as error:
        package = _PACKAGES[kind]
        raise MissingPackageError(
            f"device='{PREFIX}{device}' is {package}'s: pip install {package} ({error})"
        ) from error
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def run(
    pages: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    integers: torch.Tensor,
    numbers: Numbers,
    options: StepOptions,
    scaled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the next version of the pages; arguments as `step.attend_and_write`."""
    if pages.device.type == "tpu":
        return run_tpu(pages, q, k, v, integers, numbers, options, scaled)
    if options.kernel != "ragged":
        raise CacheError(
            "torch_xla has an operator for JAX's own kernel alone, and these pages are of tpu-inference's: use "
            "torch_tpu, or an environment without tpu-inference"
        )
    return run_xla(pages, q, k, v, integers, numbers, options, scaled, torch.ops.xla.ragged_paged_attention)


def run_tpu(
    pages: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    integers: torch.Tensor,
    numbers: Numbers,
    options: StepOptions,
    scaled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch_tpu: the same program as for JAX's arrays. The pages are donated, and may not be used afterwards."""
    on_device = torch.from_numpy(numbers).to(pages.device)
    if k is None or v is None:
        out: torch.Tensor = _reading_operator(options, scaled)(pages, q, integers, on_device)
        return out, pages
    made: tuple[torch.Tensor, torch.Tensor] = _writing_operator(options, scaled)(pages, q, k, v, integers, on_device)
    return made


@functools.cache
def _writing_operator(options: StepOptions, scaled: bool) -> Any:
    from . import step

    # torch_tpu makes the operator's schema of these annotations.
    def attend_and_write(
        pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, integers: jax.Array, numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        both: tuple[jax.Array, jax.Array] = step.attend_and_write(
            pages, q, k, v, integers, numbers, options=options, scaled=scaled
        )
        return both

    return _jax_op()(_operator_name("write", options, scaled), attend_and_write, donate_argnums=(0,))


@functools.cache
def _reading_operator(options: StepOptions, scaled: bool) -> Any:
    from . import step

    def attend(pages: jax.Array, q: jax.Array, integers: jax.Array, numbers: jax.Array) -> jax.Array:
        return step.attend(pages, q, integers, numbers, options=options, scaled=scaled)

    return _jax_op()(_operator_name("read", options, scaled), attend)


def _jax_op() -> Any:
    return torch.tpu.pallas.jax_op


def _operator_name(what: str, options: StepOptions, scaled: bool) -> str:
    # An operator is one program: the name has to differ with everything that it was compiled for.
    return f"{__package__}::{what}_{hash((options, scaled)) & (2**64 - 1):016x}"


def run_xla(
    pages: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    integers: torch.Tensor,
    numbers: Numbers,
    options: StepOptions,
    scaled: bool,
    attend: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By an operator with the signature of `torch.ops.xla.ragged_paged_attention`; the pages are updated in place."""
    batch, lanes = options.batch, options.lanes
    parts = dict(
        zip((n for n, _ in batch.parts), torch.split(integers, [size for _, size in batch.parts]), strict=True)
    )
    if k is not None and v is not None:
        rows = torch.stack([_row(x, scale, scaled, options) for x, scale in ((k, numbers[0]), (v, numbers[1]))], dim=2)
        # What is not to be written has a slot outside. In its place the first row that is written is, once more: the
        # number of rows must not depend on the batch, or XLA compiles again.
        slots = parts["slots"].long()
        flat = pages.view(-1, *pages.shape[2:])
        used = slots < flat.shape[0]
        row = torch.where(used, torch.arange(len(slots), device=slots.device), used.int().argmax())
        flat.index_copy_(0, slots[row], rows.reshape(len(rows), *pages.shape[2:])[row])
    if scaled:
        q = (q.float() * float(numbers[0])).to(q.dtype)
    if batch.permutes:
        q = q[parts["order"].long()]
    grouped = q.reshape(len(q), options.kv_heads, -1, options.head_size)
    more = (
        0,
        lanes - options.head_size,
        0,
        options.group - grouped.shape[2],
        0,
        options.padded_kv_heads - options.kv_heads,
    )
    padded = torch.nn.functional.pad(grouped, more).reshape(len(q), -1, lanes)
    convert = 1.0 if pages.dtype != q.dtype else None
    out = attend(
        padded,
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
    out = out.reshape(len(q), options.heads, options.value_size)
    if batch.permutes:
        out = out[parts["back"].long()]
    if scaled:
        out = (out.float() * float(numbers[1])).to(out.dtype)
    return (torch.where(parts["valid"][:, None, None] != 0, out, 0) if batch.masks_rows else out), pages


def _row(x: torch.Tensor, scale: float, scaled: bool, options: StepOptions) -> torch.Tensor:
    """Return what the cache holds for x, padded to the kernel's heads."""
    dtype = options.cache_dtype
    if is_quantised(dtype):
        limit, wide = FINITE_MAX[dtype], x.float()
        wide = torch.clamp(wide / scale if scaled else wide, -limit, limit)
        x = torch.round(wide) if dtype == "int8" else wide
    more = (0, options.lanes - x.shape[2], 0, options.padded_kv_heads - options.kv_heads)
    return torch.nn.functional.pad(x.to(getattr(torch, dtype)), more)
