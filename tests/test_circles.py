"""No circle of files: a file that others stand on does not stand on them, not even for the sake of types.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import attn_dispatch

ROOT = Path(attn_dispatch.__file__).parent.parent

# Circles that are being removed: one of their files, and by whom. A circle that is gone must leave this table.
EXPECTED: dict[str, str] = {}


def own_files(root: Path) -> dict[str, Path]:
    """Return every module of the repository's distributions and of ci, by its name."""
    folders = [
        root,
        *sorted(p.parent for kind in ("platforms", "clients") for p in root.glob(f"{kind}/*/pyproject.toml")),
    ]
    modules: dict[str, Path] = {}
    for folder in folders:
        packages = ["attn_dispatch"] if folder == root else [p.name for p in folder.iterdir() if p.is_dir()]
        for package in packages:
            for path in sorted((folder / package).rglob("*.py")):
                parts = path.relative_to(folder).with_suffix("").parts
                if "tests" in parts or any(part.startswith(".") for part in parts):
                    continue
                # What is run from the repository's root goes by its place there, what is installed by its package.
                prefix = () if package.startswith("attn_dispatch") else folder.relative_to(root).parts
                modules[".".join([*prefix, *parts]).removesuffix(".__init__")] = path
    return modules | {path.stem: path for path in sorted((root / "ci").glob("*.py"))}


def imported(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that a file imports: of a name that is taken from a package, the module if it is one."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (full if (full := f"{stem}.{alias.name}") in modules else stem for alias in node.names)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the sets of nodes that reach each other (Tarjan's strongly connected components), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            position = stack.index(node)
            component, stack[position:] = sorted(stack[position:]), []
            if len(component) > 1 or node in graph[node]:
                components.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return components


def graph_of(root: Path) -> dict[str, set[str]]:
    modules = own_files(root)
    return {name: set(imported(name, path, modules)) & modules.keys() for name, path in modules.items()}


@pytest.mark.skipif(not (ROOT / "platforms").exists(), reason="not run: an installed core has no repository around it")
def test_there_is_no_circle_of_files() -> None:
    present = circles(graph_of(ROOT))
    unexpected = [circle for circle in present if not EXPECTED.keys() & set(circle)]
    assert not unexpected, "\n".join(" <-> ".join(circle) for circle in unexpected)
    gone = EXPECTED.keys() - {name for circle in present for name in circle}
    assert not gone, f"no longer in a circle: {sorted(gone)}"


@pytest.mark.parametrize(
    "files",
    [
        {"a.py": "import attn_dispatch.b", "b.py": "from attn_dispatch.c import x", "c.py": "from . import a"},
        {
            "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B",
            "b.py": "from .a import A",
        },
        {"a.py": "def f():\n    from attn_dispatch import b", "b.py": "from attn_dispatch.a import f"},
        {"__init__.py": "from attn_dispatch.a import A", "a.py": "from attn_dispatch import A"},
        {"sub/__init__.py": "from .deep import X", "sub/deep.py": "from ..sub import Y"},
        {"a.py": "import attn_dispatch.a"},
    ],
    ids=["three", "types", "in a function", "package", "sub-package", "itself"],
)
def test_a_planted_circle_is_noticed(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / "attn_dispatch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert len(circles(graph_of(tmp_path))) == 1


def test_a_chain_is_no_circle(tmp_path: Path) -> None:
    (tmp_path / "attn_dispatch" / "sub").mkdir(parents=True)
    chain = {"__init__": "from .a import A", "a": "from .sub import b", "sub/__init__": "", "sub/b": "import ast"}
    for name, text in chain.items():
        (tmp_path / "attn_dispatch" / f"{name}.py").write_text(text)
    assert circles(graph_of(tmp_path)) == []
