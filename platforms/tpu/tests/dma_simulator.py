"""Pallas' simulator of a TPU (`pltpu.InterpretParams`: DMAs, memory that begins as NaN, bounds), for these kernels.

For tests alone. In JAX 0.10.2 to 0.12 it understands a view of a reference only if that is a plain slice; the kernels
also reshape references and reinterpret their bits. Here the slices that lead are left to the simulator (which checks
them), and the rest is applied to the value in NumPy. A store through such a view reads, changes and writes back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import dtypes
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import utils
from jax._src.state import indexing
from jax.experimental.pallas import tpu as pltpu

from attn_dispatch_tpu import simulator

try:
    from jax._src.state.types import BitcastTransform, ReshapeTransform
except ImportError:
    from jax._src.state.types import RefBitcaster as BitcastTransform
    from jax._src.state.types import RefReshaper as ReshapeTransform

__all__ = ["simulating"]


@contextmanager
def simulating(**parameters: Any) -> Iterator[None]:
    """Run kernels in the simulator inside the block; the parameters are `InterpretParams`'."""
    _teach()
    with simulator.using(pltpu.InterpretParams(**parameters)):
        yield


def _bitcast(x: Any, dtype: Any) -> Any:
    """Reinterpret bits as the hardware packs them: narrow elements of one word lie on neighbouring rows."""
    have, want = dtypes.itemsize_bits(x.dtype), dtypes.itemsize_bits(dtype)
    shape = list(x.shape)
    shape[-2] = shape[-2] * have // want
    if have == want:
        return x.view(dtype)
    if have < want:
        ratio = want // have
        rows = x.reshape(*x.shape[:-2], x.shape[-2] // ratio, ratio, x.shape[-1])
        return np.ascontiguousarray(rows.swapaxes(-1, -2)).view(dtype).reshape(shape)
    narrow = np.ascontiguousarray(x)[..., None].view(dtype).reshape(*x.shape, have // want)
    return narrow.swapaxes(-1, -2).reshape(shape)


def _seen(x: Any, view: Any) -> Any:
    if isinstance(view, ReshapeTransform):
        return x.reshape(view.shape)
    if isinstance(view, BitcastTransform):
        return _bitcast(x, view.dtype)
    assert isinstance(view, indexing.NDIndexer), view
    return x[tuple(utils._transform_slice_or_index(index) for index in view.indices)]


def _changed(x: Any, views: Sequence[Any], value: Any) -> tuple[Any, Any]:
    """Return what was seen of x through the views, and x with `value` there."""
    seen = [x]
    for view in views:
        seen.append(_seen(seen[-1], view))
    new = np.asarray(value)
    for source, view in zip(reversed(seen[:-1]), reversed(views), strict=True):
        if isinstance(view, ReshapeTransform):
            new = new.reshape(source.shape)
        elif isinstance(view, BitcastTransform):
            new = _bitcast(new, source.dtype)
        else:
            whole = np.array(source)
            whole[tuple(utils._transform_slice_or_index(index) for index in view.indices)] = new
            new = whole
    return seen[-1], new


def _split(views: Any) -> tuple[Any, Any]:
    views = jax.tree.map(int, tuple(views))
    for i, view in enumerate(views):
        if not isinstance(view, indexing.NDIndexer):
            return views[:i], views[i:]
    return views, ()


def _reading(get: Callable[..., Any]) -> Callable[..., Any]:
    def read(token: Any, device: Any, core: Any, space: Any, buffer: Any, views: Any, *more: Any, **named: Any) -> Any:
        plain, rest = _split(views)
        token, value = get(token, device, core, space, buffer, plain, *more, **named)
        for view in rest:
            value = _seen(np.asarray(value), view)
        return token, np.array(value)

    return read


def _writing(store: Callable[..., Any], get: Callable[..., Any]) -> Callable[..., Any]:
    def write(
        token: Any, device: Any, core: Any, space: Any, buffer: Any, views: Any, value: Any, *more: Any, **named: Any
    ) -> Any:
        plain, rest = _split(views)
        if rest:
            known = ("src_device_id", "src_local_core_id", "clock", "source_info")
            context = {name: named[name] for name in known if name in named}
            _, current = get(token, device, core, space, buffer, plain, **context)
            _, value = _changed(np.array(current), rest, value)
        return store(token, device, core, space, buffer, plain, value, *more, **named)

    return write


@functools.cache
def _teach() -> None:
    simulator.replace_rules()
    get, store, swap = interpreter.get, interpreter.store, interpreter.swap

    def swapped(
        token: Any, device: Any, core: Any, space: Any, buffer: Any, views: Any, value: Any, mask: Any, **named: Any
    ) -> Any:
        # A masked swap is also wrong by itself: it calls what is in bounds out of bounds when an inner axis is shorter
        # than an outer one. So the mask is applied here, and the whole written back.
        plain, rest = _split(views)
        if mask is None and not rest:
            return swap(token, device, core, space, buffer, plain, value, mask, **named)
        _, current = get(token, device, core, space, buffer, plain, **named)
        current = np.array(current)
        seen = current
        for view in rest:
            seen = _seen(seen, view)
        if mask is not None:
            if seen.shape != np.shape(value):
                return swap(token, device, core, space, buffer, plain, value, mask, **named)
            value = np.where(np.asarray(mask), np.asarray(value), seen)
        old, new = _changed(current, rest, value)
        token, _ = swap(token, device, core, space, buffer, plain, new, None, **named)
        return token, np.array(old)

    reading, writing = _reading(get), _writing(store, get)
    # DMAs go past the outermost wrapper.
    reading.__wrapped__ = _reading(get.__wrapped__)  # type: ignore[attr-defined]
    writing.__wrapped__ = _writing(store.__wrapped__, get.__wrapped__)  # type: ignore[attr-defined]
    interpreter.get, interpreter.store, interpreter.swap = reading, writing, swapped
