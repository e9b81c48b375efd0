"""The Dockerfile says what the rest of the folder says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from attn_dispatch_rocm.flash_attention import TARGETS
from platforms.rocm.evidence.packages import PACKAGES

FOLDER = Path(__file__).parents[1]
ROOT = FOLDER.parents[1]
TEXT = (FOLDER / "Dockerfile").read_text()


def test_its_pins_are_those_that_calls_are_written_for() -> None:
    wanted = {package.requirement for package in PACKAGES.values()}
    assert set(re.findall(r'"([\w-]+==[\w.]+)"', TEXT)) == wanted
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    extras = {pin for name, pins in project["optional-dependencies"].items() if name != "test" for pin in pins}
    assert extras == wanted


def test_what_it_installs_is_there() -> None:
    (folders,) = re.findall(r"for folder in ([^;]+);", TEXT)
    for folder in folders.split():
        assert (ROOT / folder / "pyproject.toml").exists()
    assert "FROM ${IMAGE}" in TEXT
    assert re.search(r"ARG IMAGE=rocm/pytorch:rocm[\d.]+_\w+", TEXT)
    assert re.search(r'ARG ARCHS="([^"]+)"', TEXT)[1].split(";") == list(TARGETS)  # type: ignore[index]


def test_the_core_needs_no_more_than_it_installs() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = core["tool"]["hatch"]["metadata"]["hooks"]["custom"]["extras"]
    for requirement in core["project"]["dependencies"] + extras["cli"] + extras["conformance"]:
        assert re.split(r"[>=<~]", requirement)[0] in TEXT, requirement


def test_the_command_is_the_same_everywhere() -> None:
    """In the Dockerfile's head, in the CI cell and in CONTRIBUTING.md."""
    command = "--device /dev/kfd --device /dev/dri --group-add video --ipc host"
    for file in (FOLDER / "Dockerfile", FOLDER / "pyproject.toml", ROOT / "CONTRIBUTING.md"):
        assert command in file.read_text(), file
