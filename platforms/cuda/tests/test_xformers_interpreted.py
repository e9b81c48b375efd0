"""xFormers' own kernel, through the backend, in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest THIS_FILE.

The kit's cases with pages that the kernel takes (64 tokens) and the type that the interpreter multiplies rightly
(float16). Whatever the backend says yes to is checked against the contract. It shows numbers, not a GPU.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any

import pytest

from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checks import check_mutations, run_case
from attn_dispatch.dispatch import registry, verdict_of
from attn_dispatch_cuda.xformers import interpreted

if not interpreted():
    pytest.skip("not run: set TRITON_INTERPRET=1", allow_module_level=True)


def lifted(case: Case) -> Case:
    """A case with the block size and the type that are run here."""
    spec = case.spec
    stored = "float16" if spec.kv_cache_dtype == spec.dtype else spec.kv_cache_dtype
    return replace(case, spec=replace(spec, block_size=64, dtype="float16", kv_cache_dtype=stored))


BACKEND: Any = registry().load("cuda/xformers")
ACCEPTED = [case for case in map(lifted, CASES) if verdict_of(BACKEND, case.spec, case.scales != (1.0, 1.0))]
UNIQUE = {(c.spec, c.context, c.new, c.encoder, c.padding, c.skipped_slots): c for c in ACCEPTED}.values()
# A program for each page takes the interpreter a tenth of a second: one case of each feature, the shorter ones
# (ALL_INTERPRETED=1: the longer ones too, in three minutes).
LIMIT = 1000 if os.environ.get("ALL_INTERPRETED") else 190
SHORT = {c.feature: c for c in UNIQUE if sum(c.context) + sum(c.new) <= LIMIT and c.spec.num_kv_heads <= 4}
SHORT |= {c.feature: c for c in UNIQUE if c.name == "sinks and LSE"}


def test_it_is_here() -> None:
    available = BACKEND.probe()
    assert available, available.reason
    assert available.evidence == "simulated on CPU"


@pytest.mark.parametrize("case", SHORT.values(), ids=lambda case: case.name)
def test_case(case: Case) -> None:
    assert run_case(BACKEND, case).verdict


@pytest.mark.parametrize("feature", [feature for feature in SHORT if feature in ("cross", "padding", "sinks + LSE")])
def test_mistake_is_noticed(feature: str) -> None:
    check_mutations(BACKEND, SHORT[feature])


def test_threads_wait_for_the_interpreter() -> None:
    """It keeps the program that it is in in a global."""
    case = next(c for c in SHORT.values() if c.feature == "cross")
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            run_case(BACKEND, case)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
