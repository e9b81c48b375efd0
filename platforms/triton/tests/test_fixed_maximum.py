"""FlashDecoding++ in split decode: right at any level, because tiles that are too far from it are computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.conformance.cases import CASES, Case
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.findings import ConformanceError
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import EnvironmentVariableError
from attn_dispatch_triton import fixed_maximum as level_of
from attn_dispatch_triton import kernels, paged_call
from attn_dispatch_triton.paged import PagedBackend, interpreted

CASE = {case.name: case for case in CASES}
NEVER = (-1e30, 1e30)
"""Bounds that nothing is outside of: no tile is computed again."""

DTYPES = ("float32", "float16", "bfloat16")
NAMES = [f"{feature} {dtype}" for dtype in DTYPES for feature in ("decode", "mixed", "LSE")]
NAMES += [f"{feature} float16" for feature in ("window", "soft-cap", "ALiBi", "sinks")]
NAMES += ["everything", "sinks and LSE", "window of 1", "window of 1, long decode", "window of 33, long decode"]
NAMES += ["float8_e4m3fn cache bfloat16", "float8_e5m2 cache, scaled", "int8 cache, scaled", "int8 cache float32"]
NAMES += ["cross, an empty encoder", "padding sequence", "speculative verify", "block boundaries", "shared cache"]
NAMES += ["one long sequence", "one long sequence bfloat16", "float16 cache of float32", "Dv != D float16"]
FAR = [f"mixed {dtype}" for dtype in DTYPES] + ["everything", "int8 cache, scaled", "speculative verify"]


@pytest.fixture
def backend() -> PagedBackend:
    found = registry().load("triton/paged")
    assert isinstance(found, PagedBackend)
    if not (available := found.probe()):
        pytest.skip(f"not run: {available.reason}")
    return found


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of every decode are split, so that `decode` computes it."""
    monkeypatch.setattr(paged_call, "num_splits", lambda *_: 3)


class Launches(list[Mapping[str, Any]]):
    """The compile-time arguments of every launch of `decode`."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What `decode` is launched with."""
    seen, decode = Launches(), kernels.decode

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            def run(*arguments: Any, **options: Any) -> Any:
                seen.append(options)
                return decode[grid](*arguments, **options)

            return run

    monkeypatch.setattr(kernels, "decode", Watched())
    return seen


