"""A vendor's call: what it is given, and what it returns, in the contract's terms."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attn_dispatch.errors import BackendLoadError

if TYPE_CHECKING:
    from .layer import Owned
    from .step import Step

__all__ = ["Call"]


class Call(ABC):
    """One function of a vendor. `arguments` depends on a step alone, so that it can be held against the real signature.

    Attributes:
        module: where the function is.
        function: its name.
        spare: how many places it may look up beyond the last key (None: it is not told places).
    """

    module: ClassVar[str]
    function: ClassVar[str]
    spare: ClassVar[int | None] = None

    def sinks_inside(self, step: Step) -> bool:
        """Whether the function takes sinks itself."""
        return False

    def check(self, step: Step) -> None:
        """Refuse what the function would compute wrongly, before anything is written.

        Raises:
            CacheError: it does not reach what the step needs.
        """
        return

    @abstractmethod
    def arguments(
        self,
        step: Step,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor,
        *,
        lse: bool,
    ) -> Mapping[str, Any]:
        """Return what the function is given, by name.

        Args:
            step: the batch.
            q: [T, H, D].
            key: NHD blocks [N, B, K, D], or rows [n, K, D] without a cache; value likewise.
            value: see key.
            owned: what the layer owns.
            out: [T, H, Dv], contiguous.
            lse: the LSE is wanted.
        """

    def attend(
        self,
        step: Step,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        owned: Owned,
        out: torch.Tensor,
        *,
        lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call it; return the output [T, H, Dv] and the LSE f32[T, H] when wanted."""
        result = self.load()(**self.arguments(step, q, key, value, owned, out, lse=lse))
        return self.results(result, out, lse)

    def results(self, result: Any, out: torch.Tensor, lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output and the LSE from what the function returned."""
        return out, None

    def load(self) -> Any:
        """Return the function, imported when first wanted.

        Raises:
            BackendLoadError: the package is installed, but does not import.
        """
        found = _loaded.get((self.module, self.function))
        if found is None:
            try:
                found = getattr(importlib.import_module(self.module), self.function)
            except Exception as error:  # whatever a vendor dies of is the reason
                text = f"{type(error).__name__}: {error}"
                raise BackendLoadError(f"{self.module} is installed but does not import ({text})") from error
            _loaded[self.module, self.function] = found
        return found


_loaded: dict[tuple[str, str], Any] = {}
