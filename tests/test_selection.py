"""Registry and selection: who is found, who is chosen, and what is said of the others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest

import attn_dispatch as ad
from attn_dispatch import dispatch, installed
from attn_dispatch.errors import (
    BackendLoadError,
    BackendRefusedError,
    ContractVersionError,
    EnvironmentVariableError,
    NoBackendError,
    UnknownBackendError,
)
from attn_dispatch.registry import Registry
from attn_dispatch.settings import Settings

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, dtype="float32")


def point(name: str, value: str, group: str = "attn_dispatch.backends.cpu") -> EntryPoint:
    return EntryPoint(name=name, value=value, group=group)


REFERENCE = point("99 reference", "attn_dispatch.reference:ReferenceBackend", "attn_dispatch.backends.any")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plug-in of several backends, installed for this process and those that it starts."""
    (tmp_path / "plug.py").write_text(
        dedent("""
        from attn_dispatch.backend import Refusal
        from attn_dispatch.reference import ReferenceBackend

        class Fast(ReferenceBackend):
            def verdict(self, spec):
                if spec.block_size != 32:
                    return self.refuse(Refusal("block_size", spec.block_size, "needs 32", "Ask for block_size=32"))
                return self.accept()

        class Old(ReferenceBackend):
            contract_version = 0

        class Absent(ReferenceBackend):
            def probe(self):
                from attn_dispatch import Availability
                return Availability(False, "no NVIDIA GPU here", "Use another machine")

        def not_a_backend(name):
            return 3
        """)
    )
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "raises.py").write_text("raise ImportError('torch 2.13.0 found, 2.8.* needed')\n")
    info = tmp_path / "plug-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(
        dedent("""
        [attn_dispatch.backends.cpu]
        1 plug/fast = plug:Fast
        2 plug/old = plug:Old
        3 plug/absent = plug:Absent
        4 plug/raises = raises:Backend
        5 plug/not = plug:not_a_backend
        nameless = plug:Fast
        [attn_dispatch.environment]
        ATTN_DISPATCH_PLUG_DEVICE = plug:DEVICE
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("ATTN_DISPATCH_PLATFORM", "cpu")
    fresh = Registry()
    monkeypatch.setattr(installed, "registry", lambda: fresh)
    for name in ("plug", "raises", "crash"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_what_is_installed_is_found_and_ranked(plugins: Path) -> None:
    names = installed.registry().names()
    assert names[:5] == ["plug/fast", "plug/old", "plug/absent", "plug/raises", "plug/not"]
    assert names[-1] == "reference"
    assert "nameless" in installed.registry().problems[0]
    attn = ad.attention(SPEC)
    assert attn.backend == "plug/fast"
    assert (attn.explanation.requested, attn.explanation.source) == (None, "the platform's order")
    assert attn.verdicts[0].backend == "plug/fast"


def test_nothing_is_imported_before_it_is_asked(plugins: Path) -> None:
    assert "plug" not in sys.modules
    installed.registry().names()
    dispatch.candidates()
    assert "plug" not in sys.modules


def test_a_refusal_goes_to_the_next_and_every_verdict_is_kept(plugins: Path) -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, dtype="float32", block_size=16)
    with pytest.warns(ad.errors.FallbackWarning, match="reference") if only_reference() else contextless():
        attn = ad.attention(spec)
    assert attn.backend != "plug/fast"
    verdicts = {v.backend: v for v in ad.explain(spec).verdicts}
    refusal = verdicts["plug/fast"].refusals[0]
    assert (refusal.field, refusal.value, refusal.accepts) == ("block_size", 16, "needs 32")
    assert verdicts["plug/absent"].answer == "no"
    assert verdicts["plug/raises"].answer == verdicts["plug/old"].answer == "?"
    text = str(ad.explain(spec))
    for words in ("block_size=16: needs 32. Ask for block_size=32", "no NVIDIA GPU here", "2.8.* needed", "version 0"):
        assert words in text


def only_reference() -> bool:
    return not [name for name in installed.registry().ranked("cpu") if not name.startswith("plug/")]


class contextless:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_what_is_named_runs_or_raises_its_verdict(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ad.AttentionSpec(num_heads=4, block_size=16)
    with pytest.raises(BackendRefusedError, match="block_size=16: needs 32"):
        ad.attention(spec, backend="plug/fast")
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "plug/fast")
    with pytest.raises(BackendRefusedError, match="ATTN_DISPATCH_BACKEND"):
        ad.attention(spec)
    assert ad.attention(SPEC).backend == "plug/fast"
    with ad.use_backend("reference"):
        assert ad.attention(SPEC).backend == "reference"
        assert ad.attention(SPEC, backend="plug/fast").backend == "plug/fast"
    assert ad.attention(SPEC).backend == "plug/fast"


def test_contexts_do_not_leak_into_other_threads_and_tasks(plugins: Path) -> None:
    seen: dict[str, str] = {}

    async def task(name: str) -> None:
        with ad.use_backend(name):
            await asyncio.sleep(0.01)
            seen[name] = str(ad.attention(SPEC).backend)

    async def both() -> None:
        await asyncio.gather(task("reference"), task("plug/fast"))

    asyncio.run(both())
    assert seen == {"reference": "reference", "plug/fast": "plug/fast"}
    with ad.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.update(thread=str(ad.attention(SPEC).backend)))
        thread.start()
        thread.join()
    assert seen["thread"] == "plug/fast"


def test_prefer_and_disable(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_PREFER", "reference, plug/absent")
    assert ad.attention(SPEC).backend == "reference"
    assert ad.explain(SPEC).source == "ATTN_DISPATCH_PREFER"
    monkeypatch.setenv("ATTN_DISPATCH_PREFER", "")
    monkeypatch.setenv("ATTN_DISPATCH_DISABLE", ",".join(installed.registry().names()))
    with pytest.raises(NoBackendError, match="no backend can run heads=4/2"):
        ad.attention(SPEC)
    assert ad.attention(SPEC, backend="plug/fast").backend == "plug/fast"
    monkeypatch.setenv("ATTN_DISPATCH_DISABLE", "plug/fats")
    with pytest.raises(EnvironmentVariableError, match="Did you mean plug/fast"):
        ad.attention(SPEC)


def test_names_that_are_not_known(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownBackendError, match=r"Did you mean plug/fast\? Installed: .*reference"):
        ad.attention(SPEC, backend="plug/fats")
    with pytest.raises(UnknownBackendError), ad.use_backend("nonsense"):
        pass
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "nonsense")
    with pytest.raises(UnknownBackendError, match="reference"):
        ad.attention(SPEC)


def test_a_plugin_of_another_contract_is_refused_by_name_and_version(plugins: Path) -> None:
    with pytest.raises(ContractVersionError, match=r"plug 1\.5 implements version 0 of the contract"):
        installed.registry().load("plug/old")
    with pytest.raises(BackendLoadError, match="is a int, not a Backend"):
        installed.registry().load("plug/not")
    with pytest.raises(BackendRefusedError, match=r"plug 1\.5 failed to load: ImportError: torch 2\.13\.0 found"):
        ad.attention(SPEC, backend="plug/raises")
    assert not ad.backends()["plug/raises"]


def test_two_distributions_may_not_claim_one_name() -> None:
    registry = Registry([point("1 a/b", "first:Backend"), point("1 a/b", "second:Backend")])
    with pytest.raises(BackendLoadError, match="declared twice"):
        registry.load("a/b")


def test_variables_that_are_not_known_are_refused_with_the_nearest() -> None:
    with pytest.raises(EnvironmentVariableError, match=r"ATTN_DISPATCH_BAKEND .* Did you mean ATTN_DISPATCH_BACKEND\?"):
        Settings.read(environ={"ATTN_DISPATCH_BAKEND": "x"})
    with pytest.raises(EnvironmentVariableError, match="Did you mean cuda"):
        Settings.read(environ={"ATTN_DISPATCH_PLATFORM": "cud"})
    with pytest.raises(EnvironmentVariableError, match="NUM_THREADS"):
        Settings.read(environ={"ATTN_DISPATCH_NUM_THREADS": "0"})
    assert Settings.read(["ATTN_DISPATCH_X"], {"ATTN_DISPATCH_X": "1", "OTHER": "2"}) == Settings()


def test_a_plugins_own_variable_is_known(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_PLUG_DEVICE", "3")
    assert ad.attention(SPEC).backend == "plug/fast"


def test_a_backend_of_another_platform_is_chosen_with_a_warning(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_PLATFORM", "tpu")
    monkeypatch.setenv("ATTN_DISPATCH_DISABLE", ",".join(installed.registry().ranked("tpu")))
    with pytest.warns(ad.errors.FallbackWarning, match="computes on the CPU: this machine has a device"):
        assert ad.attention(SPEC).backend == "plug/fast"


def test_the_reference_is_never_chosen_without_a_word(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DISPATCH_DISABLE", ",".join(installed.registry().ranked("cpu")))
    with pytest.warns(ad.errors.FallbackWarning, match="exact, but slow"):
        assert ad.attention(SPEC).backend == "reference"


def test_layers_of_one_model_are_chosen_for_one_by_one(plugins: Path) -> None:
    small = ad.AttentionSpec(num_heads=4, block_size=16, dtype="float32")
    assert ad.explain(SPEC).chosen == "plug/fast"
    assert ad.explain(small).chosen != "plug/fast"


def test_a_refused_scale() -> None:
    from dataclasses import replace

    from attn_dispatch.reference import ReferenceBackend

    class Ignores(ReferenceBackend):
        capabilities = replace(ReferenceBackend.capabilities, applies_scales=False)

    spec = ad.AttentionSpec(num_heads=4, dtype="float32", kv_cache_dtype="int8")
    ad.attention(spec, Ignores("ignores"))
    with pytest.raises(BackendRefusedError, match="k_scale"):
        ad.attention(spec, Ignores("ignores"), k_scale=0.5)


def python(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **environ}
    )


def test_importing_with_a_wrong_variable_warns_and_choosing_raises() -> None:
    script = "import attn_dispatch as ad; print(ad.platform.name); ad.attention(ad.AttentionSpec(num_heads=2))"
    done = python(script, ATTN_DISPATCH_BAKEND="x")
    assert done.returncode == 1
    assert done.stdout.strip()
    assert done.stderr.count("Did you mean ATTN_DISPATCH_BACKEND") == 2


def test_the_platform_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    done = python("import attn_dispatch as ad; print(ad.platform.name)", ATTN_DISPATCH_PLATFORM="cuda")
    assert done.stdout.strip() == "cuda", done.stderr
