"""Every ATTN_DISPATCH_* variable that the code reads is known: the core's own, or declared by the plug-in."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import attn_dispatch
from attn_dispatch.settings import VARIABLES

ROOT = Path(attn_dispatch.__file__).parent.parent
FOLDERS = sorted(p.parent for kind in ("platforms", "clients") for p in (ROOT / kind).glob("*/pyproject.toml"))


def named(folder: Path) -> set[str]:
    """Return the variables that stand in the code of a folder, its tests aside."""
    files = [path for path in folder.rglob("*.py") if not {"tests", "evidence"} & set(path.relative_to(folder).parts)]
    constants = [node.value for path in files for node in ast.walk(ast.parse(path.read_text())) if is_text(node)]
    return {text for text in constants if re.fullmatch("ATTN_DISPATCH_[A-Z0-9_]+", text)}


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def declared(folder: Path) -> dict[str, str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    variables: dict[str, str] = project.get("entry-points", {}).get("attn_dispatch.environment", {})
    return variables


def test_the_core_knows_its_own() -> None:
    assert named(ROOT / "attn_dispatch") <= set(VARIABLES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_plug_in_declares_what_it_reads(folder: Path) -> None:
    assert named(folder) - set(VARIABLES) == set(declared(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_declaration_leads_to_its_name(folder: Path) -> None:
    for variable, place in declared(folder).items():
        module, _, attribute = place.partition(":")
        tree = ast.parse((folder / f"{module.replace('.', '/')}.py").read_text())
        values = [
            node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and attribute in {target.id for target in node.targets if isinstance(target, ast.Name)}
        ]
        assert values == [variable], f"{place} is not {variable}"
