"""Which OpenVINO device computes, and with how many threads: read from the environment."""

from __future__ import annotations

import os
import re

from attn_dispatch.errors import EnvironmentVariableError

__all__ = ["VARIABLE", "device_name", "num_threads"]

VARIABLE = "ATTN_DISPATCH_OPENVINO_DEVICE"
"""The OpenVINO device to compute on: CPU (the default), GPU or GPU.<number>."""

_THREADS = "ATTN_DISPATCH_NUM_THREADS"
_DEVICE = re.compile(r"CPU|GPU(\.\d+)?")


def device_name() -> str:
    """Return the OpenVINO device that the environment asks for.

    Raises:
        EnvironmentVariableError: it is neither the CPU nor a GPU.
    """
    name = os.environ.get(VARIABLE) or "CPU"
    if not _DEVICE.fullmatch(name):
        raise EnvironmentVariableError(f"{VARIABLE}={name!r} is not a device. Known: CPU, GPU, GPU.<number>")
    return name


def num_threads() -> int:
    """Return how many threads the op may use: what the core's variable says, else what the process was given.

    OpenVINO fixes the number when a model is compiled, and by itself would take the whole machine.

    Raises:
        EnvironmentVariableError: it is not a whole number, 1 or more.
    """
    text = os.environ.get(_THREADS)
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise EnvironmentVariableError(f"{_THREADS}={text!r} must be a whole number, 1 or more")
    return int(text)
