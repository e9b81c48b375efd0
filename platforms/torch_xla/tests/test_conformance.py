"""The kit, on the CPU: PJRT's device, torch_xla's plain XLA form."""

from __future__ import annotations

from typing import ClassVar

from attn_dispatch.conformance import BackendConformance


class TestRagged(BackendConformance):
    backend = "torch_xla/ragged"
    examples: ClassVar[int] = 10  # each that is accepted is compiled
    max_tokens: ClassVar[int] = 701
    max_scores: ClassVar[int] = 60_000
