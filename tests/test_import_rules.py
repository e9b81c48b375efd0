"""The core's floors: a module imports lower floors only, and nothing of a vendor or a platform, ever."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_dispatch

CORE = Path(attn_dispatch.__file__).parent
PLATFORMS = CORE.parent / "platforms"

FLOORS = [
    {"errors", "contract", "hardware"},
    {"settings", "merge", "observe"},
    {"call"},
    {"backend"},
    {"block_size"},
    {"reference", "registry", "cache", "explanation"},
    {"installed"},
    {"request"},
    {"dispatch"},
    {"attention"},
    {"variants", "caches"},
    {"conformance", "integrations", "adapters"},
    {"cli", "__init__"},
    {"__main__"},
]
# Within the lowest floor: what everything may use.
LOWEST = {"errors"}
# All that the core needs. Any other package is a vendor's, whether anybody here has heard of it or not.
NEEDED = {"numpy", "ml_dtypes", "attn_dispatch", *sys.stdlib_module_names}
# May import more, inside functions or at their top: what nothing else in the core imports.
MAY_IMPORT = {
    "integrations": {"torch", "transformers", "safetensors", "gguf"},
    "cli": {"torch", "transformers", "typer", "rich", "platformdirs"},
    "adapters": {"torch"},
    "conformance": {"pytest"},
}


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(CORE.rglob("*.py")):
        yield path, path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    package = ["attn_dispatch", *path.relative_to(CORE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def floor_of(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def violations(source: str, path: Path, part: str) -> list[str]:
    found = []
    for name in imports(ast.parse(source), path):
        root, _, rest = name.partition(".")
        if root not in NEEDED | MAY_IMPORT.get(part, set()):
            found.append(f"imports {root}, a platform or a vendor")
        if root == "attn_dispatch" and rest:
            target = rest.partition(".")[0]
            known = {r for parts in FLOORS for r in parts}
            # `from attn_dispatch import hardware` names a module, `import AttentionSpec` the package.
            target = target if target in known else "__init__"
            below = floor_of(target) < floor_of(part) or target == part or target in LOWEST
            if not below:
                found.append(f"imports {name} from above")
    return found


@pytest.mark.parametrize(("path", "part"), list(modules()), ids=lambda x: str(getattr(x, "name", x)))
def test_a_module_imports_lower_floors_only(path: Path, part: str) -> None:
    assert violations(path.read_text(), path, part) == []


def test_every_module_has_a_floor() -> None:
    assert {part for _, part in modules()} <= {part for parts in FLOORS for part in parts}


@pytest.mark.parametrize(
    "planted",
    [
        "import fakevendor",
        "import torch",
        "from torch import nn",
        "def f():\n    import jax",
        "import attn_dispatch_cpu",
        "from attn_dispatch.cli import app",
    ],
)
def test_a_planted_import_is_noticed(planted: str) -> None:
    path = CORE / "dispatch.py"
    assert violations(f"{path.read_text()}\n{planted}\n", path, "dispatch")


def test_the_core_names_no_platform_and_no_vendor_in_its_metadata() -> None:
    tables = tomllib.loads((CORE.parent / "pyproject.toml").read_text())
    project = tables["project"]
    # What hatch_build.py adds to these is read from the platforms when a wheel is built.
    extras = tables["tool"]["hatch"]["metadata"]["hooks"]["custom"]["extras"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}

    assert names(project["dependencies"]) == {"numpy", "ml_dtypes"}
    for extra, requirements in extras.items():
        assert not {name for name in names(requirements) if name.startswith("attn-dispatch-")}, extra
    assert names(extras["conformance"]) <= {"pytest", "hypothesis"}


@pytest.mark.skipif(not PLATFORMS.exists(), reason="not run: an installed core has no platforms folder beside it")
def test_a_platform_imports_no_other_platform() -> None:
    names = [folder.name for folder in PLATFORMS.iterdir() if (folder / "pyproject.toml").exists()]
    for path in PLATFORMS.rglob("*.py"):
        own = path.relative_to(PLATFORMS).parts[0]
        if own not in names or any(part.startswith(".") for part in path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            others = {f"attn_dispatch_{name}" for name in names} - {f"attn_dispatch_{own}"}
            assert not others & {name.partition(".")[0] for name in found}, path


SCRIPT = """
import json, sys
import numpy
before = set(sys.modules)
import attn_dispatch as ad
assert ad.platform.name
print(json.dumps(sorted({m.partition(".")[0] for m in set(sys.modules) - before})))
"""


def test_importing_the_package_imports_no_vendor_and_no_plug_in() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert not set(loaded) - NEEDED


def test_importing_is_safe_before_fork() -> None:
    script = (
        "import os, attn_dispatch as ad\n"
        "spec = ad.AttentionSpec(num_heads=2, head_size=8, dtype='float32')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    ad.attention(spec, backend='reference').allocate(1)\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
