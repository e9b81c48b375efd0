"""Facts of torch_xla's ragged paged attention kernel."""

__all__ = ["LANES"]

LANES = 128
"""Elements of the kernel's heads; smaller ones are padded."""
