"""The whole contract, in five lines: a yes must compute correctly, a no is skipped with its own reason."""

from attn_dispatch.conformance import BackendConformance


class TestPaged(BackendConformance):
    backend = "template/paged"
