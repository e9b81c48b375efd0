"""A vendor's function: what it is given, and what it returns, in the contract's terms."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.errors import BackendLoadError

if TYPE_CHECKING:
    import torch

__all__ = ["VendorFunction"]


class VendorFunction(ABC):
    """One function of a vendor. Its arguments depend on a call alone, so that they can be checked without a GPU.

    Attributes:
        module: where it is.
        name: its own.
        takes_sinks: it takes sinks itself.
    """

    module: ClassVar[str]
    name: ClassVar[str]
    takes_sinks: ClassVar[bool] = False

    @abstractmethod
    def arguments(self, call: DeviceCall) -> dict[str, Any]:
        """Return what it is given, by name."""

    @abstractmethod
    def result(self, returned: Any, arguments: dict[str, Any], call: DeviceCall) -> tuple[Any, Any]:
        """Return the output [T, H, Dv] and the LSE f32[T, H] (None: not wanted) from what it returned."""

    @cached_property
    def function(self) -> Any:
        """The function, imported when first needed.

        Raises:
            BackendLoadError: the package is installed, but does not import.
        """
        try:
            return getattr(importlib.import_module(self.module), self.name)
        except Exception as error:  # a vendor may raise anything; its text is the reason
            text = f"{type(error).__name__}: {error}"
            raise BackendLoadError(f"{self.module} is installed but does not import ({text})") from error

    def attend(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call it; return the output [T, H, Dv] and, when wanted, the LSE, natural, f32[T, H]."""
        arguments = self.arguments(call)
        return self.result(self.function(**arguments), arguments, call)
