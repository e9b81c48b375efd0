"""Who is chosen on machines that are not here, and that no plug-in takes selection down."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from fake_machines import ARC, CPU_TORCH, CUDA_TORCH, JETSON, MI300X, NVIDIA, ROCM_TORCH, WSL, Files, machine
from fake_plugins import COMPILED, REFERENCE, entry, portable

import attn_dispatch as ad
from attn_dispatch import dispatch, installed
from attn_dispatch.errors import BackendRefusedError, FallbackWarning, NoBackendError
from attn_dispatch.reference import ReferenceBackend
from attn_dispatch.registry import Registry
from attn_dispatch.settings import Settings

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, dtype="float32")

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make this process believe in another machine and in other plug-ins."""

    def installed_on(files: Files, *points: EntryPoint, closed: str = "") -> None:
        for name in [name for name in os.environ if name.startswith("ATTN_DISPATCH_")]:
            monkeypatch.delenv(name)
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, _: not closed or not str(path).endswith(closed))
            here = machine(tmp_path, files, search=["site"])
        fresh = Registry([*points, REFERENCE])
        monkeypatch.setattr(installed, "machine", lambda: here)
        monkeypatch.setattr(installed, "registry", lambda: fresh)

    return installed_on


@pytest.mark.parametrize(
    ("files", "closed", "words"),
    [
        (NVIDIA | CPU_TORCH, "", "install torch's CUDA build"),
        (JETSON | CPU_TORCH, "", "install torch's CUDA build"),
        (MI300X | CPU_TORCH, "", "install torch's ROCm build"),
        (ARC | CPU_TORCH, "", "install torch's XPU build"),
        (MI300X | ROCM_TORCH, "dev/kfd", "/dev/kfd: this user may not open it"),
    ],
    ids=["NVIDIA", "Jetson", "AMD", "Intel", "AMD that may not be opened"],
)
def test_a_torch_that_cannot_use_the_device_stands_where_the_cpu_backends_do(
    install: Install, files: Files, closed: str, words: str
) -> None:
    install(files, *portable(), COMPILED, closed=closed)
    with pytest.warns(FallbackWarning, match=f"computes on the CPU: this machine has a device(.|\n)*{words}"):
        assert ad.attention(SPEC).backend == "cpu/compiled"
    assert dispatch.candidates() == ["cpu/compiled", "torch/portable", "reference"]
    # Where nothing else computes on the CPU, it is chosen, and said.
    install(files, *portable(), closed=closed)
    with pytest.warns(FallbackWarning, match="computes on the CPU"):
        assert ad.attention(SPEC).backend == "torch/portable"


