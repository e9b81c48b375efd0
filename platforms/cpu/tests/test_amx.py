"""AMX: the kernels' logic, with tile operations as loops over vectors; what the compiler makes of the real ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.conformance import Case, check_mutations, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.dispatch import registry
from attn_dispatch_cpu import amx, code_path
from attn_dispatch_cpu.kernels import amx_decode_tiles, amx_prefill_tiles
from attn_dispatch_cpu.kernels.amx import Tiles
from attn_dispatch_cpu.kernels.isa import Isa, target_machine

BASE: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "dtype": "bfloat16"}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CPU_CODE_PATH", "amx-emulated")
    monkeypatch.setenv("ATTN_DISPATCH_NUM_THREADS", "2")


CASES = [
    Case("blocks of 8", "amx", AttentionSpec(**BASE, block_size=8), (60, 0), (1, 20)),
    Case("blocks of 16", "amx", AttentionSpec(**BASE, block_size=16), (300, 5, 0), (1, 20, 2)),
    Case("blocks of 136", "amx", AttentionSpec(**BASE, block_size=136), (300, 5), (2, 40)),
    Case("head size 576 and 512", "amx", AttentionSpec(**BASE, head_size=576, value_head_size=512), (70, 9), (1, 20)),
    Case("head size 33 and 9", "amx", AttentionSpec(**BASE, head_size=33, value_head_size=9), (70, 9), (1, 20)),
    Case("more rows than an item has", "amx", AttentionSpec(num_heads=4, num_kv_heads=1), (30,), (300,)),
    Case("a group larger than an item", "amx", AttentionSpec(num_heads=600, num_kv_heads=1, head_size=32), (9,), (2,)),
    Case("parts of a context", "amx", AttentionSpec(num_heads=2, num_kv_heads=1, sinks=True), (900,), (1,), sink=6.0),
    Case("an encoder without a cache", "amx", AttentionSpec(**BASE, kind="encoder", causal=False), (0, 0), (50, 3)),
    Case("int8", "amx", AttentionSpec(**BASE, kv_cache_dtype="int8"), (300, 30), (2, 40), scales=(0.03, 0.04)),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert run_case(registry().load("cpu/numba"), case).verdict


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "case",
    [
        Case("windowed decode", "window", AttentionSpec(**BASE, window=(40, 0)), (300, 90), (1, 2)),
        Case("windowed prefill", "window", AttentionSpec(**BASE, window=(40, 0)), (30, 90), (80, 33)),
        Case("two-sided window", "window", AttentionSpec(**BASE, kind="encoder", window=(9, 5)), (0,), (80,)),
        Case("cap and alibi", "cap", AttentionSpec(**BASE, logits_soft_cap=2.0, alibi=True), (130, 30), (1, 40)),
    ],
    ids=lambda case: case.name,
)
def test_mistakes_are_noticed(case: Case) -> None:
    backend = registry().load("cpu/numba")
    assert run_case(backend, case).verdict
    check_mutations(backend, case)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("new", [1, 40], ids=["decode", "prefill"])
def test_scores_that_grow_and_grow(new: int) -> None:
    """Each token's key is larger than the one before: the maximum is raised again and again, by far more than 2^8."""
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=1, head_size=64, scale=1.0, returns_lse=True)
    rng = np.random.default_rng(0)
    length = 700
    direction = rng.standard_normal(64)
    k = (direction * np.linspace(0.0, 8.0, length)[:, None, None]).astype(ml_dtypes.bfloat16)
    v = rng.standard_normal((length, 1, 64)).astype(ml_dtypes.bfloat16)
    q = (direction * rng.uniform(0.5, 1.0, (new, 4, 1))).astype(ml_dtypes.bfloat16)
    results = []
    for backend in ("cpu/numba", "reference"):
        attn = ad.attention(spec, backend=backend)
        cache = attn.allocate(-(-length // 32))
        table = [range(cache.num_blocks)]
        fill = attn.plan(ad.AttentionMetadata.build([length - new], [length - new], table))
        attn.run(fill, np.zeros((length - new, 4, 64), q.dtype), k[:-new], v[:-new], cache)
        plan = attn.plan(ad.AttentionMetadata.build([new], [length], table))
        results.append(attn.run(plan, q, k[-new:], v[-new:], cache, return_lse=True))
    (out, lse), (exact, exact_lse) = results
    np.testing.assert_allclose(out.astype(np.float32), exact.astype(np.float32), atol=0.03)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-3)


@pytest.mark.usefixtures("emulated")
def test_the_path_is_the_one_that_runs() -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=1)
    attn = ad.attention(spec, backend="cpu/numba")
    plan = attn.plan(ad.AttentionMetadata.build([1, 40], [1, 40], [[0], [1, 2]]))
    assert [(work.kernel, work.path) for work in plan.work[True]] == [
        ("decode", "amx-emulated"),
        ("prefill", "amx-emulated"),
    ]


