"""What a compiled kernel may take of a target: the bounds of the compile check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_dispatch_triton.constants import compute_type
from attn_dispatch_triton.targets import Target

from .matrix import Row

if TYPE_CHECKING:
    from .compiling import Compiled

__all__ = ["SPILLS", "judge"]

SPILLS: dict[tuple[str, str], int] = {
    ("sm_100", "prefill, D 64 bf16 B 16"): 6,
    ("sm_100", "prefill, D 64 bf16 B 16, one kv head"): 6,
    ("sm_120", "prefill, D 128 bf16, fp8 cache"): 4,
    ("gfx1100", "prefill, D 192 / 128 bf16 B 64"): 24,
    ("gfx1100", "decode, D 192 / 128 bf16 B 64"): 8,
    ("gfx1100", "prefill, D 256 bf16 B 32"): 40,
    ("gfx1100", "decode, D 256 bf16 B 32"): 24,
    ("gfx1100", "prefill, D 512 bf16 B 32"): 103,
    ("gfx1100", "decode, D 512 bf16 B 32"): 103,
    ("gfx1100", "prefill, D 1024 bf16"): 405,
    ("gfx1100", "decode, D 1024 bf16"): 405,
    ("gfx1100", "decode, D 576 / 512 bf16 B 64, one kv head"): 374,
    ("gfx1201", "decode, D 128 bf16 B 16, everything"): 4,
    ("gfx1201", "decode, D 80 fp16 B 256"): 4,
    ("gfx1201", "prefill, D 1024 bf16"): 138,
    ("gfx1201", "decode, D 1024 bf16"): 139,
    ("gfx1201", "decode, D 576 / 512 bf16 B 64, one kv head"): 106,
    # An option that is off: beside its loop stands the one that computes a tile again.
    ("sm_100", "decode, fixed maximum, D 128 fp16, int8 cache"): 10,
    ("gfx1100", "decode, fixed maximum, D 128 bf16 B 16"): 144,
    ("gfx1100", "decode, fixed maximum, D 128 fp16, int8 cache"): 108,
    ("gfx1201", "decode, fixed maximum, D 128 bf16 B 16"): 6,
    ("gfx1201", "decode, fixed maximum, D 128 fp16, int8 cache"): 1,
    # Heads that are no multiple of 16 elements: their rows are read element by element.
    ("sm_80", "prefill, D 72 bf16 B 1"): 140,
    ("sm_86", "prefill, D 72 bf16 B 1"): 148,
    ("sm_86", "decode, D 72 bf16 B 1"): 66,
    ("sm_89", "prefill, D 72 bf16 B 1"): 148,
    ("sm_89", "decode, D 72 bf16 B 1"): 66,
    ("sm_90", "prefill, D 72 bf16 B 1"): 110,
    ("sm_90", "decode, D 72 bf16 B 1"): 104,
    ("sm_100", "prefill, D 72 bf16 B 1"): 142,
    ("sm_100", "decode, D 72 bf16 B 1"): 63,
    ("sm_120", "prefill, D 72 bf16 B 1"): 174,
    ("sm_120", "decode, D 72 bf16 B 1"): 60,
    ("sm_86", "prefill, D 33 bf16 B 17"): 48,
    ("sm_89", "prefill, D 33 bf16 B 17"): 48,
    ("sm_120", "prefill, D 33 bf16 B 17"): 24,
    ("sm_80", "prefill, D 512 fp32"): 16,
    ("sm_90", "prefill, D 512 fp32"): 4,
    ("sm_100", "prefill, D 512 fp32"): 4,
    ("sm_120", "prefill, D 512 fp32"): 4,
    ("gfx1100", "prefill, D 512 fp32"): 464,
    ("gfx1100", "decode, D 512 fp32"): 462,
    ("gfx1201", "prefill, D 512 fp32"): 463,
    ("gfx1201", "decode, D 512 fp32"): 463,
}
"""What may spill, by (target, row), as measured with Triton 3.9.0: a later compiler or kernel must not exceed it. All
else: nothing. No tile that RDNA 3 offers to heads of 256 and more leaves them all in registers."""


def judge(target: Target, row: Row, result: Compiled) -> str:
    """Return how a kernel is out of bounds, or ""."""
    wrong = []
    if result.shared_bytes > target.shared_bytes:
        wrong.append(f"{result.shared_bytes} bytes of shared memory, {target.name} has {target.shared_bytes}")
    allowed = SPILLS.get((target.name, row.name), 0)
    if result.spills > allowed:
        wrong.append(f"{result.spills} spills, {allowed} are written down")
    if result.registers > target.registers:
        wrong.append(f"{result.registers} registers, {target.name} has {target.registers}")
    # NVIDIA has no matrix instruction for unrounded float32.
    exact = compute_type(row.spec, row.paged) == "float32"
    if row.kernel in ("prefill", "decode", "undivided") and not exact and not result.matrix:
        wrong.append("no matrix instruction")
    return "; ".join(wrong)
