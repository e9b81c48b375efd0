"""One kernel compiled ahead of time for one target: machine code, and the resources that it takes. No GPU, no driver.

Triton must not interpret: `TRITON_INTERPRET` is unset before this is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_dispatch.adapters.environment import make_cache_folder
from attn_dispatch.contract import AttentionSpec
from attn_dispatch_triton import kernels
from attn_dispatch_triton.constants import attend_constants, pass_constants, tile_sizes
from attn_dispatch_triton.fixed_maximum import level_constants
from attn_dispatch_triton.targets import Target
from attn_dispatch_triton.tiles import Tiles, decode_tiles, padded, prefill_tiles

__all__ = ["KERNELS", "Compiled", "compile_kernel"]

KERNELS = ("prefill", "decode", "undivided", "merge", "write")
"""`undivided`: what decodes whose keys are not split run: `prefill`, with the tiles of `decode`."""

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "i8"}
_INDICES = ("query_start", "kv_lens", "key_start", "block_table", "item_sequence", "item_row")
_FLOATS = ("scale", "cap", "value_scale")
_UNSPECIALISED = ("table_width", "splits", "count", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a target.

    Attributes:
        registers: of one thread (AMD: vector registers, accumulators included).
        accumulators: how many of them are accumulation registers (AMD's AGPRs).
        spills: instructions that spill (NVIDIA: loads and stores of local memory), or registers spilled (AMD).
        occupancy: warps that one processor holds at once (NVIDIA: of a multiprocessor; AMD: of a SIMD).
        shared_bytes: shared memory, or LDS.
        matrix: matrix instructions in the code.
        code_bytes: machine code.
        seconds: to compile.
    """

    registers: int
    accumulators: int
    spills: int
    occupancy: int
    shared_bytes: int
    matrix: int
    code_bytes: int
    seconds: float


def compile_kernel(
    name: str,
    spec: AttentionSpec,
    target: Target,
    paged: bool = True,
    tiles: Tiles | None = None,
    level: float | None = None,
    anew: bool = True,
) -> Compiled:
    """Compile one of `KERNELS` as a launch for this spec would have it.

    Args:
        name: the kernel.
        spec: the layer.
        target: the GPU.
        paged: keys are in a cache.
        tiles: others than a launch would choose.
        level: the fixed maximum of `decode`; None: a running one.
        anew: compile it even if this very program was compiled and measured before.

    Raises:
        Exception: whatever Triton, LLVM or ptxas has against it.
    """
    function = kernels.prefill if name == "undivided" else getattr(kernels, name)
    if tiles is None:
        sizes, prefilled = tile_sizes(spec, paged), name == "prefill"
        tiles = prefill_tiles(target, *sizes) if prefilled else decode_tiles(target, *sizes, spec.group_size)
    constants = _constants(name, spec, tiles, paged, level)
    signature = {n: "constexpr" if n in constants else _type(n, spec, paged) for n in function.arg_names}
    aligned = spec.head_size % 16 == 0 and spec.value_head_size % 16 == 0
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and aligned and n not in _UNSPECIALISED)
    }
    source = ASTSource(function, signature, constants, attributes)
    warps = {"merge": 1, "write": 4}.get(name, tiles.warps)
    file = _file_of(source, target, warps)
    if not anew and (before := _measured_before(file)) is not None:
        return before
    began = time.monotonic()
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    result = triton.compile(source, target=gpu, options={"num_warps": warps})
    seconds = time.monotonic() - began
    shared = int(result.metadata.shared)
    measured = (_cuda if target.backend == "cuda" else _amd)(result, target, warps, shared)
    compiled = Compiled(**measured, shared_bytes=shared, seconds=round(seconds, 2))
    _keep(compiled, file)
    return compiled


def _file_of(source: ASTSource, target: Target, warps: int) -> Path:
    """Return where what was measured of a program is kept, by everything that shapes it and its measuring."""
    # Triton's variables change what it compiles; the folder of its own cache does not, and is another one each time.
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if _shapes(name))
    measuring = Path(__file__).read_text(encoding="utf-8")
    parts = [triton.__version__, source.hash(), repr(target), str(warps), *variables, measuring]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return make_cache_folder("triton", "compile-check") / f"{digest[:32]}.json"


