"""GPUs that Triton compiles for, the memory that a kernel may share on each, and the tiles that fit. No vendor.

Triton's compiler does not hold a kernel against the target's shared memory; the tiles here are chosen to fit, and the
compile cell checks that they do.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INTERPRETER", "TARGETS", "Target", "Tiles", "decode_tiles", "padded", "prefill_tiles", "target_of"]

LARGEST_HEAD = 512
"""Beyond it no tile of keys and values fits in 64 KiB beside its queries."""


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
    def name(self) -> str:
        """As people write it: sm_90, gfx942."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


_KIB = 1024

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


@dataclass(frozen=True)
class Tiles:
    """How much one program of a kernel takes at a time.

    Attributes:
        rows: query rows (BLOCK_M).
        keys: keys of one step (BLOCK_N).
        warps: of one program.
        stages: steps whose keys are under way at once.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """Return a head size as kernels compute it: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


def prefill_tiles(target: Target, head_size: int, value_size: int, compute_bytes: int) -> Tiles:
    """Return the tiles of prefill: many rows, so that each key that was read serves as many as possible."""
    if target == INTERPRETER:
        return Tiles(64, 32, 1, 1)
    # A row's share of registers and shared memory, against that of a 128-wide head in 16 bits.
    width = max(padded(head_size), padded(value_size)) * compute_bytes
    rows = 128 if width <= 256 else 64 if width <= 512 else 32 if width <= 1024 else 16
    return Tiles(rows, _keys(width), 4, _stages(target, width))


def decode_tiles(target: Target, head_size: int, value_size: int, compute_bytes: int, rows: int) -> Tiles:
    """Return the tiles of decode for sequences of at most this many rows."""
    if target == INTERPRETER:
        return Tiles(min(padded(rows), 32), 32, 1, 1)
    width = max(padded(head_size), padded(value_size)) * compute_bytes
    most = 64 if width <= 256 else 32 if width <= 512 else 16
    return Tiles(min(padded(rows), most), _keys(width), 4, _stages(target, width))


def _keys(width: int) -> int:
    return 64 if width <= 256 else 32 if width <= 512 else 16


def _stages(target: Target, width: int) -> int:
    if target.backend != "cuda":
        return 1  # 64 KiB of LDS hold one step's keys and values beside the queries
    return 3 if target.shared_bytes >= 160 * _KIB and width <= 256 else 2