def test_a_torch_for_the_device_is_chosen_in_silence(install: Install) -> None:
    install(NVIDIA | CUDA_TORCH, *portable(), COMPILED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ad.attention(SPEC).backend == "torch/portable"


def test_a_preferred_backend_is_chosen_in_silence(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(NVIDIA | CPU_TORCH, *portable(), COMPILED)
    monkeypatch.setenv("ATTN_DISPATCH_PREFER", "torch/portable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ad.attention(SPEC).backend == "torch/portable"


def test_a_vendor_that_cannot_be_imported_leaves_the_choice_to_the_next(install: Install) -> None:
    install(NVIDIA | CUDA_TORCH, entry(10, "cuda/vendor", "Vendor", "cuda"), *portable())
    attn = ad.attention(SPEC)
    assert attn.backend == "torch/portable"
    verdict = ad.explain(SPEC).verdicts[0]
    assert (verdict.backend, verdict.answer) == ("cuda/vendor", "?")
    assert "undefined symbol" in str(verdict)
    # A backend that was named is not replaced by another.
    with pytest.raises(BackendRefusedError, match="undefined symbol"):
        ad.attention(SPEC, "cuda/vendor")


def test_a_backend_that_nobody_ran_yet_stands_where_it_stands(install: Install) -> None:
    install(NVIDIA | CUDA_TORCH, entry(10, "cuda/new", "NeverRun", "cuda"), *portable())
    assert ad.attention(SPEC).backend == "cuda/new"


def test_the_vendor_is_imported_by_the_module_beside_the_backends_own(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_library.py").write_text(
        "from attn_dispatch.reference import ReferenceBackend as R\nclass B(R): ...\n"
    )
    (tmp_path / "some_library_call.py").write_text("import no_such_vendor\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    install({}, EntryPoint("1 some/library", "some_library:B", "attn_dispatch.backends.cpu"), COMPILED)
    assert ad.attention(SPEC).backend == "cpu/compiled"
    assert "ModuleNotFoundError: No module named 'no_such_vendor'" in str(ad.explain(SPEC).verdicts[0])


def test_the_default_backend_is_one_that_could_run(install: Install) -> None:
    install(NVIDIA | CUDA_TORCH, entry(10, "cuda/absent", "NotInstalled", "cuda"), *portable())
    assert ad.default_backend == "torch/portable"
    install(NVIDIA | CUDA_TORCH, entry(10, "cuda/absent", "NotInstalled", "cuda"))
    assert ad.default_backend == "reference"


@pytest.mark.parametrize("backend", [None, "cpu/compiled"])
def test_the_environment_is_read_once(install: Install, monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    install({}, COMPILED)
    read, times = Settings.read, []
    monkeypatch.setattr(Settings, "read", lambda *args: times.append(1) or read(*args))
    ad.attention(SPEC, backend)
    assert len(times) == 1


def test_one_backend_is_chosen_for_all_that_a_variant_needs(install: Install) -> None:
    class NoWindows(ReferenceBackend):
        def verdict(self, spec: ad.AttentionSpec) -> ad.Verdict:
            no = ad.Refusal("window", spec.window, "not here")
            return self.refuse(no) if spec.window != (-1, -1) else self.accept()

    narrow, windowed = replace(SPEC, head_size=8), replace(SPEC, window=(3, 0))
    install({}, COMPILED)
    plain = NoWindows("plain")
    assert dispatch.choose([SPEC, narrow], plain) is plain
    assert dispatch.choose([SPEC, (windowed, narrow)], plain) is plain
    with pytest.raises(BackendRefusedError, match=r"Scan is made of these passes:(.|\n)* or (.|\n)*window=\(3, 0\)"):
        dispatch.choose([SPEC, (windowed, replace(narrow, window=(1, 0)))], plain, purpose="Scan")
    assert dispatch.choose([SPEC, windowed], purpose="Scan") == "cpu/compiled"
    install({})
    with pytest.warns(FallbackWarning, match="Scan: reference was chosen"):
        assert dispatch.choose([SPEC, windowed], purpose="Scan") == "reference"
    with pytest.raises(NoBackendError, match="no backend runs all of them"):
        dispatch.choose([SPEC, replace(SPEC, kv_cache_dtype="uint8")], purpose="Scan")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ProbeRaises", "RuntimeError: the driver said [/no]"),
        ("VerdictExits", "SystemExit: 3"),
        ("VerdictIsADict", "verdict() returned {'yes': True}, not a Verdict"),
    ],
)
def test_a_plug_in_that_raises_when_asked_is_a_verdict(install: Install, value: str, words: str) -> None:
    install({}, entry(1, "bad/backend", value, "cpu"), COMPILED)
    assert ad.attention(SPEC).backend == "cpu/compiled"
    verdict = ad.explain(SPEC).verdicts[0]
    assert (verdict.answer, words in str(verdict)) == ("?", True)
    assert "cpu/compiled" in ad.backends()
    with pytest.raises(BackendRefusedError):
        ad.attention(SPEC, "bad/backend")


def test_the_user_can_interrupt_a_plug_in(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    install({}, COMPILED)
    backend = installed.registry().load("cpu/compiled")
    for method in ("probe", "verdict"):
        with monkeypatch.context() as patch:
            patch.setattr(backend, method, interrupt)
            for ask in (
                (lambda: ad.attention(SPEC), ad.backends) if method == "probe" else (lambda: ad.attention(SPEC),)
            ):
                with pytest.raises(KeyboardInterrupt):
                    ask()


@pytest.mark.parametrize(
    "end", ["raise SystemExit('no licence')", "class Odd(BaseException): ...\nraise Odd('no licence')"]
)
def test_a_plug_in_that_ends_the_process_when_imported_is_a_verdict(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    name = f"ends_{len(end)}"
    (tmp_path / f"{name}.py").write_text(end)
    monkeypatch.syspath_prepend(str(tmp_path))
    install({}, EntryPoint("1 bad/backend", f"{name}:Backend", "attn_dispatch.backends.cpu"), COMPILED)
    assert ad.attention(SPEC).backend == "cpu/compiled"
    assert "no licence" in str(ad.explain(SPEC).verdicts[0])


@pytest.mark.parametrize("name", ["x[/x]", "a,b", "two words", "../x", "x/", "[bold]/y", ""])
def test_a_name_that_no_table_and_no_variable_can_hold_is_a_problem(name: str) -> None:
    registry = Registry([EntryPoint(f"1 {name}", "plug:Fast", "attn_dispatch.backends.cpu")])
    assert registry.names() == []
    assert "<rank> <folder/library>" in registry.problems[0]


@pytest.mark.parametrize(
    "entry_points",
    [
        b"no section\nx = y\n",
        b"[attn_dispatch.backends.cpu]\nno equals sign\n",
        b"[a\nx=y",
        b"\xff\xfe[a]\nx=y\n",
        b"=\n[x]\n=\n",
    ],
)
@pytest.mark.parametrize("metadata", ["Metadata-Version: 2.1\nName: unrelated\nVersion: 1\n", None])
def test_a_distribution_with_malformed_metadata_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_points: bytes, metadata: str | None
) -> None:
    info = tmp_path / "unrelated-1.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_bytes(entry_points)
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    names = Registry().names()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Registry().names() == names


def test_wsl_is_a_machine_with_a_gpu(install: Install) -> None:
    """Windows does not tell the GPU's model: that is no reason for the backends of its kind not to be asked."""
    install(WSL | {"usr/lib/wsl/lib/libcuda.so.1": ""} | CUDA_TORCH, *portable(), COMPILED)
    assert (dispatch.platform(), ad.attention(SPEC).backend.name) == ("cuda", "torch/portable")
