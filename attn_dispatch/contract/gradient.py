"""Gradients: attention over a paged cache has none, and says so when one is asked for. torch is never imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from attn_dispatch.contract.arrays import Array
from attn_dispatch.errors import GradientError

__all__ = ["without_gradient"]

_barrier: list[Any] = []  # torch's autograd function, once it is needed


def without_gradient(result: Any, inputs: Sequence[Array | None]) -> Any:
    """Return a result that is part of the graph of its inputs, but whose backward raises: no gradient vanishes.

    Args:
        result: a torch tensor, or a tuple of them, computed without a graph.
        inputs: the tensors that it was computed from.
    """
    torch = sys.modules["torch"]
    if not torch.is_grad_enabled():
        return result
    if not _barrier:
        _barrier.append(_make_barrier(torch))
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if isinstance(result, tuple):
        return tuple(_barrier[0].apply(part, *wanted) for part in result)
    return _barrier[0].apply(result, *wanted)


def _make_barrier(torch: Any) -> Any:
    class NoGradient(torch.autograd.Function):  # type: ignore[misc]
        """The identity, with a backward that raises."""

        @staticmethod
        def forward(ctx: Any, result: Any, *inputs: Any) -> Any:
            return result.view_as(result)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise GradientError(
                "attention over a paged cache has no gradient: it is for inference. Wrap inference in torch.no_grad() "
                "or torch.inference_mode(), and train with another attention implementation"
            )

    return NoGradient
