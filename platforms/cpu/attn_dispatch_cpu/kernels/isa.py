"""The machine's vector unit, found at run time from the CPU's own flags, and the machine that LLVM compiles for.

The kernels are written once over "a vector of `lanes` floats" and register tiles of a given size; LLVM turns them
into AVX-512, AVX2 or NEON. What differs between CPUs is gathered here: how wide a vector is, how many accumulators the
register file holds, and which other units it has. Whether those are worth using is measured: see `code_path`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Isa:
    """Tile sizes and abilities of one vector unit."""

    name: str
    lanes: int  # f32 lanes of one vector register
    rows_per_pass: int  # query rows whose accumulators are held in registers at once (decode)
    tile_tokens: int  # tokens of one register tile (prefill)
    tile_vectors: int  # row vectors of one register tile (prefill)
    bf16_dot: bool  # VDPBF16PS or BFDOT: bf16 pairs, summed in f32
    amx: bool  # tiles of bf16, summed in f32 (whether the system permits them is asked elsewhere)


def cpu_identity() -> tuple[str, str, str]:
    """Return what code is compiled for: the target, the CPU's name and its flags; Numba's two variables change them."""
    name = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if name == "generic" else llvm.get_host_cpu_features().flatten()
    return llvm.get_process_triple(), name or llvm.get_host_cpu_name(), features


@cache
def target_machine() -> llvm.TargetMachine:
    """Return what LLVM emits machine code with, as Numba sets it up for code that is run at once."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = cpu_identity()
    reloc = "static" if triple.startswith(("x86", "i686")) else "default"
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )


@cache
def host_isa() -> Isa:
    """Return the vector unit of the CPU that this process compiles for."""
    triple, _, features = cpu_identity()
    flags = frozenset(flag[1:] for flag in features.split(",") if flag.startswith("+"))
    if triple.startswith(("aarch64", "arm64")):
        return Isa("neon", 4, 4, 4, 4, bf16_dot="bf16" in flags, amx=False)
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return Isa("avx512", 16, 4, 4, 4, "avx512bf16" in flags, {"amx-tile", "amx-bf16"} <= flags)
    if {"avx2", "fma"} <= flags:
        return Isa("avx2", 8, 2, 4, 2, bf16_dot=False, amx=False)
    return Isa("portable", 4, 2, 2, 4, bf16_dot=False, amx=False)
