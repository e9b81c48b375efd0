"""Versions, devices, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.dispatch import candidates, registry
from attn_dispatch.hardware import Device

SPEC = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=64, dtype="float32")
BATCH = ad.AttentionMetadata.build([2, 1], [2, 40], [[0], [2, 1]])


def test_it_is_never_chosen_by_itself_and_says_what_it_is() -> None:
    assert "torch_xla/ragged" in registry().names()
    assert "torch_xla/ragged" not in candidates()
    availability = ad.backends()["torch_xla/ragged"]
    assert availability
    assert availability.evidence == "ran on CPU"
    assert "torch_xla 2.9" in availability.reason
    assert "plain XLA" in ad.explain(SPEC, "torch_xla/ragged").verdicts[0].note


@pytest.mark.parametrize(("package", "version"), [("torch", "2.13.0"), ("jax", "0.10.2"), ("torch_xla", "")])
def test_versions_that_do_not_fit_are_named(package: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Packages.version
    other = {package: version}
    monkeypatch.setattr(Packages, "version", lambda self, *names: other.get(names[0], installed(self, *names)))
    availability = registry().load("torch_xla/ragged").probe()
    assert not availability
    assert f"{package} {version or 'not installed'}" in availability.reason
    assert "2.9" in availability.remedy


def test_on_a_tpu_the_kernel_runs_unless_the_cpu_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry().load("torch_xla/ragged")
    device = Device("tpu", "v5e", "/dev/accel0", {"generation": "v5e"})
    monkeypatch.setattr(ad, "platform", replace(ad.platform, name="tpu", description="a TPU", devices=(device,)))
    assert not backend.on_tpu  # type: ignore[attr-defined]  # PJRT_DEVICE=CPU
    monkeypatch.delenv("PJRT_DEVICE")
    assert backend.on_tpu  # type: ignore[attr-defined]
    assert backend.verdict(SPEC).note == ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_heads": 9, "num_kv_heads": 3}, "num_kv_heads"),
        ({"num_heads": 8, "num_kv_heads": 8}, "num_heads"),
        ({"head_size": 256}, "head_size"),
        ({"kv_cache_dtype": "float8_e4m3fn"}, "kv_cache_dtype"),
        ({"causal": False}, "causal"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_on_the_cpu_too(fields: dict[str, object], field: str) -> None:
    verdict = registry().load("torch_xla/ragged").verdict(replace(SPEC, **fields))  # type: ignore[arg-type]
    assert field in [refusal.field for refusal in verdict.refusals]
    assert "torch_xla 2.9" in str(verdict)


def test_arrays_on_another_device_are_refused_before_anything_is_written() -> None:
    attn = ad.attention(SPEC, "torch_xla/ragged")
    cache = attn.allocate(3)
    rows = [torch.ones(3, h, 64) for h in (8, 2, 2)]
    with pytest.raises(ad.errors.ArrayError, match="xla:0"):
        attn.run(attn.plan(BATCH), *rows, cache)
    assert not cache.arrays["pages"].cpu().any()
    with pytest.raises(ad.errors.CacheError, match="xla:0"):
        attn.allocate(3, device="cpu")


def test_the_pages_are_the_callers_memory_after_a_step() -> None:
    attn = ad.attention(SPEC, "torch_xla/ragged")
    cache = attn.allocate(3)
    pages = cache.arrays["pages"]
    out = attn.run(attn.plan(BATCH), *[torch.ones(3, h, 64, device="xla:0") for h in (8, 2, 2)], cache)
    assert cache.arrays["pages"] is pages
    assert out.cpu().isfinite().all()
    assert int(pages.cpu().any(dim=(2, 3)).sum()) == 3  # the slots of three tokens
