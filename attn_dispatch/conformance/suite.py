"""The kit as a pytest class: what a backend's whole test file inherits.

    from attn_dispatch.conformance import BackendConformance

    class TestPaged(BackendConformance):
        backend = "mine/paged"

A case whose spec the backend refuses is skipped with that verdict; there is no other list of what it can do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checks import CaseResult, check_mutations, compute, run_case
from attn_dispatch.conformance.merging import check_merging
from attn_dispatch.conformance.problem import make_problem
from attn_dispatch.conformance.rejections import BAD_BATCHES, BAD_CALLS, check_bad_batch, check_bad_call
from attn_dispatch.conformance.storage import STORAGE_CHECKS
from attn_dispatch.conformance.strategies import cases
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import CACHE_DTYPES
from attn_dispatch.dispatch import registry, use_backend, verdict_of

__all__ = ["VENDORS", "BackendConformance", "loaded_vendors"]

VENDORS = (
    "aiter", "flash_attn", "flashinfer", "intel_extension_for_pytorch", "jax", "jaxlib", "libtpu", "llvmlite", "numba",
    "openvino", "torch", "torch_tpu", "torch_xla", "tpu_inference", "transformers", "triton", "vllm", "xformers",
)  # fmt: skip
"""Packages that neither the core nor loading a plug-in may import."""

_PROBE = """
import json, sys
import attn_dispatch as ad
from attn_dispatch.dispatch import registry, verdict_of
name = sys.argv[1]
backend = registry().load(name)
verdict_of(backend, ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64))
print(json.dumps(sorted({m.partition(".")[0] for m in sys.modules})))
"""


def loaded_vendors(name: str) -> list[str]:
    """Return which vendors a new process has imported after loading, probing and asking the backend of this name."""
    # Some environments load vendors at start-up through .pth files; what was there before does not count.
    plain = subprocess.run([sys.executable, "-c", "import json, sys; print(json.dumps(sorted(sys.modules)))"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    before = {module.partition(".")[0] for module in json.loads(plain.stdout)}
    done = subprocess.run([sys.executable, "-c", _PROBE, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"loading {name} ended with status {done.returncode}:\n{done.stderr}"
    after = set(json.loads(done.stdout.splitlines()[-1]))
    return sorted((after - before) & set(VENDORS))


def _recorded(name: str, run: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    def recorded(*args: Any, **keywords: Any) -> Any:
        ran.append(name)
        return run(*args, **keywords)

    return recorded


class BackendConformance:
    """Every clause of the contract, against one backend.

    Attributes:
        backend: its name as installed, or a `Backend`.
        examples: random problems to try.
        max_tokens: cases with a longer sequence are not run (for simulators; nothing is left out by default).
    """

    backend: ClassVar[str | Backend]
    examples: ClassVar[int] = 60
    max_tokens: ClassVar[int] = 1 << 30

    @pytest.fixture(autouse=True)
    def _must_be_here(self) -> None:
        available = self.subject().probe()
        if not available:
            pytest.skip(f"not run: {available.reason}")

    @classmethod
    def subject(cls) -> Backend:
        """Return the backend under test."""
        return registry().load(cls.backend) if isinstance(cls.backend, str) else cls.backend

    def usable(self, case: Case) -> None:
        """Skip a case that is too long for a simulator."""
        if case.tokens > self.max_tokens:
            pytest.skip(f"not run: {case.tokens} tokens, this test was limited to {self.max_tokens}")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_case(self, case: Case) -> None:
        """The result is within tolerance, and the cache holds exactly what it should."""
        self.usable(case)
        result: CaseResult = run_case(self.subject(), case)
        if not result.verdict:
            pytest.skip(f"refused: {result.verdict}")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_mistake_is_noticed(self, case: Case) -> None:
        """The result does not also pass as that of a wrong window, cap, scale, order..."""
        self.usable(case)
        verdict = verdict_of(self.subject(), case.spec, case.scales != (1.0, 1.0))
        if not verdict:
            pytest.skip(f"refused: {verdict}")
        check_mutations(self.subject(), case)

    def test_random_problems(self) -> None:
        """Specs and batches that nobody wrote down."""
        limit = min(self.max_tokens, 150)

        @settings(
            max_examples=int(os.environ.get("CONFORMANCE_EXAMPLES", self.examples)),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases(max_tokens=max(limit, 41)), seed=st.integers(0, 2**16))
        def check(case: Case, seed: int) -> None:
            run_case(self.subject(), case, seed)

        check()

    def plain_spec(self, **fields: Any) -> AttentionSpec:
        """Return the first plain spec that the backend accepts, or skip with what it said."""
        backend = self.subject()
        for dtype in ("float32", "bfloat16", "float16"):
            for size in (32, 16, 64, 128):
                plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": dtype, "block_size": size}
                spec = AttentionSpec(**(plain | fields))
                if verdict_of(backend, spec):
                    return spec
        return pytest.skip(f"refused: {verdict_of(backend, spec)}")

    @pytest.mark.parametrize("name", list(STORAGE_CHECKS))
    @pytest.mark.parametrize("stored", CACHE_DTYPES)
    def test_storage(self, name: str, stored: str) -> None:
        """Copies, swaps and conversions keep every bit."""
        spec = self.plain_spec(kv_cache_dtype=stored)
        STORAGE_CHECKS[name](self.subject(), spec)

    @pytest.mark.parametrize("parts", [1, 2, 5])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_merging(self, dtype: str, parts: int) -> None:
        """Partial results are put together exactly, whoever does it."""
        spec = replace(self.plain_spec(), dtype=dtype)
        check_merging(self.subject(), spec, parts)

    @pytest.mark.parametrize("name", list(BAD_BATCHES))
    def test_bad_batch_is_refused(self, name: str) -> None:
        """A contradictory batch never reaches the backend."""
        check_bad_batch(name)

    @pytest.mark.parametrize("name", list(BAD_CALLS))
    def test_bad_call_is_refused(self, name: str) -> None:
        """Nothing has been written when a call is refused."""
        if not check_bad_call(self.subject(), name):
            pytest.skip("refused: the plain spec of these calls")

    def test_every_field_takes_part_in_verdicts(self) -> None:
        """A verdict names fields of the spec, with what would be accepted."""
        fields = set(AttentionSpec.__dataclass_fields__) | {"", "k_scale, v_scale"}
        for case in CASES:
            verdict = verdict_of(self.subject(), case.spec)
            for refusal in verdict.refusals:
                named = {part.strip() for part in refusal.field.replace("+", ",").split(",")}
                assert named <= fields or refusal.field in fields, refusal
                assert refusal.accepts, refusal

    def test_the_backend_that_was_named_is_the_one_that_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Named by argument, context or variable, it runs; no other is asked to."""
        if not isinstance(self.backend, str):
            pytest.skip("not run: this backend is not installed, and has no name to be chosen by")
        spec = self.plain_spec()
        with use_backend(self.backend):
            assert attention(spec).backend == self.backend
        monkeypatch.setenv("ATTN_DISPATCH_BACKEND", self.backend)
        attn = attention(spec)
        assert attn.backend is self.subject()
        ran: list[str] = []
        for name in registry().names():
            try:
                other = registry().load(name)
            except RuntimeError:
                continue
            monkeypatch.setattr(other, "run", _recorded(name, other.run, ran))
        run_case(self.subject(), Case("proof", "proof", spec, (5, 0), (1, 9)))
        assert set(ran) == {self.backend}

    def test_loading_it_imports_no_vendor(self) -> None:
        """Loading, probing and asking it costs no vendor import and initialises no device."""
        if not isinstance(self.backend, str):
            pytest.skip("not run: only an installed backend is loaded by name")
        assert loaded_vendors(self.backend) == []

    def test_threads_do_not_disturb_each_other(self) -> None:
        """Four threads, each with a cache of its own, get what one alone gets."""
        spec = self.plain_spec()
        backend = self.subject()
        problems = [make_problem(Case(f"thread {i}", "", spec, (40, 9), (1, 12))) for i in range(4)]
        alone = [compute(backend, problem).out for problem in problems]
        found: dict[int, list[Any]] = {i: [] for i in range(4)}

        def work(i: int) -> None:
            for _ in range(3):
                found[i].append(compute(backend, problems[i]).out)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, outs in found.items():
            assert len(outs) == 3
            assert all((out == alone[i]).all() for out in outs)
