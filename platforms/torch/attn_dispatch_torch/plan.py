"""The plan of `torch/sdpa`, which becomes steps on devices when they are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attn_dispatch import Plan

if TYPE_CHECKING:
    from .step import Step

__all__ = ["SdpaPlan"]


@dataclass(slots=True, eq=False, kw_only=True)
class SdpaPlan(Plan):
    """A batch for every layer of a spec.

    Attributes:
        steps: what is on a device, by (device, whether the log-sum-exp is wanted): made at the first run there.
    """

    steps: dict[tuple[Any, bool], Step] = field(default_factory=dict)
