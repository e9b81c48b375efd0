"""What a release is checked for, and the core's extras."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "ci").exists(), reason="not run: an installed core has no ci folder beside it"
)

METADATA = """Metadata-Version: 2.4
Name: x
Version: 1
Summary: A backend.
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.11
Classifier: Typing :: Typed
Project-URL: Source, https://example.org

What it is.
"""
FILES = {
    "x/__init__.py": "",
    "x/py.typed": "",
    "x-1.dist-info/METADATA": METADATA,
    "x-1.dist-info/licenses/LICENSE": "text",
}


def wheel(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_complete_wheel_has_no_shortcomings(tmp_path: Path) -> None:
    import release

    assert release.shortcomings(wheel(tmp_path, FILES)) == []


@pytest.mark.parametrize(
    "line", [line for line in METADATA.splitlines() if line and not line.startswith(("M", "N", "V"))]
)
def test_what_the_metadata_lacks_is_said(tmp_path: Path, line: str) -> None:
    import release

    files = FILES | {"x-1.dist-info/METADATA": METADATA.replace(f"{line}\n", "")}
    (text,) = release.shortcomings(wheel(tmp_path, files))
    assert text == ("no readme" if line == "What it is." else f"no {line.partition(':')[0]}")


@pytest.mark.parametrize(
    ("removed", "added", "words"),
    [
        ("x/py.typed", "", "x has no py.typed"),
        ("x-1.dist-info/licenses/LICENSE", "", "no licence's text"),
        ("", "x/tests/test_x.py", "has x/tests/test_x.py"),
        ("", "evidence/report.py", "has evidence/report.py"),
    ],
)
def test_files_that_lack_or_should_not_be_there(tmp_path: Path, removed: str, added: str, words: str) -> None:
    import release

    files = {name: text for name, text in FILES.items() if name != removed} | ({added: ""} if added else {})
    assert release.shortcomings(wheel(tmp_path, files)) == [words]


def test_an_index_leads_to_its_wheels(tmp_path: Path) -> None:
    import release

    path = wheel(tmp_path, FILES)
    release.write_index(tmp_path, [path])
    assert 'href="x/"' in (tmp_path / "simple" / "index.html").read_text()
    assert f'href="../../{path.name}#sha256=' in (tmp_path / "simple" / "x" / "index.html").read_text()


def test_every_platform_is_an_extra_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import hatch_build

    metadata: dict[str, dict[str, list[str]]] = {}
    hatch_build.PlatformExtras(str(ROOT), {"extras": {"cli": ["typer"]}}).update(metadata)
    folders = {p.parent.name for p in ROOT.glob("platforms/*/pyproject.toml") if not p.parent.name.startswith("_")}
    assert metadata["optional-dependencies"].keys() == {"cli", *folders}
    assert metadata["optional-dependencies"]["cpu"] == ["attn-dispatch-cpu"]
