"""The code path: known cores, a measurement where the core is unknown, and the variables that decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch_cpu import code_path, machine_code
from attn_dispatch_cpu.kernels.isa import Isa, host_isa
from attn_dispatch_cpu.numba import NumbaBackend


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing chosen or timed before, and no variable set."""
    cached = (code_path.choose, code_path.rate)
    monkeypatch.delenv(code_path.VARIABLE, raising=False)
    monkeypatch.delenv(code_path.BF16_DOT_VARIABLE, raising=False)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def with_dot(monkeypatch: pytest.MonkeyPatch, core: str) -> None:
    """Let this CPU be one with the bf16 dot product, of a core of that name."""
    monkeypatch.setattr(code_path, "host_isa", lambda: Isa("avx512", 16, 4, 4, 4, bf16_dot=True, amx=False))
    monkeypatch.setattr(code_path, "cpu_identity", lambda: ("", core, ""))


@pytest.mark.parametrize(("core", "path"), [("znver4", "bf16-dot"), ("emeraldrapids", "fma")])
def test_known_cores_are_not_timed(core: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_dot(monkeypatch, core)
    monkeypatch.setattr(code_path, "rate", lambda path: pytest.fail("timed"))
    choice = code_path.choose("bfloat16", "bfloat16")
    assert choice == (path, f"the fastest measured on {core}")
    assert code_path.choose("bfloat16", "int8").path == "fma"


@pytest.mark.parametrize(("dot", "path"), [(2e11, "bf16-dot"), (5e10, "fma")])
def test_an_unknown_core_is_timed(dot: float, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_dot(monkeypatch, "mystery")
    monkeypatch.setattr(code_path, "rate", {"fma": 1e11, "bf16-dot": dot}.__getitem__)
    choice = code_path.choose("bfloat16", "bfloat16")
    assert choice.path == path
    assert "timed on this CPU (mystery)" in choice.reason
    assert f"bf16-dot {dot / 1e9:.0f}" in choice.reason


def test_a_measurement_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", str(tmp_path))
    path = "bf16-dot" if host_isa().bf16_dot else "fma"
    speed = code_path.rate(path)
    assert 1e8 < speed < 1e14
    (file,) = (tmp_path / "cpu-numba").glob("rate-*.json")
    code_path.rate.cache_clear()
    monkeypatch.setattr(machine_code, "kernel", lambda *_: pytest.fail("timed again"))
    assert code_path.rate(path) == speed
    file.chmod(0o666)  # others could have written it
    code_path.rate.cache_clear()
    with pytest.warns(RuntimeWarning, match="may be written by others"), pytest.raises(pytest.fail.Exception):
        code_path.rate(path)


def test_variables_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    with_dot(monkeypatch, "znver4")
    assert code_path.path_of("bfloat16", "bfloat16") == "bf16-dot"
    monkeypatch.setenv(code_path.BF16_DOT_VARIABLE, "0")
    assert code_path.path_of("bfloat16", "bfloat16") == "fma"
    monkeypatch.setenv(code_path.VARIABLE, "bf16-dot")
    assert code_path.path_of("bfloat16", "bfloat16") == "bf16-dot"
    assert code_path.path_of("float16", "float16") == "fma"
    for value, message in (("avx9", "'avx9' is not a code path"), ("amx", "this CPU does not have it")):
        monkeypatch.setenv(code_path.VARIABLE, value)
        with pytest.raises(ad.errors.EnvironmentVariableError, match=message):
            code_path.path_of("bfloat16", "bfloat16")


def test_the_backend_says_which_and_why() -> None:
    paths = NumbaBackend().code_paths()
    assert set(paths) >= {"bfloat16 queries, bfloat16 cache", "float32 queries, float32 cache"}
    assert all(text.split(":")[0] in code_path.PATHS and len(text.split(": ")[1]) > 10 for text in paths.values())


def test_caches_begin_with_a_line_and_large_ones_with_a_huge_page() -> None:
    """Rows that straddle two cache lines cost 15 to 25 % of a decode step from the second-level cache."""
    attn = ad.attention(ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64), backend="cpu/numba")
    for blocks, unit in ((3, 64), (600, 1 << 21)):
        cache = attn.allocate(blocks)
        for array in cache.arrays.values():
            assert array.ctypes.data % unit == 0
            assert not array.view(np.uint8).any()
            assert array.dtype == ml_dtypes.bfloat16
            assert array.flags.c_contiguous
            assert array.flags.writeable
