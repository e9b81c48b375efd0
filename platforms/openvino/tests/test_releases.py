"""Which OpenVINO releases are known, and that one whose inputs are others is refused instead of guessed at."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import attn_dispatch as ad
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import AttentionDispatchError, BackendLoadError, NoBackendError
from attn_dispatch_openvino import releases
from attn_dispatch_openvino.releases import INPUTS, RELEASES, installed_version, release_of

NAME = "openvino/paged"
SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
UNKNOWN = ["2024.6.0", "2025.3.0", "2026.5.0", "2027.0.0", "2026", "nightly"]


@pytest.mark.parametrize("version", UNKNOWN)
def test_a_release_that_was_not_measured(version: str, monkeypatch: pytest.MonkeyPatch, still_computes: None) -> None:
    backend = registry().load(NAME)
    for module in ("paged", "releases"):
        monkeypatch.setattr(f"attn_dispatch_openvino.{module}.installed_version", lambda: version)
    found = backend.probe()
    assert not found
    assert f"OpenVINO {version}" in found.reason
    assert "2025.4, 2026.0, 2026.1, 2026.2, 2026.3, 2026.4" in found.reason
    assert "pip install" in found.remedy
    # It was asked for by name: the error says the same.
    with pytest.raises(AttentionDispatchError, match=r"2025\.4, 2026\.0"):
        backend.verdict(SPEC)
    with pytest.raises(NoBackendError, match=r"2025\.4, 2026\.0"):
        ad.attention(SPEC, NAME)
    assert "2026.4" in str(ad.explain(SPEC))
    monkeypatch.undo()


def test_without_openvino(monkeypatch: pytest.MonkeyPatch, still_computes: None) -> None:
    monkeypatch.setattr("attn_dispatch_openvino.paged.installed_version", lambda: "")
    found = registry().load(NAME).probe()
    assert not found
    assert (found.reason, found.remedy[:11]) == ("OpenVINO is not installed", "pip install")
    monkeypatch.undo()


@pytest.mark.parametrize("patch", ["2026.4.0", "2026.4.1", "2026.4.1rc1", "2026.4.0.dev20260901"])
def test_patches_of_a_known_release(patch: str) -> None:
    assert release_of(patch) is RELEASES[2026, 4]


def test_lists_of_inputs_only_grow() -> None:
    assert len(set(INPUTS)) == len(INPUTS) == max(release.inputs for release in RELEASES.values())
    counts = [release.inputs for _, release in sorted(RELEASES.items())]
    assert counts == sorted(counts)


def key(inputs: int) -> Any:
    from attn_dispatch_openvino.program import ProgramKey
    from attn_dispatch_openvino.releases import Target

    release = release_of(installed_version())
    assert release is not None
    return ProgramKey(
        num_heads=4, num_kv_heads=2, head_size=64, value_head_size=64, dtype="float32", cache_dtype="float32",
        alibi=False, sinks=False, token_types=False, tree=False, writes=True,
        target=Target(release._replace(inputs=inputs), "CPU", 1),
    )  # fmt: skip


@pytest.mark.parametrize("inputs", range(13, len(INPUTS) + 1))
def test_the_installed_op_takes_the_inputs_that_are_known_of_it(inputs: int, still_computes: None) -> None:
    """An experimental op may change under the same version: then its own check says so, and we say what to do."""
    from attn_dispatch_openvino.program import compiled

    release = release_of(installed_version())
    assert release is not None
    if inputs == release.inputs:
        assert compiled(key(inputs)).inputs.keys() >= set(INPUTS[:9])
        return
    with pytest.raises(BackendLoadError, match=rf"does not take the {inputs} inputs.*2025\.4, 2026\.0.*pip install"):
        compiled(key(inputs))


def test_a_list_of_inputs_in_another_order(monkeypatch: pytest.MonkeyPatch, still_computes: None) -> None:
    """As many inputs, but not those: the op looks at types and ranks."""
    from attn_dispatch_openvino import program as compiling

    release = release_of(installed_version())
    assert release is not None
    swapped = list(INPUTS)
    swapped[5], swapped[9] = swapped[9], swapped[5]  # lengths where the scale is expected
    monkeypatch.setattr(compiling, "INPUTS", tuple(swapped))
    with pytest.raises(BackendLoadError, match="Releases that are known"):
        compiling._model(key(release.inputs))
    monkeypatch.undo()


def test_versions_are_read_from_metadata_alone() -> None:
    code = (
        "import sys; from attn_dispatch_openvino.releases import installed_version\n"
        "print(installed_version()); assert 'openvino' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == releases.installed_version()
