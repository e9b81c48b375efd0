"""The kit, on each backend of this folder; without an AMD GPU each says so."""

from attn_dispatch.conformance import BackendConformance


class TestAiter(BackendConformance):
    backend = "rocm/aiter"


class TestFlashAttention(BackendConformance):
    backend = "rocm/flash-attention"
