"""Threads, folders and packages: one meaning for every backend, read without importing a vendor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

import attn_dispatch
from attn_dispatch.adapters import environment
from attn_dispatch.adapters.environment import (
    Packages,
    available_cpus,
    cache_folder,
    choice,
    make_cache_folder,
    num_threads,
)
from attn_dispatch.errors import EnvironmentVariableError


def quota(monkeypatch: pytest.MonkeyPatch, cpus: int, given: float | None) -> None:
    """Pretend an affinity of so many CPUs and a control group's quota."""
    facts = MappingProxyType({} if given is None else {"cpu_quota": given})
    monkeypatch.setattr(environment.attn_dispatch, "platform", SimpleNamespace(facts=facts), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.delenv(environment.THREADS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("cpus", "given", "expected"),
    [(64, None, 64), (64, 2.0, 2), (2, 8.0, 2), (64, 2.7, 2), (8, 0.5, 1)],
)
def test_threads_are_what_the_process_was_given(
    monkeypatch: pytest.MonkeyPatch, cpus: int, given: float | None, expected: int
) -> None:
    quota(monkeypatch, cpus, given)
    assert available_cpus() == num_threads() == expected


def test_the_user_decides_even_beyond_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    quota(monkeypatch, 2, 1.0)
    monkeypatch.setenv(environment.THREADS_VARIABLE, "5")
    assert num_threads() == 5


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "3000000", "9" * 5000])
def test_a_number_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv(environment.THREADS_VARIABLE, text)
    with pytest.raises(EnvironmentVariableError, match="whole number from 1 to 64"):
        num_threads()


def test_three_thousand_threads_are_refused_where_few_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.THREADS_VARIABLE, "3000")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(EnvironmentVariableError):
        num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 512)
    assert num_threads() == 3000


def test_a_backends_own_variable_has_few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTN_DISPATCH_X", raising=False)
    assert choice("ATTN_DISPATCH_X", "auto", "fast") == "auto"
    monkeypatch.setenv("ATTN_DISPATCH_X", "fast")
    assert choice("ATTN_DISPATCH_X", "auto", "fast") == "fast"
    monkeypatch.setenv("ATTN_DISPATCH_X", "fats")
    with pytest.raises(EnvironmentVariableError, match="'fats' is not one of auto, fast"):
        choice("ATTN_DISPATCH_X", "auto", "fast")


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(environment.CACHE_VARIABLE, "~/x")
    assert cache_folder("a", "b") == tmp_path / "x" / "a" / "b"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(environment.CACHE_VARIABLE, "here")
    found = cache_folder()
    assert found == tmp_path / "here"
    assert not found.exists()


@pytest.mark.parametrize("given", [None, "", "/somewhere"])
def test_without_the_variable_it_is_where_platformdirs_has_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    platformdirs = pytest.importorskip("platformdirs", reason="not run: platformdirs is not installed")
    monkeypatch.delenv(environment.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == Path(platformdirs.user_cache_dir("attn-dispatch", appauthor=False))


@pytest.mark.skipif(os.name == "nt", reason="not run: Windows has no modes")
def test_folders_that_are_made_are_their_owners_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(environment.CACHE_VARIABLE, str(tmp_path / "base"))
    old = os.umask(0)
    try:
        folder = make_cache_folder("cpu", "kernels")
    finally:
        os.umask(old)
    for made in (folder, folder.parent, folder.parent.parent):
        assert made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "base").chmod(0o755)
    assert make_cache_folder("cpu", "kernels") == folder
    assert (tmp_path / "base").stat().st_mode & 0o777 == 0o755  # the user's choice is left alone


def test_packages_are_found_without_importing_them(tmp_path: Path) -> None:
    (tmp_path / "fakevendor").mkdir()
    (tmp_path / "fakevendor" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "lone.py").write_text("raise RuntimeError('imported')")
    info = tmp_path / "fake_vendor-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-vendor\nVersion: 3.1\n")
    packages = Packages([str(tmp_path)])
    assert packages.folders("fakevendor") == [tmp_path / "fakevendor"]
    assert packages.folders("lone") == [tmp_path / "lone.py"]
    assert packages.folders("absent") == []
    assert packages.version("absent", "fake-vendor") == "3.1"
    assert packages.version("absent") == ""


def test_what_import_would_find_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Packages()
    assert here.folders("attn_dispatch")[0] == Path(attn_dispatch.__file__).parent
    assert here.version("numpy") == __import__("numpy").__version__
    monkeypatch.setitem(sys.modules, "unspecified", SimpleNamespace(__spec__=None))  # type: ignore[arg-type]
    assert here.folders("unspecified") == []


@pytest.mark.parametrize(
    "module", ["environment", "batch", "torch", "torch.backend", "torch.plan"], ids=lambda name: name
)
def test_what_a_backend_imports_at_its_top_imports_no_vendor(module: str) -> None:
    script = (
        f"import sys, attn_dispatch.adapters.{module}\n"
        "assert 'torch' not in sys.modules or not hasattr(sys.modules['torch'], 'Tensor')\n"
        "assert not {'jax', 'triton', 'numba', 'platformdirs'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
