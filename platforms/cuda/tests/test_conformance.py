"""The kit, on each backend of this folder; without an NVIDIA GPU each says so."""

from attn_dispatch.conformance import BackendConformance


class TestFlashAttention(BackendConformance):
    backend = "cuda/flash-attention"


class TestFlashInfer(BackendConformance):
    backend = "cuda/flashinfer"


class TestXformers(BackendConformance):
    backend = "cuda/xformers"
