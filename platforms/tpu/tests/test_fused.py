"""tpu-inference's kernels, in the simulator of DMAs: the only one that can move what they move."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checks import check_mutations, run_case
from attn_dispatch.dispatch import registry, verdict_of
from attn_dispatch_tpu.kernels import TPU_INFERENCE, choose_kernel, has_tpu_inference

from .dma_simulator import simulating

if not has_tpu_inference():
    pytest.skip(f"not run: needs tpu-inference {TPU_INFERENCE}", allow_module_level=True)

BIG = {"num_heads": 4, "num_kv_heads": 2, "head_size": 128}
MORE = (
    Case("fused bfloat16", "", ad.AttentionSpec(**BIG), (63, 0, 130), (1, 12, 1)),
    Case("prefill before decode", "", ad.AttentionSpec(dtype="float32", **BIG), (5, 40, 0, 9), (12, 1, 7, 1)),
    Case("not causal", "", ad.AttentionSpec(dtype="float32", causal=False, **BIG), (63, 0), (1, 12)),
    Case("float8", "", ad.AttentionSpec(kv_cache_dtype="fp8", **BIG), (63, 0), (1, 12), scales=(0.05, 0.02)),
    Case("head size 256", "", ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=256), (63, 0), (1, 12)),
    Case("shared", "", ad.AttentionSpec(dtype="float32", writes_kv=False, **BIG), (63, 20), (1, 12)),
    Case(
        "shared, heads of 64",
        "",
        ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, writes_kv=False),
        (63, 20),
        (1, 12),
    ),
    Case("some are not written", "", ad.AttentionSpec(dtype="float32", **BIG), (40, 20), (9, 12), skipped_slots=True),
    Case("padding", "", ad.AttentionSpec(dtype="float32", **BIG), (40, 0), (1, 9), padding=3),
)
OF_THE_KIT = ("mixed float32", "mixed bfloat16", "sinks float32", "sinks bfloat16", "window and sinks", "heads 9/3")


def cases() -> list[tuple[str, Case]]:
    chosen = [*MORE, *(case for case in CASES if case.name in OF_THE_KIT)]
    named = [(choose_kernel(case.spec)[0], case) for case in chosen]
    return [(kernel.name if kernel else "none", case) for kernel, case in named]


@pytest.mark.parametrize(("kernel", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_case_with_a_fused_kernel(kernel: str, case: Case) -> None:
    assert kernel in ("fused", "fused64")
    backend = registry().load("tpu/pallas")
    with simulating(uninitialized_memory="nan"):
        assert run_case(backend, case).verdict
        if "sinks" in case.name:
            assert check_mutations(backend, case) > 0


def test_plain_interpretation_is_of_jaxs_own_kernel_alone() -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, sinks=True)
    backend = registry().load("tpu/pallas")
    assert not verdict_of(backend, spec)
    with simulating():
        assert verdict_of(backend, spec)


def test_a_version_whose_kernels_have_not_run_here_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, sinks=True)
    version = Packages.version
    newer = {"tpu-inference": "0.32.0"}
    monkeypatch.setattr(Packages, "version", lambda self, *names: newer.get(names[0]) or version(self, *names))
    has_tpu_inference.cache_clear()
    try:
        with simulating():
            verdict = verdict_of(registry().load("tpu/pallas"), spec)
        assert not verdict
        assert f"tpu-inference=={TPU_INFERENCE}" in str(verdict)
    finally:
        monkeypatch.undo()
        has_tpu_inference.cache_clear()


def test_a_cache_in_another_kernels_layout_is_refused_before_anything_is_written() -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
    batch = ad.AttentionMetadata.build([3], [3], [[0]], 32)
    rows = [np.ones((3, h, 64), np.float32) for h in (4, 2, 2)]
    with simulating():
        cache = ad.attention(spec, "tpu/pallas").allocate(2)
        other = ad.attention(replace(spec, causal=False), "tpu/pallas")
        with pytest.raises(ad.errors.CacheError, match="fused"):
            other.run(other.plan(batch), *rows, cache)
    assert not np.asarray(cache.arrays["pages"]).any()


def test_loading_a_kernel_leaves_no_trace_of_its_package() -> None:
    from attn_dispatch_tpu.fused import kernel_module

    module = kernel_module("fused64")
    assert module.__name__.startswith("tpu_inference.")
    assert importlib.util.find_spec("tpu_inference").origin  # type: ignore[union-attr]
    assert not [name for name in sys.modules if name.partition(".")[0] == "tpu_inference"]
