"""The vendors' real packages, as files to compare with: `python -m platforms.cuda.evidence.packages` fetches them once.

None of these is installed: FlashAttention 2 would take hours to compile, 3 and 4 need a GPU's libraries to be imported,
and FlashAttention 4 without 2 keeps xFormers from being imported. Their sources say what their functions take.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from attn_dispatch.adapters.environment import make_cache_folder
from attn_dispatch.conformance.interface import Package

__all__ = ["needed", "packages"]


def packages() -> Mapping[str, Package]:
    """Return the packages by name."""
    folder = make_cache_folder("vendors")
    return {
        "flash-attn": Package(
            "flash-attn==2.8.3.post2",
            folder,
            ("--no-binary", ":all:", "--no-build-isolation"),
            (("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE"),),
            # Sources of kernels, of CUTLASS and of another maker's GPUs are most of it, and are not read here.
            lambda name: "/csrc/" not in name,
        ),
        "flash-attn-4": Package("flash-attn-4==4.0.0b36", folder),
        "fa3-fwd": Package("fa3-fwd==0.0.3", folder),
        # Of vLLM its FlashAttention 3 alone, one file out of several hundred MB: the build that has paged caches.
        "vllm": Package(
            "vllm==0.33.0", folder, keeps=lambda name: name.endswith(("_vllm_fa3_C.abi3.so", ".dist-info/METADATA"))
        ),
    }


def needed(name: str) -> Path:
    """Return the folder of a package's files.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    return packages()[name].needed("python -m platforms.cuda.evidence.packages")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--folder"]:  # for shells
        print(packages()[sys.argv[2]].fetch())
    else:
        for package in packages().values():
            print(f"{package.requirement}: {package.fetch()}")
