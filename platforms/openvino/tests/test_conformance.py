"""The conformance kit on the real runtime."""

from attn_dispatch.conformance import BackendConformance


class TestPaged(BackendConformance):
    backend = "openvino/paged"
