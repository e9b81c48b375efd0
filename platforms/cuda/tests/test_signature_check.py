"""The signature check: its rows, and that it notices calls that the vendor does not know or would compute otherwise."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attn_dispatch.conformance import CASES, ConformanceError, Row, as_markdown

from .conftest import real

pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
pytest.importorskip("xformers.ops.fmha", reason="not run: xformers is not installed, or does not import")

from attn_dispatch.adapters import batch as batches
from attn_dispatch_cuda import flash_attention_call, flashinfer_call
from attn_dispatch_cuda.flash_attention_call import Flash2, Flash3, Flash4, VllmFlash3
from attn_dispatch_cuda.flash_versions import Installed, installed
from attn_dispatch_cuda.flashinfer import FlashInferBackend
from attn_dispatch_cuda.xformers import XformersBackend, interpreted
from attn_dispatch_cuda.xformers_call import XformersBatch
from platforms.cuda.evidence import signature_check
from platforms.cuda.evidence.signature_check import fake_machine, flash_check, flash_site, lifted, on_host, passed
from platforms.cuda.evidence.stubs import flashinfer_stub, xformers_stub

pytestmark = [
    pytest.mark.interface,
    pytest.mark.skipif(interpreted(), reason="not run: xFormers' verdicts are those of Triton's interpreter"),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of some features alone: the command itself, which CI runs beside, goes through them all."""
    for package in ("flash-attn", "flash-attn-4", "vllm"):
        real(package)
    features = ("mixed", "ALiBi", "float32", "encoder + LSE", "sinks", "empty batch", "float8_e4m3fn cache")
    monkeypatch.setattr(signature_check, "CASES", [case for case in CASES if case.feature in features])


