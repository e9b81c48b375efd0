"""AITER's own Triton kernel, through the backend, in Triton's interpreter (TRITON_INTERPRET=1).

The kit's cases, as far as the kernel computes them, in types that the interpreter multiplies rightly: float16, float32.
Whatever the backend says yes to is held to the contract, and mistakes must be noticed. It shows numbers, not a GPU. One
case of each feature; ALL_INTERPRETED=1 runs the whole kit, in four minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from attn_dispatch.adapters.batch import HostBatch
from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.conformance import CASES, BackendConformance, Case, check_mutations, run_case
from attn_dispatch.contract import AttentionSpec
from attn_dispatch_rocm.aiter import AiterBackend
from attn_dispatch_rocm.aiter_call import FUNCTIONS
from attn_dispatch_rocm.aiter_kernels import UNIFIED, refusals_of
from platforms.rocm.evidence import aiter_triton
from platforms.rocm.evidence.packages import AITER, COMMAND
from platforms.rocm.evidence.stubs import fake_machine

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("not run: set TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="not run: needs triton")
if not AITER.path.exists():
    pytest.skip(f"not run: amd-aiter was not fetched ({COMMAND})", allow_module_level=True)

TARGET = "gfx942"


class Interpreted(AiterBackend):
    """The backend with its general kernel, on the CPU."""

    device_type = "cpu"

    def probe(self) -> Availability:
        return Availability(True, "AITER's Triton kernel, interpreted", evidence="simulated on CPU")

    def verdict(self, spec: AttentionSpec) -> Verdict:
        package = self.installed
        assert package is not None
        if "bfloat16" in (spec.dtype, spec.kv_cache_dtype):
            return self.refuse(Refusal("dtype", spec.dtype, "Triton's interpreter multiplies bfloat16 wrongly"))
        if spec.dtype == "float32" and spec.kv_cache_dtype == "float16":
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, "float32 stands for float16 here"))
        stored = "float16" if spec.kv_cache_dtype == spec.dtype else spec.kv_cache_dtype
        layer = replace(spec, dtype="float16", kv_cache_dtype=stored) if spec.dtype == "float32" else spec
        return self.refuse(*refusals_of(package, UNIFIED, TARGET, layer))

    def kernel(self, spec: AttentionSpec, target: str, host: HostBatch) -> str:
        return UNIFIED


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Iterator[None]:
    """AITER's module, as it is on the target."""
    with aiter_triton.load(AITER.path, aiter_triton.TARGETS[TARGET]) as module:
        FUNCTIONS[UNIFIED].__dict__["function"] = module.unified_attention
        yield
        del FUNCTIONS[UNIFIED].__dict__["function"]


BACKEND = Interpreted("test/aiter", fake_machine(TARGET, AITER.path))
ACCEPTED = [case for case in CASES if case.tokens <= 170 and BACKEND.verdict(case.spec)]


def cost(case: Case) -> int:
    """What the interpreter spends grows with programs and tiles."""
    return case.spec.num_kv_heads * (sum(case.new) + sum(case.context)) * max(case.spec.head_size, 64)


BY_FEATURE = {case.feature: case for case in sorted(ACCEPTED, key=cost, reverse=True)}

if os.environ.get("ALL_INTERPRETED"):

    class TestInterpreted(BackendConformance):
        backend: ClassVar[Any] = BACKEND
        max_tokens = 170
        examples = 12

        left_out: ClassVar[Any] = {"four threads": "Triton's interpreter is for one thread"}


def test_what_is_here() -> None:
    """So many features of the kit are computed by the vendor's kernel itself."""
    assert {"decode", "mixed", "window", "soft-cap", "ALiBi", "sinks", "padding", "head size 80"} <= BY_FEATURE.keys()


@pytest.mark.parametrize("case", BY_FEATURE.values(), ids=lambda case: case.name)
def test_case(case: Case) -> None:
    assert run_case(BACKEND, case).verdict


@pytest.mark.parametrize("feature", ["window", "soft-cap", "ALiBi", "sinks", "scale", "mixed"])
def test_mistake_is_noticed(feature: str) -> None:
    check_mutations(BACKEND, BY_FEATURE[feature])


def test_a_long_context_is_split(kernel: None) -> None:
    """Beyond 512 tokens the vendor's launcher takes its other pair of kernels."""
    import numpy as np

    import attn_dispatch as ad

    for fields in ({}, {"sinks": True}, {"alibi": True}, {"logits_soft_cap": 3.0}, {"window": (600, 0)}):
        spec = ad.AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, dtype="float32", block_size=64, **fields)
        own: dict[str, Any] = {"alibi_slopes": np.array([0.3, 0.01])} if spec.alibi else {}
        own |= {"sinks": np.array([0.5, 2.0])} if spec.sinks else {}
        attn, exact = ad.attention(spec, BACKEND, **own), ad.attention(spec, "reference", **own)
        cache, other = attn.allocate(12), exact.allocate(12)
        torch.manual_seed(0)
        for name in ("key", "value"):
            cache.arrays[name].normal_()
            other.arrays[name][...] = cache.arrays[name].transpose(1, 2).numpy()
        batch = ad.AttentionMetadata.build([1], [700], [[3, 5, 1, 0, 2, 4, 11, 10, 9, 8, 7]], 64)
        q, k, v = (torch.randn(1, n, 16) for n in (2, 1, 1))
        found = attn.run(attn.plan(batch), q, k, v, cache)
        expected = exact.run(exact.plan(batch), q.numpy(), k.numpy(), v.numpy(), other)
        assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_fixed_plan_is_renewed(kernel: None) -> None:
    """Its table covers the kernel's whole tiles: 100 tokens are looked up as 128."""
    import attn_dispatch as ad

    spec = ad.AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, dtype="float16", block_size=16)
    attn = ad.attention(spec, BACKEND)
    caches = [attn.allocate(14) for _ in range(2)]
    torch.manual_seed(0)

    def batch(lens: list[int]) -> ad.AttentionMetadata:
        tables = [list(range(7 * s, 7 * s + -(-n // 16))) for s, n in enumerate(lens)]
        slots = [table[-1] * 16 + (n - 1) % 16 if n else -1 for n, table in zip(lens, tables, strict=True)]
        return ad.AttentionMetadata.build([1, 1], lens, tables, 16, slot_mapping=slots)

    fixed = BACKEND.fixed_plan(spec, batch([20, 1]), 100)
    for lens in ([20, 1], [21, 0], [100, 2]):
        inputs = [torch.randn(2, n, 16, dtype=torch.float16) for n in (2, 1, 1)]
        fixed.renew(batch(lens))
        torch.testing.assert_close(
            attn.run(fixed, *inputs, caches[0]), attn.run(attn.plan(batch(lens)), *inputs, caches[1])
        )
        assert torch.equal(caches[0].key, caches[1].key)
