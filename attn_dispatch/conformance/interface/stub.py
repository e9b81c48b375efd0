"""`SignatureStub`: stands where a vendor's function would be entered, and checks what it is given."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from attn_dispatch.contract.arrays import library_of
from attn_dispatch.errors import ArrayError

__all__ = ["SignatureStub"]


class SignatureStub:
    """Calls that would enter a vendor's functions, checked against the functions' real signatures, and counted.

    Attributes:
        calls: by the function's name.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def bind(self, name: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Bind a call's arguments and check the arrays among them; return all by name, defaults left out.

        Args:
            name: of the function, to count by.
            signature: of the real function.
            args: of the call.
            kwargs: of the call.

        Raises:
            TypeError: they do not bind, or one would be swallowed by a `*args` that the vendor only has for the past.
            ValueError: an array is not as kernels take it.
        """
        bound = signature.bind(*args, **kwargs).arguments
        for parameter, value in bound.items():
            if signature.parameters[parameter].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                raise TypeError(f"{parameter} swallows {value!r}: {name} has no such argument")
            for element in value if isinstance(value, tuple) else (value,):
                _check_array(parameter, element)
        self.calls[name] += 1
        return bound


def _check_array(name: str, value: Any) -> None:
    try:
        if library_of(value) != "torch" or not value.ndim:
            return
    except ArrayError:
        return
    dtype = str(value.dtype).removeprefix("torch.")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name} has strides {value.stride()}: kernels need its last dimension dense")
    if dtype == "int32" and not value.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    if dtype in ("int64", "float64"):
        raise ValueError(f"{name} is {dtype}: kernels take int32 and at most float32")
