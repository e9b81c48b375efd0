"""GPUs that Triton compiles for, and what a kernel may take of each. No vendor.

Triton's compiler does not hold a kernel against the target's shared memory: the compile check does, with this table.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INTERPRETER", "LARGEST_EXACT_HEAD", "LARGEST_HEAD", "TARGETS", "Target", "target_of"]

LARGEST_HEAD = 1024
"""Beyond it even the smallest tile spills registers on every GPU, or does not fit (the compile check shows both)."""

LARGEST_EXACT_HEAD = 512
"""The same of float32 operands: at 1024 they need 128 KiB of shared memory, and spill."""


_KIB = 1024


@dataclass(frozen=True)
class Target:
    """One kind of GPU.

    Attributes:
        backend: as Triton calls it: "cuda", "hip", "xpu".
        arch: compute capability times ten (cuda), or the gfx name (hip).
        warp_size: threads that run together.
        shared_bytes: what one block of threads may have (shared memory; LDS).
        registers: what one thread may have before it spills.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    registers: int

    @property
    def family(self) -> str:
        """Whose tiles fit: "hopper", "ampere", "cdna4", "cdna" or "rdna".

        NVIDIA's with 227 KiB and matrix instructions of four warps; NVIDIA's others; AMD's with waves of 64, and 160 or
        64 KiB; AMD's with waves of 32. Intel's are taken as the last, the smallest.
        """
        if self.backend == "cuda":
            return "hopper" if self.shared_bytes > 200 * _KIB else "ampere"
        if self.warp_size != 64:
            return "rdna"
        return "cdna4" if self.shared_bytes > 64 * _KIB else "cdna"

    @property
    def name(self) -> str:
        """As people write it: sm_90, gfx942."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (maximum per block, opted into);
# AMD: CDNA 2, 3, 4 and RDNA 3 instruction set documents (LDS per work group).
TARGETS: tuple[Target, ...] = (
    Target("cuda", 80, 32, 163 * _KIB, 255),
    Target("cuda", 86, 32, 99 * _KIB, 255),
    Target("cuda", 89, 32, 99 * _KIB, 255),
    Target("cuda", 90, 32, 227 * _KIB, 255),
    Target("cuda", 100, 32, 227 * _KIB, 255),
    Target("cuda", 120, 32, 99 * _KIB, 255),
    Target("hip", "gfx90a", 64, 64 * _KIB, 512),
    Target("hip", "gfx942", 64, 64 * _KIB, 512),
    Target("hip", "gfx950", 64, 160 * _KIB, 512),
    Target("hip", "gfx1100", 32, 64 * _KIB, 256),
    Target("hip", "gfx1201", 32, 64 * _KIB, 256),
)

INTERPRETER = Target("interpreter", "cpu", 1, 1 << 30, 1 << 30)
"""Triton's interpreter: NumPy, one tile after the other."""


def target_of(backend: str, arch: int | str, warp_size: int) -> Target:
    """Return what is known of a GPU; of one that is not in the table, the least that its maker's others have."""
    name = str(arch).partition(":")[0]  # HIP appends features: gfx90a:sramecc+:xnack-
    for target in TARGETS:
        if target.backend == backend and str(target.arch) == name:
            return target
    alike = [target for target in TARGETS if target.backend == backend]
    shared = min((target.shared_bytes for target in alike), default=64 * _KIB)
    return Target(backend, arch, warp_size, shared, min((target.registers for target in alike), default=128))
