"""The list of hardware stands once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_dispatch
from attn_dispatch.hardware import DEVICE_KINDS, NAMES, PLATFORMS, Platform, by_kind, by_name

ROOT = Path(attn_dispatch.__file__).parent.parent
THE_LIST = ROOT / "attn_dispatch" / "hardware" / "platforms.py"


def lists_of_hardware(source: str) -> Iterator[int]:
    """Yield the lines of literals that name three accelerators' platforms, or three kinds of device."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            parts = [*node.keys, *node.values]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = [*node.elts]
        words = {part.value for part in parts if isinstance(part, ast.Constant)}
        if len(words & (set(NAMES) - {"cpu"})) >= 3 or len(words & set(DEVICE_KINDS)) >= 3:
            yield node.lineno


def sources() -> list[Path]:
    paths = [p for folder in ("attn_dispatch", "ci", "clients", "platforms") for p in (ROOT / folder).rglob("*.py")]
    names = [path.relative_to(ROOT).parts for path in paths]
    return [p for p, parts in zip(paths, names, strict=True) if "tests" not in parts and p != THE_LIST]


@pytest.mark.skipif(not (ROOT / "platforms").exists(), reason="not run: an installed core has no repository around it")
def test_no_other_file_lists_the_hardware() -> None:
    files = {str(p.relative_to(ROOT)): lines for p in sources() if (lines := [*lists_of_hardware(p.read_text())])}
    assert files == {}


@pytest.mark.parametrize("planted", ['X = {"cuda": 1, "rocm": 2, "xpu": 3}', 'def f(): return "nvidia", "amd", "tpu"'])
def test_a_planted_list_is_noticed(planted: str) -> None:
    assert [*lists_of_hardware(planted)]


def test_rows_are_found_by_name_and_by_kind() -> None:
    assert {by_name(row.name) for row in PLATFORMS} == set(PLATFORMS)
    assert {by_kind(kind) for kind in DEVICE_KINDS} == {row for row in PLATFORMS if row.device_kind}
    assert NAMES[-1] == "cpu"
    assert Platform("rocm", "").torch_device == "cuda"
