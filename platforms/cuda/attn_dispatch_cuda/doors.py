"""Doors: where a vendor's functions would be entered, its real signatures stand and say what may pass.

FlashAttention's are read from its sources (none of its packages is imported), FlashInfer's and xFormers' from the
installed packages, which import without a GPU.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from .flash_versions import Installed
from .signatures import signature

__all__ = ["Doors", "FlashDoor", "flashinfer_doors", "xformers_doors"]


_FLASHINFER = (
    "BatchAttention",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "append_paged_kv_cache",
)


class Doors:
    """Where a vendor's functions would be entered: what they are given is held against their signatures, and counted.

    Nothing is computed behind them: they return zeros in the shapes that the vendor returns.

    Attributes:
        entered: calls.
        planned: batches, by the class of what planned them.
    """

    def __init__(self) -> None:
        self.entered = 0
        self.planned: Counter[str] = Counter()

    def hold(self, vendor: inspect.Signature, *given: Any, **named: Any) -> dict[str, Any]:
        """Bind arguments and look at the arrays among them; return them by name.

        Raises:
            TypeError: they do not bind, or one would be swallowed by a `*args` that the vendor only has for the past.
            ValueError: an array is not as kernels take it.
        """
        found = vendor.bind(*given, **named).arguments
        for name, value in found.items():
            if vendor.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                raise TypeError(f"{name} swallows {value!r}: the function has no such argument")
            for array in value if isinstance(value, tuple) else (value,):
                if isinstance(array, torch.Tensor):
                    _looked_at(name, array)
        self.entered += 1
        return found


def _looked_at(name: str, array: torch.Tensor) -> None:
    if array.dim() and array.stride(-1) != 1:
        raise ValueError(f"{name} has strides {array.stride()}: kernels need its last dimension dense")
    if array.dtype == torch.int32 and not array.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    if array.dtype in (torch.int64, torch.float64):
        raise ValueError(f"{name} is {array.dtype}: kernels take int32 and at most float32")


class FlashDoor(Doors):
    """A version's module."""

    def __init__(self, one: Installed) -> None:
        super().__init__()
        inside = {"fa2": "flash_attn_interface.py", "fa4": "cute/interface.py"}.get(one.kind)
        self._file = one.where / inside if inside else one.where

    def __getattr__(self, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        vendor = signature(self._file, name)

        def function(*given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.hold(vendor, *given, **named)
            q, value = found["q"], found["v" if "v" in found else "v_cache"]
            *_, tokens, heads, _ = q.shape
            lse = q.new_zeros((*q.shape[:-3], heads, tokens), dtype=torch.float32)
            return q.new_zeros((*q.shape[:-1], value.shape[-1])), lse

        return function


@contextmanager
def flashinfer_doors() -> Iterator[Doors]:
    """Put doors in the place of FlashInfer's wrappers and functions."""
    wrappers: Any = import_module(".flashinfer_wrappers", __package__)
    vendor = wrappers.flashinfer
    doors = Doors()

    def door(kind: type[Any]) -> type[Any]:
        class Door:
            def __init__(self, *given: Any, **named: Any) -> None:
                doors.hold(inspect.signature(kind), *given, **named)

            def plan(self, *given: Any, **named: Any) -> None:
                # The decode wrapper's own `plan` takes anything and hands it on.
                function = getattr(kind, "_plan_impl", kind.plan)
                doors.hold(inspect.signature(function), self, *given, **named)
                doors.planned[kind.__name__] += 1

            def run(self, *given: Any, **named: Any) -> None:
                found = doors.hold(inspect.signature(kind.run), self, *given, **named)
                for name in ("out", "lse"):  # what the vendor writes
                    if found.get(name) is not None:
                        found[name].zero_()

        return Door

    def function(real: Callable[..., Any]) -> Callable[..., None]:
        def entered(*given: Any, **named: Any) -> None:
            doors.hold(inspect.signature(real), *given, **named)

        return entered

    behind = {name: getattr(vendor, name) for name in _FLASHINFER}
    for name, real in behind.items():
        setattr(vendor, name, door(real) if inspect.isclass(real) else function(real))
    try:
        yield doors
    finally:
        for name, real in behind.items():
            setattr(vendor, name, real)
        wrappers.forget(torch.device("cpu"))


@contextmanager
def xformers_doors() -> Iterator[Doors]:
    """Put a door in the place of xFormers' operator, where also its own reasons against the inputs are heard."""
    steps: Any = import_module(".xformers_step", __package__)
    doors = Doors()
    vendor = steps.FwOp
    about_here = ("device=cpu", "triton is not available", "bf16 is only supported on A100+")

    def apply(*given: Any, **named: Any) -> tuple[torch.Tensor, Any]:
        found = doors.hold(inspect.signature(vendor.apply), *given, **named)
        inputs = found["inp"]
        inputs.validate_inputs()
        reasons = vendor.not_supported_reasons(inputs)
        if against := [reason for reason in reasons if not any(word in reason for word in about_here)]:
            raise ValueError("; ".join(against))
        query = inputs.query
        _, tokens, groups, heads, _ = query.shape
        lse = query.new_zeros((1, groups, heads, tokens), dtype=torch.float32)
        return torch.zeros_like(query), SimpleNamespace(lse=lse)

    steps.FwOp = SimpleNamespace(apply=apply)
    try:
        yield doors
    finally:
        steps.FwOp = vendor
