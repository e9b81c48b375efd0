"""Machines that are not here, and the vendors' real packages as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.hardware import detect
from attn_dispatch_rocm.machine import Machine
from platforms.rocm.evidence.packages import COMMAND, PACKAGES

MakeMachine = Callable[..., Machine]

COMPILED = Path(__file__).parent / "compiled"
"""Holds a `flash_attn_2_cuda`: what the CK build installs beside its package. That it is there is all that is read."""

VERSIONS = {"gfx90a": 90010, "gfx942": 90402, "gfx950": 90500, "gfx1100": 110000, "gfx1201": 120001}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interface: compares with a vendor's real package; runs none of its kernels")


@pytest.fixture
def machine(tmp_path: Path) -> MakeMachine:
    """Make a machine with GPUs of these targets, and with these of the vendors' packages.

    Its facts are read by the library's own detection from a folder with the files that such a machine has.
    """

    def make(
        *targets: str,
        packages: tuple[str, ...] = (),
        torch: str = "hip = '6.4.43482'",
        compiled: bool = True,
        files: dict[str, str] | None = None,
    ) -> Machine:
        root = tmp_path / "machine"
        written = {"proc/cpuinfo": "processor\t: 0\nmodel name\t: EPYC\nflags\t\t: avx2\n"} | (files or {})
        if targets:
            written["dev/kfd"] = ""
            written["sys/class/kfd/kfd/topology/nodes/0/properties"] = "cpu_cores_count 96\nsimd_count 0\n"
        for i, target in enumerate(targets, start=1):
            text = f"simd_count 1216\ngfx_target_version {VERSIONS[target]}\nlocation_id {i << 8}\n"
            written[f"sys/class/kfd/kfd/topology/nodes/{i}/properties"] = text
        if torch:
            written |= {"site/torch/version.py": torch + "\n", "site/torch/__init__.py": ""}
        if compiled:
            # What the CK build installs beside the package; that it is there is all that is looked for.
            written["site/flash_attn_2_cuda.py"] = ""
        for name, text in written.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        platform = detect(root, environ={}, search=["site"])
        return Machine(platform, Packages([str(root / "site"), *(str(real(package)) for package in packages)]))

    return make


def real(package: str) -> Path:
    """Return a vendor's unpacked package, or skip."""
    try:
        return PACKAGES[package].needed(COMMAND)
    except FileNotFoundError as missing:
        return pytest.skip(f"not run: {missing}")
