"""The kit, in the simulator: the kernel as plain array operations (see test_simulator.py for DMAs and memory)."""

from __future__ import annotations

from typing import ClassVar

from attn_dispatch.conformance import BackendConformance


class TestPallas(BackendConformance):
    backend = "tpu/pallas"
    examples: ClassVar[int] = 25  # each that is accepted is compiled, twice
