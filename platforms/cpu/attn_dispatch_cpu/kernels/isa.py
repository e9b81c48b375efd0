"""What the machine's vector unit looks like: chosen once, from the CPU's own flags, at run time.

The kernels are written once over "a vector of `lanes` floats" and register tiles of a given size; LLVM turns them
into AVX-512, AVX2 or NEON. Three facts differ between CPUs and are gathered here: how wide a vector is, how many
accumulators the register file holds, and whether there is a dot product of bf16 pairs that sums in f32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from numba.core import config


@dataclass(frozen=True)
class Isa:
    """Tile sizes and abilities of one vector unit."""

    name: str
    lanes: int  # f32 lanes of one vector register
    rows_per_pass: int  # query rows whose accumulators are held in registers at once (narrow kernel)
    tile_tokens: int  # tokens of one wide-kernel register tile
    tile_vectors: int  # row vectors of one wide-kernel register tile
    bf16_dot: bool  # VDPBF16PS: bf16 pairs, summed in f32
    f16_convert: bool  # half <-> float in hardware


def _features() -> tuple[str, frozenset[str]]:
    """The CPU that Numba compiles for and its feature names, honouring NUMBA_CPU_NAME and NUMBA_CPU_FEATURES."""
    name = config.CPU_NAME or llvm.get_host_cpu_name()
    text = config.CPU_FEATURES
    if text is None:
        text = "" if config.CPU_NAME else llvm.get_host_cpu_features().flatten()
    return name, frozenset(f[1:] for f in text.split(",") if f.startswith("+"))


def cpu_identity() -> tuple[str, str, str]:
    """What compiled code depends on: the target, the CPU's name and its flags."""
    name, flags = _features()
    return llvm.get_process_triple(), name, ",".join(sorted(flags))


@cache
def host_isa() -> Isa:
    """The vector unit of the CPU that this process compiles for."""
    _, flags = _features()
    triple = llvm.get_process_triple()
    if triple.startswith(("aarch64", "arm64")):
        return Isa("neon", 4, 4, 4, 4, bf16_dot=False, f16_convert=True)
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        dot = "avx512bf16" in flags and os.environ.get("ATTN_DISPATCH_CPU_BF16_DOT", "1") != "0"
        return Isa("avx512-bf16" if dot else "avx512", 16, 4, 4, 4, bf16_dot=dot, f16_convert=True)
    if {"avx2", "fma"} <= flags:
        return Isa("avx2", 8, 2, 4, 2, bf16_dot=False, f16_convert="f16c" in flags)
    return Isa("portable", 4, 2, 2, 4, bf16_dot=False, f16_convert=False)
