"""The vendors' real packages, as files to compare with: `python -m platforms.rocm.evidence.packages` fetches them once.

Neither can be installed without ROCm: `import aiter` asks for a GPU, flash-attn is compiled by the ROCm toolchain.
Their sources say what their functions take and how far their kernels go.
"""

from __future__ import annotations

import sys

from attn_dispatch.adapters.environment import cache_folder
from attn_dispatch.conformance.interface import Package

__all__ = ["AITER", "COMMAND", "FLASH_ATTN", "PACKAGES"]

COMMAND = "python -m platforms.rocm.evidence.packages"

# Of the wheel's 9,000 files: Python, AITER's own HIP, and the parts of Composable Kernel that attention is made of.
_AITER = ("aiter/", "aiter_meta/csrc/", "ops/fmha/", "example/ck_tile/01_fmha/", ".dist-info/")
_AITER_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".jinja", ".json", "METADATA", "RECORD", "WHEEL")


def _of_attention(file: str) -> bool:
    return any(part in file for part in _AITER) and file.endswith(_AITER_SUFFIXES)


def _without_other_kernels(file: str) -> bool:
    """Leave out the kernels for another maker's GPUs, and CUTLASS: most of the archive."""
    return "/csrc/" not in file or "/csrc/flash_attn_ck/" in file


_FOLDER = cache_folder("vendors", "rocm")
AITER = Package("amd-aiter==0.1.7.post2.dev18", _FOLDER, keeps=_of_attention)
FLASH_ATTN = Package(
    "flash-attn==2.8.3.post2",
    _FOLDER,
    options=("--no-binary", ":all:", "--no-build-isolation"),
    environment=(("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE"),),
    keeps=_without_other_kernels,
)
PACKAGES = {"amd-aiter": AITER, "flash-attn": FLASH_ATTN}

if __name__ == "__main__":
    for name in sys.argv[1:] or PACKAGES:
        print(f"{PACKAGES[name].requirement}: {PACKAGES[name].fetch()}")
