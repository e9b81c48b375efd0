"""Paged attention on TPUs through Pallas kernels: the backend `tpu/pallas` (see `backend.py`)."""
