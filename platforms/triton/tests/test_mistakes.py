"""Kernels broken on purpose, one mistake each: the kit must not let any of them pass (a test that cannot fail)."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_dispatch_triton
from attn_dispatch import Backend
from attn_dispatch.conformance.cases import CASES
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.dispatch import registry

CASE = {case.name: case for case in CASES}
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _must_be_here() -> None:
    available = registry().load("triton/paged").probe()
    if not available:
        pytest.skip(f"not run: {available.reason}")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place that packages can be imported from; forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in set(sys.modules) - before:
        if name.startswith("edited_"):
            del sys.modules[name]


def edited(folder: Path, file: str, old: str, new: str) -> Backend:
    """Return the backend of a copy of the package in which one text was replaced."""
    package = folder / f"edited_{next(_numbers)}"
    shutil.copytree(Path(attn_dispatch_triton.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert old in text, f"{file} no longer holds {old!r}: this test breaks nothing"
    (package / file).write_text(text.replace(old, new, 1))
    backend: Backend = importlib.import_module(f"{package.name}.paged").PagedBackend(f"edited/{package.name}")
    return backend


MISTAKES = {
    "the window is one longer": ("elements.py", "ahead >= -LEFT)", "ahead >= -LEFT - 1)", "window of 33"),
    "the window is one shorter": ("elements.py", "ahead >= -LEFT)", "ahead > -LEFT)", "window of 33"),
    "a token sees the next": ("elements.py", "seen & (ahead <= 0)", "seen & (ahead <= 1)", "type float32"),
    "a token does not see itself": ("elements.py", "seen & (ahead <= 0)", "seen & (ahead < 0)", "type float32"),
    "a two-sided window's right side": ("elements.py", "ahead <= RIGHT)", "ahead < RIGHT)", "encoder window"),
    "no soft-cap": ("elements.py", "if CAPPED:", "if CAPPED and False:", "soft-cap float32"),
    "ALiBi with a sign": ("elements.py", "tl.abs(ahead)", "(-ahead)", "encoder ALiBi"),
    "sums are not shrunk": ("elements.py", "sums * shrink[:, None], input", "sums, input", "type float32"),
    "totals are not shrunk": ("elements.py", "total = total * shrink +", "total = total +", "type float32"),
    "pages in order": (
        "elements.py",
        "tl.load(table + at // BLOCK_SIZE, mask=live, other=0)",
        "(at // BLOCK_SIZE)",
        "type float32",
    ),
    "one fp8 exponent too low": ("elements.py", "* 256.0", "* 128.0", "float8_e4m3fn cache float32"),
    "LSE in base 2": (
        "kernels.py",
        "(peak + tl.log2(share)) * 0.6931471805599453",
        "(peak + tl.log2(share))",
        "LSE float32",
    ),
    "no sink": (
        "kernels.py",
        "total = total * shrink + tl.exp2(sink - level)",
        "total = total * shrink",
        "sinks float32",
    ),
    "the first split alone": ("kernels.py", "for split in range(splits):", "for split in range(1):", "decode float32"),
    "splits overlap": (
        "kernels.py",
        "end = tl.minimum(end, begin + length)",
        "end = tl.minimum(end, begin + length + 1)",
        "decode float32",
    ),
    "splits weigh the same": (
        "kernels.py",
        "weight = tl.exp2(own - level)",
        "weight = tl.exp2(level - level)",
        "decode float32",
    ),
    "the last key is left out": ("kernels.py", "    end = kv_len\n", "    end = kv_len - 1\n", "decode float32"),
    "padding is written": (
        "kernels.py",
        "    d = tl.arange(0, BLOCK_WIDTH)",
        "    slot = tl.where((slot < 0) & (row < count), 0, slot)\n    d = tl.arange(0, BLOCK_WIDTH)",
        "tokens with slot -1",
    ),
    "the value's scale": (
        "kernels.py",
        "sums / share[:, None] * value_scale",
        "sums / share[:, None]",
        "int8 cache, scaled",
    ),
    "the key's scale": ("paged_call.py", "spec.scale * layer.k_scale", "spec.scale", "int8 cache, scaled"),
    "a grouped head's neighbour": (
        "kernels.py",
        "rows // GROUP + offset, lowest",
        "rows // GROUP + offset + rows % GROUP, lowest",
        "heads 8/2",
    ),
    "values are written where keys are": (
        "paged_call.py",
        "_write(batch.slots, v, cache.value,",
        "_write(batch.slots, k, cache.value,",
        "type float32",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_kit_notices(name: str, folder: Path) -> None:
    file, old, new, case = MISTAKES[name]
    with pytest.raises(ConformanceError):
        run_case(edited(folder, file, old, new), CASE[case])


def test_a_copy_without_a_mistake_passes(folder: Path) -> None:
    backend = edited(folder, "kernels.py", "The kernels:", "The kernels :")
    for case in sorted({mistake[3] for mistake in MISTAKES.values()}):
        assert run_case(backend, CASE[case]).verdict