@pytest.mark.parametrize(
    ("level", "name"), [("0", name) for name in NAMES] + [(far, name) for far in ("200", "-200") for name in FAR]
)
def test_the_kit_passes(
    name: str, level: str, backend: PagedBackend, splits: None, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(level_of.VARIABLE, level)
    assert run_case(backend, CASE[name]).verdict
    assert launches, "no launch of decode: this case shows nothing"
    assert {found["LEVEL"] for found in launches} == {round(float(level) * np.log2(np.e), 4)}


@pytest.mark.parametrize("level", ["200", "-200"])
@pytest.mark.parametrize("name", [f"decode {dtype}" for dtype in DTYPES] + ["int8 cache, scaled", "everything"])
def test_without_computing_again_a_far_level_fails(
    name: str, level: str, backend: PagedBackend, splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(level_of.VARIABLE, level)
    for dtype in level_of.WEIGHTS:
        monkeypatch.setitem(level_of.WEIGHTS, dtype, NEVER)
    with pytest.raises(ConformanceError):
        run_case(backend, CASE[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_the_level_nothing_is_computed_again(
    dtype: str, backend: PagedBackend, splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixed form itself is right: it passes where the fallback is off. Its own result is what is judged."""
    monkeypatch.setenv(level_of.VARIABLE, "0")
    monkeypatch.setitem(level_of.WEIGHTS, dtype, NEVER)
    for feature in ("decode", "LSE", "sinks"):
        assert run_case(backend, CASE[f"{feature} {dtype}"]).verdict


def steep(dtype: str) -> Case:
    """Scores of about -60 to 60 in one tile; each head and sequence has others.

    In bfloat16 no sequence of a few keys: relative to a fixed level a weight is not 1 and is rounded, by a unit of the
    last place of the output, which is more than clause 11 allows where nothing else rounds. One reason why the option
    is off.
    """
    spec = replace(CASE[f"LSE {dtype}"].spec, scale=2.0, num_heads=8, num_kv_heads=2)
    context = (300, 90, 150, 40) if dtype == "bfloat16" else (300, 3, 150, 0)
    return Case(f"steep {dtype}", "steep", spec, context, (1, 1, 2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_are_too_far(
    dtype: str, backend: PagedBackend, splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(level_of.VARIABLE, "0")
    assert run_case(backend, steep(dtype), mutations=False).verdict
    # They do need it: with nothing computed again the same problem is wrong where weights have few exponents.
    if dtype == "float16":
        monkeypatch.setitem(level_of.WEIGHTS, dtype, NEVER)
        with pytest.raises(ConformanceError):
            run_case(backend, steep(dtype), mutations=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_on_both_sides_of_the_bounds(
    dtype: str, backend: PagedBackend, splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences whose scores are 0, 40, 400 and -400 in one launch: each tile decides for itself."""
    monkeypatch.setenv(level_of.VARIABLE, "0")
    size, context = 16, 95
    spec = ad.AttentionSpec(num_heads=2, num_kv_heads=1, head_size=size, dtype=dtype, scale=1.0, returns_lse=True)
    attn, pages = ad.attention(spec, backend), -(-(context + 1) // spec.block_size)
    targets = [0.0, 40.0, 400.0, -400.0]
    device, kind = "cpu" if interpreted() else "cuda", getattr(torch, dtype)
    cache = attn.allocate(len(targets) * pages)
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(len(targets))]
    generator = torch.Generator().manual_seed(1)
    rows = len(targets) * (context + 1)
    keys = torch.randn(rows, 1, size, generator=generator) * 0.25
    keys[:, :, 0] = torch.repeat_interleave(torch.tensor(targets), context + 1)[:, None] / 16
    keys = keys.to(kind)
    values = torch.randn(rows, 1, size, generator=generator).to(kind)
    q = torch.randn(len(targets), 2, size, generator=generator)
    q[:, :, 0] = 16
    q = q.to(kind)
    of = keys.view(len(targets), context + 1, 1, size), values.view(len(targets), context + 1, 1, size)
    before = [x[:, :context].reshape(-1, 1, size).to(device) for x in of]
    count = len(targets)
    fill = ad.AttentionMetadata.build([context] * count, [context] * count, tables, spec.block_size)
    zeros = torch.zeros(count * context, 2, size, dtype=kind, device=device)
    attn.run(attn.plan(fill), zeros, *before, cache)
    step = ad.AttentionMetadata.build([1] * count, [context + 1] * count, tables, spec.block_size)
    new = [x[:, context].contiguous().to(device) for x in of]
    out, lse = attn.run(attn.plan(step), q.to(device), *new, cache, return_lse=True)
    scores = torch.einsum("shd,snd->shn", q.double(), of[0][:, :, 0].double())
    assert scores[2].min() > 300
    assert scores[3].max() < -300
    expected = scores.softmax(2) @ of[1][:, :, 0].double()
    near = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=near, atol=near)
    torch.testing.assert_close(lse.cpu().double(), scores.logsumexp(2), rtol=1e-4, atol=1e-2)


def test_by_default_the_maximum_runs(backend: PagedBackend, splits: None, launches: Launches) -> None:
    assert run_case(backend, CASE["decode float32"]).verdict
    assert launches
    assert all(found["LEVEL"] is None for found in launches)


@pytest.mark.parametrize("value", ["high", "nan", "inf", "-2e6", "1,5"])
def test_a_value_that_makes_no_sense(value: str, backend: PagedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(level_of.VARIABLE, value)
    with pytest.raises(EnvironmentVariableError, match="is not a number from -1e\\+06 to 1e\\+06") as error:
        run_case(backend, CASE["decode float32"])
    assert repr(value) in str(error.value)
    assert level_of.VARIABLE in str(error.value)


@pytest.mark.parametrize(("text", "level"), [("", None), ("0", 0.0), ("-7.5", -7.5), ("1e-40", 1e-40)])
def test_what_is_accepted(text: str, level: float | None) -> None:
    assert level_of.fixed_maximum({level_of.VARIABLE: text}) == level
    spec = CASE["decode float16"].spec
    constants = level_of.level_constants(spec, True, level)
    assert constants["LEVEL"] == (None if level is None else pytest.approx(level / np.log(2), abs=1e-4))


def test_the_variable_is_declared() -> None:
    """What is not declared is refused when a layer is made."""
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'{level_of.VARIABLE} = "attn_dispatch_triton.fixed_maximum:VARIABLE"' in declared
