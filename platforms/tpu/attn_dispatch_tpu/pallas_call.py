"""A plan and a call as the arguments of the kernels' programs, and what comes back. Imports JAX."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from attn_dispatch.adapters.joint_pages import PAGES
from attn_dispatch.backend import Call, Plan
from attn_dispatch.contract import Array, AttentionSpec, BatchView, LayerParameters
from attn_dispatch.contract.arrays import library_of
from attn_dispatch.errors import ArrayError, CacheError

from . import exchange, programs, simulator
from .cache import FunctionalCache
from .kernels import Kernel
from .options import ProgramOptions, program_options
from .planning import pack

__all__ = ["PallasPlan", "make_plan", "program", "run", "step"]

_TOKEN_FLOOR = 16
# A program takes seconds to compile for the simulator and next to nothing to run: few sizes.
_SIMULATED_TOKEN_FLOOR = 256


@dataclass(slots=True, eq=False, kw_only=True)
class PallasPlan(Plan):
    """A step's batch as the kernel wants it.

    Attributes:
        options: what the step's program is compiled for; None for a step without rows.
        batch: i32 on the device, `BatchShape.parts`.
        page: shape of a page of the kernel's layout.
    """

    options: ProgramOptions | None = None
    batch: Array = None
    page: tuple[int, ...] = ()


def make_plan(kernel: Kernel, spec: AttentionSpec, view: BatchView, simulated: bool) -> PallasPlan:
    """Return the plan of a batch; see `PallasBackend.plan`."""
    if not (view.num_tokens or view.num_new):
        return PallasPlan(spec=spec, view=view)
    floor = _SIMULATED_TOKEN_FLOOR if simulated else _TOKEN_FLOOR
    batch = pack(spec, view, fused=kernel.fused, token_floor=floor)
    options = program_options(kernel, spec, batch.shape, str(simulator.mode()) if simulated else "")
    page = (spec.block_size, *kernel.tail(spec))
    return PallasPlan(spec=spec, view=view, options=options, batch=jnp.asarray(batch.integers), page=page)


def run(call: Call, backend: str) -> Array:
    """Write and attend; see `PallasBackend.run`."""
    cache, library = call.cache, library_of(call.q)
    exchange.check_out(call.out)
    if not isinstance(cache, FunctionalCache):
        raise CacheError(f"{cache!r} holds no arrays of JAX: allocate the cache with {backend}")
    pages = cache.live(PAGES)
    assert isinstance(call.plan, PallasPlan)
    if call.plan.options is not None and pages.shape[1:] != call.plan.page:
        raise CacheError(
            f"the cache's pages are {pages.shape[1:]}, and this step's kernel ({call.plan.options.kernel}) needs "
            f"{call.plan.page}: allocate the cache with a layer of this kind"
        )
    if exchange.is_traced(call.q):
        raise ArrayError(
            "run() keeps the cache's live pages itself, which a traced call cannot: inside jax.jit use "
            "backend.step(plan, q, k, v, pages, layer), which returns (out, pages)"
        )
    q, k, v = (None if x is None else exchange.to_jax(n, x) for n, x in (("q", call.q), ("k", call.k), ("v", call.v)))
    result, pages = step(call.plan, q, k, v, pages, call.layer)
    cache.replace(PAGES, pages)
    return exchange.to_library(result, library, call.out)


def step(
    plan: PallasPlan, q: Array, k: Array | None, v: Array | None, pages: Array, layer: LayerParameters
) -> tuple[Array, Array]:
    """Return the output and the next version of the pages; see `PallasBackend.step`."""
    spec, options = plan.spec, plan.options
    nothing = jnp.zeros((0, spec.num_heads, spec.value_head_size), q.dtype)
    if options is None:
        return nothing, pages
    vector = layer.memoize(__name__, lambda: _layer_vector(layer, spec.num_heads))
    q, k, v = (None if x is None else exchange.with_rows(x, options.batch.tokens) for x in (q, k, v))
    compiled = "" if exchange.is_traced(q) else "simulated" if options.simulated else "hardware"
    settings = {"options": options, "scaled": layer.scaled}
    with simulator.running() if options.simulated else nullcontext():
        if not plan.num_tokens:
            return nothing, pages if k is None else program("write", compiled)(
                pages, k, v, plan.batch, vector, **settings
            )
        if k is None:
            out, kept = program("attend", compiled, options.keeps_pages)(pages, q, plan.batch, vector, **settings)
            pages = pages if kept is None else kept
        else:
            out, pages = program("attend_and_write", compiled)(pages, q, k, v, plan.batch, vector, **settings)
    return exchange.first_rows(out, plan.num_tokens), pages


@cache
def program(name: str, compiled: str, donates: bool = True) -> Any:
    """Return one of `programs`, compiled for "hardware", for the simulator ("simulated"), or by the caller ("")."""
    function = getattr(programs, name)
    if not compiled:
        return function
    return jax.jit(
        function,
        static_argnames=("options", "scaled"),
        donate_argnames=("pages",) if donates else (),
        compiler_options=simulator.COMPILER_OPTIONS if compiled == "simulated" else None,
    )


def _layer_vector(layer: LayerParameters, heads: int) -> npt.NDArray[np.float32]:
    """Return what a layer owns as one vector: k_scale, v_scale, sinks."""
    sinks = np.zeros(heads, np.float32) if layer.sinks is None else layer.sinks
    return np.concatenate([np.array([layer.k_scale, layer.v_scale], np.float32), sinks])