def _shapes(variable: str) -> bool:
    return variable.startswith(("TRITON_", "LLVM_", "DISABLE_LLVM")) and variable != "TRITON_CACHE_DIR"


def _measured_before(file: Path) -> Compiled | None:
    try:
        return Compiled(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _keep(result: Compiled, file: Path) -> None:
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
        json.dump(asdict(result), whole)
    Path(whole.name).replace(file)


def _constants(name: str, spec: AttentionSpec, tiles: Tiles, paged: bool, level: float | None) -> dict[str, Any]:
    language = {"float32": triton.language.float32, "float16": triton.language.float16}
    ends = {"SINKS": spec.sinks, "LSE": spec.returns_lse}
    if name == "merge":
        sizes = {"GROUP": spec.group_size, "VALUE_SIZE": spec.value_head_size, "ROWS": tiles.rows}
        return {**sizes, **ends, "BLOCK_DV": padded(spec.value_head_size)}
    if name == "write":
        width = spec.head_size
        return {"BLOCK_SIZE": spec.block_size, "WIDTH": width, "ROWS": 16, "BLOCK_WIDTH": padded(width)}
    constants = {**attend_constants(spec, paged, False), **pass_constants(spec, tiles)}
    constants["COMPUTE"] = language.get(constants["COMPUTE"], triton.language.bfloat16)
    return constants | (level_constants(spec, paged, level) if name == "decode" else ends)


def _type(name: str, spec: AttentionSpec, paged: bool) -> str:
    stored = "*" + _TYPES.get(spec.kv_cache_dtype if paged else spec.dtype, "u8")  # fp8: as bytes
    own = "*" + _TYPES[spec.dtype]
    roles = {"q": own, "out": own, "key": stored, "value": stored, "rows": stored, "cache": stored, "slots": "*i64"}
    if name in roles:
        return roles[name]
    if name in _INDICES:
        return "*i32"
    if name in ("lse", "slopes", "sinks", "part", "part_lse"):
        return "*fp32"
    return "fp32" if name in _FLOATS else "i32"


def _cuda(result: Any, target: Target, warps: int, shared: int) -> Mapping[str, int]:
    cubin = result.asm["cubin"]
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output_of(tools / "nvdisasm", "-c", file.name)
    registers = re.findall(r"\bREG:(\d+)", usage)
    if not registers:
        raise RuntimeError(f"cuobjdump names no registers: {usage[:200]}")
    each = max(map(int, registers))
    # Registers come in units of 8 a thread; a block of threads reserves 1 KiB of shared memory for the system.
    by_registers = 65536 // (-(-each // 8) * 8 * 32 * warps)
    blocks = min(by_registers, (target.shared_bytes + 1024) // (shared + 1024), 64 // warps)
    return {
        "registers": each,
        "accumulators": 0,
        "occupancy": blocks * warps,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "matrix": len(re.findall(r"\b\w*(?:HMMA|GMMA|UTC\w*MMA|QGMMA|IMMA)\b", code)),
        "code_bytes": len(cubin),
    }


def _output_of(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def _amd(result: Any, target: Target, warps: int, shared: int) -> Mapping[str, int]:
    text = result.asm["amdgcn"]
    counts = dict(_fields(text))
    occupancy = re.search(r";\s*Occupancy:\s*(\d+)", text)
    if "vgpr_count" not in counts or occupancy is None:
        raise RuntimeError("the assembly names no registers, or no occupancy")
    # LLVM's number knows of registers only: LDS is given at launch. A processor has four SIMDs, RDNA's two.
    groups = target.shared_bytes // shared if shared else 1 << 10
    by_shared = groups * warps // (4 if target.warp_size == 64 else 2)
    return {
        "registers": counts["vgpr_count"],
        "accumulators": counts.get("agpr_count", 0),
        "occupancy": min(int(occupancy[1]), by_shared),
        "spills": counts.get("vgpr_spill_count", 0),  # scalar ones go to lanes of vector registers, not to memory
        "matrix": len(re.findall(r"^\s*v_(?:mfma|wmma|smfmac|dot)\w*", text, re.MULTILINE)),
        "code_bytes": len(result.asm["hsaco"]),
    }


def _fields(text: str) -> Iterator[tuple[str, int]]:
    for name, number in re.findall(r"^\s*\.(\w+_count):\s+(\d+)", text, re.MULTILINE):
        yield name, int(number)
