"""Chosen cases of the kit with DMAs, semaphores and memory simulated: nothing is read that was never written.

All of the kit that way takes a quarter of an hour: CONFORMANCE_TPU_SIMULATE=all.
"""

from __future__ import annotations

import os

import pytest

from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.dispatch import registry, verdict_of
from attn_dispatch_tpu import kernels

from .dma_simulator import simulating

CHOSEN = (
    "mixed float32",
    "mixed bfloat16",
    "window bfloat16",
    "heads 9/3",
    "head size 80",
    "block size 17",
    "shared cache",
    "float8_e4m3fn cache, scaled",
    "int8 cache bfloat16",
    "padding sequence of 3 without LSE",
    "tokens with slot -1",
    "a sequence without new tokens",
)


def chosen() -> list[Case]:
    backend = registry().load("tpu/pallas")
    everything = os.environ.get("CONFORMANCE_TPU_SIMULATE") == "all"
    accepted = [case for case in CASES if verdict_of(backend, case.spec, case.scales != (1.0, 1.0))]
    return [case for case in accepted if everything or case.name in CHOSEN]


def test_every_chosen_case_is_one_that_is_accepted() -> None:
    assert set(CHOSEN) <= {case.name for case in chosen()}


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_case_in_the_simulator(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_tpu_inference", lambda: False)  # whose kernels are in test_fused.py
    with simulating(uninitialized_memory="nan"):
        result = run_case(registry().load("tpu/pallas"), case)
    assert result.verdict
