"""Models of NVIDIA GPUs and their compute capabilities: the kernels that exist for a GPU follow from it.

The driver's files name the model and nothing else; asking CUDA would make a context, asking NVML costs 50 ms and loads
the driver's library. The table is NVIDIA's own list (https://developer.nvidia.com/cuda-gpus).
"""

from __future__ import annotations

import re

from attn_dispatch.errors import EnvironmentVariableError
from attn_dispatch.hardware import Device

__all__ = ["Capability", "capability_from", "capability_of", "sm"]

Capability = tuple[int, int]

# The first that matches decides: a name that contains another stands before it.
_MODELS: tuple[tuple[str, Capability], ...] = (
    (r"\b(GB300|B300)\b", (10, 3)),
    (r"\b(GB200|GB100|B200|B100)\b", (10, 0)),
    (r"\bGB10\b", (12, 1)),
    (r"\bBlackwell\b|RTX 50\d0|RTX PRO \d000", (12, 0)),
    (r"\bThor\b|tegra264", (11, 0)),
    (r"\b(GH200|H200|H100|H800|H20)\b", (9, 0)),
    (r"\b(L4|L20|L40|L40S|L2)\b|\bAda\b|RTX 40\d0", (8, 9)),
    (r"\bOrin\b|tegra234", (8, 7)),
    (r"\b(A100|A800|A30|A30X|A100X)\b", (8, 0)),
    (r"\b(A2|A10|A10G|A10M|A16|A40)\b|RTX 30\d0|RTX A\d{3,4}", (8, 6)),
    (r"\b(T4|T4G|T10)\b|RTX 20\d0|TITAN RTX|Quadro RTX|GTX 16\d0", (7, 5)),
    (r"\bXavier\b|tegra194", (7, 2)),
    (r"\b(V100|V100S)\b|TITAN V\b", (7, 0)),
    (r"\b(P4|P40)\b|GTX 10\d0|TITAN X", (6, 1)),
    (r"\bP100\b", (6, 0)),
)


def capability_of(device: Device) -> Capability | None:
    """Return a GPU's compute capability by its model, or None for a model that is not in the table."""
    for text in (device.name, device.facts.get("soc", "")):
        name = text.replace("-", " ")
        for pattern, capability in _MODELS:
            if re.search(pattern, name):
                return capability
    return None


def capability_from(text: str, variable: str) -> Capability:
    """Read a capability that somebody wrote down.

    Raises:
        EnvironmentVariableError: it is not like "9.0".
    """
    match = re.fullmatch(r"\s*(\d{1,2})\.(\d)\s*", text)
    if match is None:
        raise EnvironmentVariableError(f"{variable}={text!r} is not a compute capability, as in {variable}=9.0")
    return int(match[1]), int(match[2])


def sm(capability: Capability) -> str:
    """Return `sm_90`."""
    return f"sm_{capability[0]}{capability[1]}"
