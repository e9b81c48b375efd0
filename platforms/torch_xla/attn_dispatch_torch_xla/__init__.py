"""Ragged paged attention of torch_xla: the backend `torch_xla/ragged` (see `ragged.py`)."""
