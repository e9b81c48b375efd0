"""torch tensors, which are exchanged by DLPack on the CPU and refused elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.conformance.cases import CASES
from attn_dispatch.conformance.problem import make_problem
from attn_dispatch.contract.arrays import as_library, as_numpy

torch = pytest.importorskip("torch", reason="not run: torch is not installed")


def case(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def problem_in_torch(name: str) -> Any:
    problem = make_problem(case(name))
    return problem, [as_library(x, "torch") for x in (problem.q, problem.k, problem.v)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_on_the_cpu_give_tensors(dtype: str) -> None:
    problem, rows = problem_in_torch(f"prefill {dtype}")
    attn = ad.attention(problem.spec, "tpu/pallas")
    plan = attn.plan(problem.batch)
    expected = attn.run(plan, problem.q, problem.k, problem.v, attn.allocate(problem.num_blocks))
    found = attn.run(plan, *rows, attn.allocate(problem.num_blocks))
    assert isinstance(found, torch.Tensor)
    assert np.array_equal(as_numpy(found), expected)
    out = torch.zeros_like(found)
    assert attn.run(plan, *rows, attn.allocate(problem.num_blocks), out=out) is out
    assert torch.equal(out, found)


def test_tensors_on_a_device_of_their_own_are_not_moved_in_silence() -> None:
    problem, rows = problem_in_torch("prefill float32")
    attn = ad.attention(problem.spec, "tpu/pallas")
    rows = [row.to("meta") for row in rows]
    with pytest.raises(ad.errors.ArrayError, match="torch tensor on meta"):
        attn.run(attn.plan(problem.batch), *rows, attn.allocate(problem.num_blocks))
