"""The kernels on a CPU: Pallas' interpreter, put right where it cannot read this kernel. Never imported on a TPU.

JAX 0.10.2 to 0.12 interpret loads and stores with a mask (`pltpu.load`, `pltpu.store`) by two rules that fail on a
static index and that drop all but the last of several nested views. Both are stated anew here, by JAX's own general
functions for the same thing. Interpreting shows what a kernel computes; that the TPU's compiler takes it is shown by
`compile_cell.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from attn_dispatch.errors import BackendLoadError

__all__ = ["KNOWN_JAX", "mode", "moves_memory", "running", "using"]

KNOWN_JAX = ((0, 10, 2), (0, 13))
"""The versions of JAX whose rules are the ones that are replaced here: from, and up to but without."""

_mode: ContextVar[Any] = ContextVar("attn_dispatch_tpu_simulator", default=True)


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
    _mend()
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(_mode.get()):
        yield


@functools.cache
def _mend() -> None:
    import jax

    try:
        from jax._src.pallas import primitives
        from jax._src.state import discharge

        rule = primitives._load_discharge_rule
    except (ImportError, AttributeError) as error:
        raise BackendLoadError(
            f"jax {jax.__version__} interprets Pallas kernels in another way than {KNOWN_JAX[0]}..{KNOWN_JAX[1]}, "
            f"which the simulator was written for: {error}. Use one of those on a CPU"
        ) from error
    # Up to 0.10 a rule is called with (types in, types out, *arguments), later with (context, *arguments).
    old = "in_avals" in inspect.signature(rule).parameters

    def arguments(given: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
        return (len(given[0]), given[2:]) if old else (len(given[0].in_avals), given[1:])

    import jax.numpy as jnp

    def load(*given: Any, args_tree: Any, **_: Any) -> tuple[tuple[None, ...], Any]:
        count, flat = arguments(given)
        ref, views, mask, other = args_tree.unflatten(flat)
        value = discharge.transform_array(ref, tuple(views))
        if mask is not None and other is not None:
            value = jnp.where(mask, value, other)
        return (None,) * count, value

    def swap(*given: Any, args_tree: Any, **_: Any) -> tuple[tuple[Any, ...], Any]:
        count, flat = arguments(given)
        ref, views, value, mask = args_tree.unflatten(flat)
        views = tuple(views)
        if mask is not None:
            value = jnp.where(mask, value, discharge.transform_array(ref, views))
        old_value, new_ref = discharge.transform_swap_array(ref, views, value)
        return (new_ref,) + (None,) * (count - 1), old_value

    register: Callable[[Any], Callable[[Any], Any]] = discharge.register_discharge_rule
    register(primitives.load_p)(load)
    register(primitives.swap_p)(swap)