@pytest.mark.parametrize("layout", [amx_decode_tiles.tile_layout(False), amx_prefill_tiles.tile_layout(False)])
def test_the_configuration_is_what_the_instruction_takes(layout: Any) -> None:
    config = np.array(layout.words(), np.int64).view(np.uint8)
    assert config[0] == 1  # the palette
    assert config[1:16].sum() == 0
    assert config[16:32].view(np.uint16).tolist() == list(layout.row_bytes)
    assert config[32:48].sum() == 0
    assert config[48:56].tolist() == list(layout.rows)
    assert max(layout.rows) <= 16
    assert max(layout.row_bytes) <= 64


COMPILE = """
import sys
from attn_dispatch_cpu.kernels.build import compile_module
from attn_dispatch_cpu.kernels.isa import host_isa, target_machine
assert host_isa().amx
print(target_machine().emit_assembly(compile_module(sys.argv[1], 2, "amx", "kernel")))
"""
EMERALD_RAPIDS = {
    "NUMBA_CPU_NAME": "emeraldrapids",
    "NUMBA_CPU_FEATURES": "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512bf16,+amx-tile,+amx-bf16",
}


@pytest.mark.parametrize("tiles", [(0, 4, 5), (6, 5, 4), (0, 4, 4), (6, 4, 7)])
def test_products_that_the_cpu_would_refuse_are_not_emitted(tiles: tuple[int, int, int]) -> None:
    """Emulated or not: rows and columns must fit, and three different registers take part."""
    for emulated in (False, True):
        layout = amx_decode_tiles.tile_layout(emulated)
        with pytest.raises(ValueError, match="shapes do not fit"):
            Tiles(None, layout, None).multiply_add(*tiles)


@pytest.mark.skipif("x86_64" not in target_machine().triple, reason="not run: LLVM compiles for another architecture")
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_what_the_compiler_makes(name: str) -> None:
    """The real kernels, compiled here: tiles are configured once and released once, and their products are valid."""
    program = [sys.executable, "-c", COMPILE, name]
    compiled = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | EMERALD_RAPIDS)
    text = compiled.stdout
    assert len(re.findall(r"\bldtilecfg\b", text)) == 1
    assert len(re.findall(r"\btilerelease\b", text)) == 1
    assert len(re.findall(r"\btdpbf16ps\b", text)) >= 4
    products = re.findall(r"tdpbf16ps\s+%tmm(\d), %tmm(\d), %tmm(\d)", text)
    assert all(len(set(tiles)) == 3 for tiles in products)  # three different registers, or it is an invalid opcode


def test_refused_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not give the tile registers: another path, and no word about it."""
    code_path.choose.cache_clear()
    isa = Isa("avx512", 16, 4, 4, 4, bf16_dot=True, amx=True)
    asked = []
    monkeypatch.setattr(code_path, "host_isa", lambda: isa)
    monkeypatch.setattr(amx, "permitted", lambda: asked.append(1))
    monkeypatch.setattr(code_path, "cpu_identity", lambda: ("", "emeraldrapids", ""))
    assert code_path.choose("bfloat16", "bfloat16").path == "fma"
    assert asked == [1]
    with pytest.raises(ad.errors.EnvironmentVariableError, match="withholds"):
        code_path.choose("bfloat16", "bfloat16", "amx")
    monkeypatch.setattr(amx, "permitted", lambda: True)
    code_path.choose.cache_clear()
    assert code_path.choose("bfloat16", "bfloat16").path == "amx"
    assert code_path.choose("bfloat16", "int8").path == "amx"
    assert code_path.choose("float16", "float16").path == "fma"
    assert code_path.choose("bfloat16", "float16").path == "fma"
    code_path.choose.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="not run: only Linux asks for permission")
def test_permission_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: it answers, and a CPU without AMX is told no."""
    program = "from attn_dispatch_cpu import amx; print(amx.permitted())"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    flags = ad.platform.facts["cpu_flags"]
    assert out.stderr == ""
    assert out.stdout == "False\n" or "amx_tile" in flags
