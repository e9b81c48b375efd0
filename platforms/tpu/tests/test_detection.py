"""A TPU is its device files. Without one, the backend runs only for who asks for it, and says what it is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest

import attn_dispatch as ad
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.dispatch import candidates, registry
from attn_dispatch.hardware import Device

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64)


def on(monkeypatch: pytest.MonkeyPatch, *generations: str) -> None:
    devices = tuple(Device("tpu", name, "/dev/accel0", {"generation": name}) for name in generations)
    monkeypatch.setattr(ad, "platform", replace(ad.platform, name="tpu", description="a TPU", devices=devices))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


def test_libtpu_is_installed_here_and_this_is_a_cpu_machine() -> None:
    assert importlib.util.find_spec("libtpu") is not None
    assert not [device for device in ad.platform.devices if device.kind == "tpu"]


def test_it_is_never_chosen_by_itself() -> None:
    assert "tpu/pallas" in registry().names()
    assert "tpu/pallas" not in candidates()
    with pytest.warns(ad.errors.FallbackWarning):
        assert ad.attention(SPEC).backend == "reference"


def test_named_it_says_that_it_simulates() -> None:
    assert ad.attention(SPEC, "tpu/pallas").backend == "tpu/pallas"
    verdict = ad.explain(SPEC, "tpu/pallas").verdicts[0]
    assert "interpreter" in verdict.note
    availability = ad.backends()["tpu/pallas"]
    assert availability.evidence == "simulated on CPU"
    assert "no TPU here" in availability.reason
    assert "JAX's Pallas interpreter with its rules for" in availability.reason  # whose simulator, and what is patched


def test_device_files_make_it_the_platforms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "v5e", "v5e")
    availability = registry().load("tpu/pallas").probe()
    assert availability
    assert availability.evidence == "ran"
    assert registry().load("tpu/pallas").verdict(SPEC).note == ""
    monkeypatch.setenv("ATTN_DISPATCH_PLATFORM", "tpu")
    assert candidates()[0] == "tpu/pallas"


def test_a_generation_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "v3")
    availability = registry().load("tpu/pallas").probe()
    assert not availability
    assert "v4" in availability.reason


def test_a_tpu_that_jax_does_not_see_is_an_error_and_no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "v5e")
    with pytest.raises(ad.errors.MissingPackageError, match="libtpu"):
        ad.attention(SPEC, "tpu/pallas").allocate(4)


def test_a_jax_that_the_simulator_was_not_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packages, "version", lambda self, *names: "0.14.1")
    availability = registry().load("tpu/pallas").probe()
    assert not availability
    assert "0.14.1" in availability.reason


def test_probing_initialises_no_backend_of_jax() -> None:
    code = (
        "import sys, attn_dispatch as ad\n"
        "ad.explain(ad.AttentionSpec(num_heads=4), 'tpu/pallas')\n"
        "print([m for m in ('jax', 'jaxlib', 'libtpu') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
