"""The conformance kit: everything that the contract asks of a backend."""

from attn_dispatch.conformance import BackendConformance


class TestNumba(BackendConformance):
    backend = "cpu/numba"
