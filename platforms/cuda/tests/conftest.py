"""Machines that are not here, and the vendors' real packages as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from attn_dispatch.conformance.interface import install_together
from attn_dispatch.hardware import detect
from attn_dispatch_cuda.machine import Machine
from platforms.cuda.evidence.packages import packages as vendors_packages

MakeMachine = Callable[..., Machine]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interface: compares with a vendor's real package; runs none of its kernels")


@pytest.fixture
def machine(tmp_path: Path) -> MakeMachine:
    """Make a machine with GPUs of these models, and with these of the vendors' packages.

    Its facts are read by the library's own detection from a folder with the files that such a machine has.
    """

    def make(*models: str, packages: tuple[str, ...] = (), torch: str = "13.0", more: tuple[Path, ...] = ()) -> Machine:
        root = tmp_path / "machine"
        files = {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2\n"}
        for i, model in enumerate(models):
            files[f"dev/nvidia{i}"] = ""
            files[f"proc/driver/nvidia/gpus/0000:0{i}:00.0/information"] = f"Model:\t{model}\nDevice Minor:\t{i}\n"
        if torch:
            files["site/torch/version.py"] = f"cuda = {torch!r}\n" if torch != "cpu" else "cuda = None\n"
            files["site/torch/__init__.py"] = ""
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        # In one folder, as where pip installs: FlashAttention 4 lies within FlashAttention 2's.
        found = [install_together(tmp_path / "-".join(packages), *map(real, packages))] if packages else []
        platform = detect(root, environ={}, search=["site"])
        return Machine(platform, [str(root / "site"), *map(str, (*found, *more))])

    return make


def real(package: str) -> Path:
    """Return a vendor's unpacked package, or skip."""
    found = vendors_packages()[package].path
    if not found.exists():
        pytest.skip(f"not run: {package} was not fetched (python -m platforms.cuda.evidence.packages)")
    return found
