"""The kernels on a CPU: JAX's Pallas interpreter, with three of its rules replaced. Never imported on a TPU.

JAX 0.10.2 to 0.12 interpret these kernels wrongly, or not at all:

- loads and stores with a mask (`pltpu.load`, `pltpu.store`) fail on a static index, and drop all but the last of
  several nested views: both rules are stated anew by JAX's own general functions for the same thing;
- what a kernel stores in its scalars (`ragged_paged_attention` keeps there which buffer is next) is forgotten after
  each step of the grid: it is carried to the next one, as on hardware.

Interpreting shows what a kernel computes; that the TPU's compiler takes it is shown by `evidence/compile_check.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from attn_dispatch.errors import BackendLoadError

__all__ = [
    "COMPILER_OPTIONS",
    "PATCHED",
    "known_versions",
    "knows",
    "mode",
    "moves_memory",
    "replace_rules",
    "running",
    "using",
]

COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""For XLA on a CPU: an interpreted kernel is a large program that runs once; it compiles 8 times as fast."""

_KNOWN_JAX = ((0, 10, 2), (0, 13))

PATCHED = "JAX's Pallas interpreter with its rules for masked loads, masked stores and scalars replaced"
"""Whose simulator it is, and what of it is ours: evidence says so."""

_mode: ContextVar[Any] = ContextVar("attn_dispatch_tpu_simulator", default=True)


def known_versions() -> tuple[str, str]:
    """Return the versions of JAX whose rules are the ones that are replaced here: from, and up to but without."""
    low, high = (".".join(map(str, bound)) for bound in _KNOWN_JAX)
    return low, high


def knows(version: str) -> bool:
    """Whether the simulator was written for a version of JAX."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    return _KNOWN_JAX[0] <= numbers < _KNOWN_JAX[1]


def mode() -> Any:
    """Return what kernels are interpreted with: True (as plain array operations) or `pltpu.InterpretParams`."""
    return _mode.get()


def moves_memory() -> bool:
    """Whether DMAs are simulated, and so may move a number of rows that is known only when they start."""
    return _mode.get() is not True


@contextmanager
def using(params: Any) -> Iterator[None]:
    """Interpret with these parameters inside the block: `InterpretParams` simulates DMAs, memory and races."""
    token = _mode.set(params)
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def running() -> Iterator[None]:
    """Interpret every Pallas kernel for TPUs that is called inside the block."""
    replace_rules()
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(_mode.get()):
        yield


@functools.cache
def replace_rules() -> None:
    """Replace the interpreter's rules, once per process.

    Raises:
        BackendLoadError: this JAX has no such rules.
    """
    import jax

    try:
        from jax._src.pallas import hlo_interpreter, primitives
        from jax._src.state import discharge

        load_rule, to_jaxpr = primitives._load_discharge_rule, hlo_interpreter.kernel_to_hlo_jaxpr
    except (ImportError, AttributeError) as error:
        low, high = known_versions()
        raise BackendLoadError(
            f"jax {jax.__version__} interprets Pallas kernels in another way than >={low},<{high}, which the simulator "
            f"was written for: {error}. Use one of those on a CPU"
        ) from error
    # Up to 0.10 a rule is called with (types in, types out, *arguments), later with (context, *arguments).
    _replace_masked_rules(primitives, discharge, by_types="in_avals" in inspect.signature(load_rule).parameters)
    hlo_interpreter.kernel_to_hlo_jaxpr = functools.partial(_keeping_scalars, to_jaxpr)


def _replace_masked_rules(primitives: Any, discharge: Any, by_types: bool) -> None:
    import jax.numpy as jnp

    def arguments(operands: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
        return (len(operands[0]), operands[2:]) if by_types else (len(operands[0].in_avals), operands[1:])

    def load(*operands: Any, args_tree: Any, **_: Any) -> tuple[tuple[None, ...], Any]:
        count, flat = arguments(operands)
        ref, views, mask, other = args_tree.unflatten(flat)
        value = discharge.transform_array(ref, tuple(views))
        if mask is not None and other is not None:
            value = jnp.where(mask, value, other)
        return (None,) * count, value

    def swap(*operands: Any, args_tree: Any, **_: Any) -> tuple[tuple[Any, ...], Any]:
        count, flat = arguments(operands)
        ref, views, value, mask = args_tree.unflatten(flat)
        views = tuple(views)
        if mask is not None:
            value = jnp.where(mask, value, discharge.transform_array(ref, views))
        old_value, new_ref = discharge.transform_swap_array(ref, views, value)
        return (new_ref,) + (None,) * (count - 1), old_value

    register: Callable[[Any], Callable[[Any], Any]] = discharge.register_discharge_rule
    register(primitives.load_p)(load)
    register(primitives.swap_p)(swap)


def _keeping_scalars(to_jaxpr: Callable[..., Any], jaxpr: Any, consts: Any, grid_mapping: Any) -> tuple[Any, Any, Any]:
    """Return the kernel's jaxpr with a copy of its scalars among the scratch values, which the interpreter keeps."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    kernel, consts, scratch = to_jaxpr(jaxpr, consts, grid_mapping)
    count = grid_mapping.num_index_operands
    if not count:
        return kernel, consts, scratch
    types = [variable.aval for variable in kernel.invars]

    def step(*operands: Any) -> tuple[Any, ...]:
        scalars, others, kept = operands[:count], operands[count:-count], operands[-count:]
        first = functools.reduce(jnp.logical_and, [pl.program_id(i) == 0 for i in range(len(grid_mapping.grid))], True)
        current = [jnp.where(first, *pair) for pair in zip(scalars, kept, strict=True)]
        results = jax.core.eval_jaxpr(kernel, consts, *current, *others)
        return (*results, *results[:count])

    with grid_mapping.trace_env():
        closed = jax.make_jaxpr(step)(*types, *types[:count])
    return closed.jaxpr, closed.consts, [*scratch, *types[:count]]
