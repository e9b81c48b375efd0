"""The kit: on a GPU all of it; in Triton's interpreter (TRITON_INTERPRET=1) its subset for simulators."""

from attn_dispatch.conformance import BackendConformance


class TestPaged(BackendConformance):
    backend = "triton/paged"
