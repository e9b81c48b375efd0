"""The kit: on a GPU all of it; in Triton's interpreter (TRITON_INTERPRET=1) what ends in reasonable time."""

from attn_dispatch.conformance import BackendConformance
from attn_dispatch_triton.paged import interpreted


class TestPaged(BackendConformance):
    backend = "triton/paged"
    max_tokens = 170 if interpreted() else 1 << 30
    examples = 12 if interpreted() else 60
