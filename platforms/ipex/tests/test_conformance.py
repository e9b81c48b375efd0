"""The kit, on each backend of this folder; what has no hardware here is skipped with that reason."""

from attn_dispatch.conformance import BackendConformance


class TestPagedCpu(BackendConformance):
    backend = "ipex/paged-cpu"


class TestPagedXpu(BackendConformance):
    backend = "ipex/paged-xpu"


class TestVllmXpu(BackendConformance):
    backend = "ipex/vllm-xpu"
