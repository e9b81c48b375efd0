"""A platform brings its own rules for types: a new folder with an untyped vendor passes without an edit elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import check_types
import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("mypy", reason="not run here: mypy is in the job `lint`")

BACKEND = '''
"""Untyped vendor."""
import fakevendor

def attend(x: float) -> float:
    y: float = fakevendor.attend(x)
    return y
'''
OVERRIDE = '[[tool.mypy.overrides]]\nmodule = ["fakevendor.*"]\nignore_missing_imports = true\n'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A core of one file with this repository's rules, and one platform."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, text in {"attn_dispatch/__init__.py": "", "platforms/new/attn_dispatch_new/__init__.py": BACKEND}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(("override", "status"), [(OVERRIDE, 0), ("", 1)])
def test_a_new_platform_with_an_untyped_vendor(repository: Path, override: str, status: int) -> None:
    (repository / "platforms" / "new" / "pyproject.toml").write_text(override)
    assert check_types.main(repository) == status


def test_a_wrong_type_in_a_platform_is_found(repository: Path) -> None:
    (repository / "platforms" / "new" / "pyproject.toml").write_text(OVERRIDE)
    (repository / "platforms" / "new" / "attn_dispatch_new" / "wrong.py").write_text('X: int = "text"\n')
    assert check_types.main(repository) == 1


def test_evidence_beside_the_package_is_checked_too(repository: Path) -> None:
    (repository / "platforms" / "new" / "pyproject.toml").write_text(OVERRIDE)
    (repository / "platforms" / "new" / "evidence").mkdir()
    (repository / "platforms" / "new" / "evidence" / "report.py").write_text('X: int = "text"\n')
    assert check_types.main(repository) == 1


def test_a_platform_may_not_change_the_rules_of_all(repository: Path) -> None:
    (repository / "platforms" / "new" / "pyproject.toml").write_text("[tool.mypy]\nstrict = false\n")
    with pytest.raises(ValueError, match="overrides alone"):
        check_types.rules(repository)