def test_rows_are_what_was_compared_and_nothing_more(few: None, tmp_path: Path) -> None:
    assert signature_check.main(["--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "cuda-interface.json").read_text())
    rows = {row["backend"]: Row.from_dict(row) for row in data["rows"]}
    assert list(rows) == ["cuda/flash-attention", "cuda/flashinfer", "cuda/xformers"]
    for row in rows.values():
        assert not row.available
        assert row.evidence == "computed"
        assert row.machine == "NVIDIA H200 (not here)"
        states = {entry.feature: entry.state for entry in row.entries}
        assert (states["mixed"], states["sinks"], states["float32"]) == ("computed", "computed", "no")
        assert "empty batch" not in states
    titles = ("FlashAttention 2 2.8.3.post2 (", "3 (flash_attn_interface) 3.0.0.b1 (", "4 4.0.0b36 (")
    for title in (*titles, "3 of the vLLM wheel 0.33.0 ("):
        assert title in rows["cuda/flash-attention"].reason
        assert f"{title}0 cases" not in rows["cuda/flash-attention"].reason
    assert re.search(r"and [1-9]\d* cases also by BatchAttention", rows["cuda/flashinfer"].reason)
    assert "| evidence | computed | computed | computed |" in as_markdown(rows.values())


@pytest.mark.parametrize(
    ("where", "method", "failing"),
    [
        (Flash2, "arguments", "cuda/flash-attention"),
        (Flash3, "arguments", "cuda/flash-attention"),
        (Flash4, "arguments", "cuda/flash-attention"),
        (VllmFlash3, "arguments", "cuda/flash-attention"),
        (flashinfer_call, "plan_arguments", "cuda/flashinfer"),
        (XformersBatch, "arguments", "cuda/xformers"),
    ],
    ids=str,
)
def test_an_argument_that_the_vendor_does_not_know_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Any, method: str,
    failing: str,
) -> None:  # fmt: skip
    for package in ("flash-attn", "flash-attn-4", "vllm"):
        real(package)
    monkeypatch.setattr(signature_check, "CASES", [case for case in CASES if case.name == "mixed bfloat16"])
    right = getattr(where, method)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        if isinstance(result, dict):
            return result | {"invented": 1}
        first, arguments = result
        return first, arguments | {"invented": 1}

    monkeypatch.setattr(where, method, wrong)
    assert signature_check.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    # By the interpreter's own words, or by those of torch's dispatcher.
    assert "unexpected keyword argument 'invented'" in said or "fwd() expected at most 37 argument(s)" in said
    failed = {row.split()[0] for row in re.split(r"^(?=cuda/)", said, flags=re.MULTILINE) if "FAILED:" in row}
    assert failed == {failing}
    assert not list(tmp_path.iterdir())


# What a wrong adapter would do: change an argument on its way to the vendor. In float16, whose error is the smallest.

NOTICED = (ConformanceError, ValueError, IndexError, RuntimeError)
"""What makes a row FAILED, as long as it is not that the call does not bind."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("flash-attn", "flash-attn-4", "vllm"):
        real(package)
    return flash_site(tmp_path_factory.mktemp("flash"))


@pytest.fixture(params=["fa2", "fa3", "vllm-fa3", "fa4"])
def version(site: Path, request: pytest.FixtureRequest) -> Installed:
    return next(one for one in installed(fake_machine(site)) if one.kind == request.param)


def case(name: str, page: int | None) -> Any:
    return lifted(next(case for case in CASES if case.name == name), page)


def changed(arguments: dict[str, Any], change: str) -> dict[str, Any]:
    """FlashAttention's arguments, with one mistake; as they are where the mistake is in what comes back."""
    given = dict(arguments)
    lens = next((name for name in ("cache_seqlens", "seqused_k") if given.get(name) is not None), None)
    table = next(name for name in ("block_table", "page_table") if given.get(name) is not None)
    if change == "window off by one" and "window_size" in given:
        given["window_size"] = (given["window_size"][0] + 1, given["window_size"][1])
    elif change == "window off by one":
        given["window_size_left"] += 1
    elif change == "causal off":
        given["causal" if "causal" in given else "is_causal"] = False
    elif change == "lengths off by one":
        if lens is not None:
            given[lens] = given[lens] - 1
        else:
            starts = given["cu_seqlens_k"].clone()
            starts[1:] -= 1
            given["cu_seqlens_k"] = starts
    elif change == "wrong page ids":
        given[table] = (given[table] + 1) % 5
    elif change == "q and kv starts swapped" and given.get("cu_seqlens_k") is not None:
        given["cu_seqlens_q"], given["cu_seqlens_k"] = given["cu_seqlens_k"], given["cu_seqlens_q"]
    elif change == "q and kv starts swapped":
        given["cu_seqlens_q"] = given[lens].cumsum(0).int().roll(1)  # type: ignore[index]
    return given


CHANGES = ("window off by one", "causal off", "lengths off by one", "wrong page ids", "q and kv starts swapped")


@pytest.mark.parametrize("change", [None, *CHANGES, "LSE in base 2"])
def test_mistakes_in_a_call_of_flash_attention_are_noticed(
    monkeypatch: pytest.MonkeyPatch, site: Path, version: Installed, change: str | None
) -> None:
    kind: Any = type(flash_attention_call.functions_of(version))
    right, problem = kind.arguments, case("window float16" if change in CHANGES[:1] else "LSE float16", 256)
    if change in CHANGES:
        monkeypatch.setattr(
            kind,
            "arguments",
            lambda self, call: (lambda name, given: (name, changed(given, change)))(*right(self, call)),
        )
    elif change:
        attend = kind.attend

        def in_base_2(self: Any, call: Any) -> Any:
            out, lse = attend(self, call)
            return out, None if lse is None else lse / 0.6931471805599453

        monkeypatch.setattr(kind, "attend", in_base_2)
    if change is None:
        flash_check(version, problem, [site])
        return
    with pytest.raises(NOTICED):
        flash_check(version, problem, [site])


@pytest.fixture
def infer() -> Iterator[Any]:
    with flashinfer_stub() as stub:
        yield lambda problem: passed(on_host(FlashInferBackend), problem, stub)


def infer_change(monkeypatch: pytest.MonkeyPatch, change: str) -> str:
    """Make a mistake in FlashInfer's adapter; return the case that has to notice it."""
    plan_arguments = flashinfer_call.plan_arguments

    def plan(spec: Any, part: Any, start: Any, lens: Any, indptr: Any, *pages: Any) -> Any:
        if change == "wrong page ids":
            pages = ((pages[0] + 1) % 5, *pages[1:])
        elif change == "last page length off by one":
            last = pages[1]
            pages = (pages[0], (last - 1).clamp(min=1) if (last > 1).any() else last + 1)
        elif change == "q and kv starts swapped":
            start, indptr = indptr, start
        arguments, named = plan_arguments(spec, part, start, lens, indptr, *pages)
        if change == "window off by one":
            named["window_left"] += 1
        elif change == "causal off" and "causal" in named:
            named["causal"] = False
        return arguments, named

    if change == "k_scale and v_scale swapped":
        attend = flashinfer_call.InferBatch.attend

        def swapped(self: Any, call: Any) -> Any:
            layer = call.layer
            call.layer = dataclasses.replace(layer, k_scale=layer.v_scale, v_scale=layer.k_scale)
            return attend(self, call)

        monkeypatch.setattr(flashinfer_call.InferBatch, "attend", swapped)
    elif change == "LSE in base 2":
        monkeypatch.setattr(flashinfer_call, "_LN2", 1.0)
    elif change == "appended one position too far":
        extra = flashinfer_call.InferBatch.extra_arrays

        def further(self: Any, host: Any, view: Any) -> Any:
            arrays = extra(self, host, view)
            if "positions" in arrays:
                arrays["positions"] = (arrays["positions"] + 1).clip(max=int(host.lens.max()) - 1)
            return arrays

        monkeypatch.setattr(flashinfer_call.InferBatch, "extra_arrays", further)
    else:
        monkeypatch.setattr(flashinfer_call, "plan_arguments", plan)
    scaled = "float8_e4m3fn cache, scaled"
    return {"window off by one": "window float16", "k_scale and v_scale swapped": scaled}.get(change, "LSE float16")


@pytest.mark.parametrize("name", ["LSE float16", "window float16", "float8_e4m3fn cache, scaled"])
def test_flashinfers_calls_are_right(infer: Any, name: str) -> None:
    infer(case(name, None))


@pytest.mark.parametrize(
    "change",
    [
        "window off by one",
        "causal off",
        "q and kv starts swapped",
        "k_scale and v_scale swapped",
        "LSE in base 2",
        "wrong page ids",
        "last page length off by one",
        "appended one position too far",
    ],
)
def test_mistakes_in_a_call_of_flashinfer_are_noticed(monkeypatch: pytest.MonkeyPatch, infer: Any, change: str) -> None:
    problem = case(infer_change(monkeypatch, change), None)
    with pytest.raises(NOTICED):
        infer(problem)


@pytest.mark.parametrize("change", [None, "causal off", "lengths off by one", "wrong page ids", "LSE in base 2"])
def test_mistakes_in_xformers_masks_are_noticed(monkeypatch: pytest.MonkeyPatch, change: str | None) -> None:
    arguments = XformersBatch.arguments

    def wrong(self: Any, call: Any, q: Any, mask: Any) -> dict[str, Any]:
        if change == "causal off":
            mask = xformers_mask(mask, causal=False)
        elif change == "lengths off by one":
            info = dataclasses.replace(mask.k_seqinfo, seqlen=(mask.k_seqinfo.seqlen - 1).clamp(min=1))
            mask = dataclasses.replace(mask, k_seqinfo=info)
        elif change == "wrong page ids":
            mask = dataclasses.replace(mask, block_tables=(mask.block_tables + 1) % 5)
        return arguments(self, call, q, mask)

    if change == "LSE in base 2":
        attend = XformersBatch.attend

        def in_base_2(self: Any, call: Any) -> Any:
            out, lse = attend(self, call)
            return out, None if lse is None else lse / 0.6931471805599453

        monkeypatch.setattr(XformersBatch, "attend", in_base_2)
    elif change:
        monkeypatch.setattr(XformersBatch, "arguments", wrong)
    with xformers_stub() as stub:
        problem = case("LSE float16", 64)
        if change is None:
            passed(on_host(XformersBackend), problem, stub)
            return
        with pytest.raises(NOTICED):
            passed(on_host(XformersBackend), problem, stub)


def xformers_mask(mask: Any, *, causal: bool) -> Any:
    from xformers.ops.fmha import attn_bias

    name = "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask" if causal else "PagedBlockDiagonalPaddedKeysMask"
    return getattr(attn_bias, name)(mask.q_seqinfo, mask.k_seqinfo, mask.block_tables, mask.page_size)


def test_page_lists_that_end_too_early_are_noticed(monkeypatch: pytest.MonkeyPatch, infer: Any) -> None:
    """A mistake in what backends share, not in an adapter."""
    right = batches.page_lists

    def wrong(batch: Any, block_size: int) -> Any:
        lists = right(batch, block_size)
        return dataclasses.replace(lists, last_page_len=lists.last_page_len % block_size + 1)

    monkeypatch.setattr(flashinfer_call, "page_lists", wrong)
    with pytest.raises(NOTICED):
        infer(case("LSE float16", None))
