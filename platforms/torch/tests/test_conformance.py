"""The kit against torch/sdpa."""

from __future__ import annotations

from attn_dispatch.conformance import BackendConformance


class TestSdpa(BackendConformance):
    backend = "torch/sdpa"
