"""torch tensors: on the CPU by DLPack; on a TPU by routes of which only the interface can be checked here."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

import attn_dispatch as ad
from attn_dispatch.conformance.cases import CASES
from attn_dispatch.conformance.problem import make_problem
from attn_dispatch.contract.arrays import as_library, as_numpy
from attn_dispatch_tpu import simulator

torch = pytest.importorskip("torch", reason="not run: torch is not installed")

from attn_dispatch_tpu import torch_routes  # noqa: E402

NAMES = ("mixed bfloat16", "padding sequence of 3 without LSE", "tokens with slot -1", "heads 9/3")


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
    with pytest.raises(ad.errors.ArrayError, match="torch:meta"):
        attn.run(attn.plan(problem.batch), *rows, attn.allocate(problem.num_blocks))


@pytest.mark.parametrize(("device", "package"), [("torch:tpu", "torch_tpu"), ("torch:xla", "torch_xla")])
def test_a_device_whose_package_is_missing_says_which(device: str, package: str) -> None:
    attn = ad.attention(case("prefill float32").spec, "tpu/pallas")
    with pytest.raises((ad.errors.MissingPackageError, RuntimeError), match=f"{package}|{device.partition(':')[2]}"):
        attn.allocate(4, device=device)
    with pytest.raises(ad.errors.CacheError, match="torch:xla"):
        attn.allocate(4, device="torch:cuda")


@pytest.mark.parametrize("name", [*NAMES, "int8 cache bfloat16", "window bfloat16"])
def test_the_route_of_torch_xla_around_the_kernel(name: str) -> None:
    """What torch does around its operator, with JAX's kernel of the same signature in the operator's place."""
    found = case(name)
    problem = make_problem(found)
    attn = ad.attention(found.spec, "tpu/pallas", **problem.parameters)
    cache = attn.allocate(problem.num_blocks)
    if problem.context is not None:
        batch, k, v = problem.context
        attn.run(attn.plan(batch), np.zeros((len(k), found.spec.num_heads, found.spec.head_size), k.dtype), k, v, cache)
    plan: Any = attn.plan(problem.batch)
    shape = cache.arrays["pages"].shape
    pages = torch.zeros(shape, dtype=getattr(torch, found.spec.kv_cache_dtype))
    pages.view(torch.uint8).copy_(torch.from_numpy(np.array(cache.arrays["pages"]).view(np.uint8)))
    expected = attn.run(plan, problem.q, problem.k, problem.v, cache)

    def kernel(q: Any, pages: Any, *integers: Any, **settings: Any) -> Any:
        with simulator.running():
            operands = [as_library(as_numpy(x), "jax") for x in (q, pages)] + [x.numpy() for x in integers]
            return as_library(ragged_paged_attention(*operands, **settings), "torch")

    size = plan.options.batch.tokens
    rows = [as_library(x, "torch") for x in (problem.q, problem.k, problem.v)]
    rows = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, size - len(x))) for x in rows]
    layer = attn.parameters
    numbers = np.array([layer.k_scale, layer.v_scale], np.float32)
    integers = torch.from_numpy(np.array(plan.batch))
    out, after = torch_routes.run_xla(pages, *rows, integers, numbers, plan.options, layer.scaled, kernel)
    assert np.array_equal(as_numpy(after).view(np.uint8), np.asarray(cache.arrays["pages"]).view(np.uint8))
    near = np.abs(as_numpy(out)[: len(expected)].astype(np.float32) - expected.astype(np.float32)).max()
    assert near <= (1e-6 if found.spec.dtype == "float32" else 1e-2)


def source(package: str, path: str) -> ast.Module:
    """Return a module of an installed package, parsed: importing it would start what is not here."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"not run: {package} is not installed (pip install --no-deps {package} is enough)")
    found = next(file for file in files if str(file) == path)
    return ast.parse(Path(str(found.locate())).read_text())


def parameters(tree: ast.Module, name: str) -> list[list[str]]:
    """Return the parameters' names of every function of this name."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    assert functions, name
    return [[a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)] for f in functions]


PASSED = (
    "sm_scale", "sliding_window", "soft_cap", "k_scale", "v_scale", "num_kv_pages_per_block", "num_queries_per_block",
)  # fmt: skip


def test_the_operator_of_torch_xla_takes_what_is_passed() -> None:
    """Interface: against the released package's own source."""
    tree = source("torch_xla", "torch_xla/experimental/custom_kernel.py")
    for names in parameters(tree, "ragged_paged_attention_xla"):
        assert names[:6] == ["q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs"]
        assert set(PASSED) <= set(names)


def test_the_operator_maker_of_torch_tpu_takes_what_is_passed() -> None:
    """Interface: against the released package's own source."""
    tree = source("torch_tpu", "torch_tpu/_internal/pallas/pallas.py")
    for names in parameters(tree, "jax_op"):
        assert names[:2] == ["name", "fn"]
        assert "donate_argnums" in names


def test_the_kernel_of_jax_takes_what_is_passed() -> None:
    import inspect

    assert set(PASSED) <= set(inspect.signature(ragged_paged_attention).parameters)
    assert jax.__version__
