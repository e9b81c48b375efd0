"""The signature check notices what it is there for: calls that do not bind or mean something else, and too much LDS."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.adapters.torch.layer_pass import DeviceCall
from attn_dispatch.conformance import CASES, Case, Row, as_markdown
from attn_dispatch.conformance.checks import ConformanceError, run_case
from attn_dispatch_rocm.aiter_call import FUNCTIONS
from attn_dispatch_rocm.aiter_kernels import BATCH, DECODE, UNIFIED
from attn_dispatch_rocm.flash_attention_call import KVCACHE, VARLEN
from attn_dispatch_rocm.vendor_function import VendorFunction
from platforms.rocm.evidence import aiter_triton, signature_check
from platforms.rocm.evidence.signature_check import adapt_case
from platforms.rocm.evidence.stubs import HostAiter, HostFlashAttention, fake_machine, stubbed

from .conftest import COMPILED, real

pytestmark = pytest.mark.interface


def test_rows_are_what_was_compared_and_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real("amd-aiter"), real("flash-attn")
    features = ("window", "float32", "uint8 cache", "soft-cap", "decode")
    few = {case.feature: case for case in reversed(CASES) if case.feature in features}
    monkeypatch.setattr(signature_check, "CASES", list(few.values()))
    assert signature_check.main(["--no-compile", "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "rocm-interface.json").read_text())
    rows = [Row.from_dict(row) for row in data["rows"]]
    assert [row.backend for row in rows] == ["rocm/aiter", "rocm/flash-attention"]
    for row in rows:
        assert not row.available
        assert row.evidence == "computed"
        assert {entry.state for entry in row.entries} <= {"computed", "computed, partly", "no"}
        assert "not here" in row.machine
    states = {entry.feature: entry.state for entry in rows[0].entries}
    assert (states["window"], states["float32"], states["uint8 cache"]) == ("computed", "no", "no")
    page = as_markdown(rows)
    assert "| evidence | computed | computed |" in page
    assert "amd-aiter 0.1.7.post2.dev18" in page
    assert "takes a soft-cap and does not apply it" in page


def edited(monkeypatch: pytest.MonkeyPatch, function: VendorFunction, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the arguments that a function is given."""
    right = function.arguments

    def wrong(call: DeviceCall) -> dict[str, Any]:
        arguments = right(call)
        return arguments | (edit(arguments) or {})

    monkeypatch.setattr(type(function), "arguments", lambda self, call: wrong(call))


def renamed(arguments: dict[str, Any]) -> None:
    arguments["block_tables"] = arguments.pop("block_table")


def test_a_call_that_does_not_bind_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real("amd-aiter"), real("flash-attn")
    few = [case for case in CASES if case.feature == "mixed"]
    monkeypatch.setattr(signature_check, "CASES", few)
    assert signature_check.main(["--no-compile"]) == 0
    edited(monkeypatch, FUNCTIONS[UNIFIED], renamed)
    assert signature_check.main(["--no-compile"]) == 1
    assert "TypeError: missing a required argument: 'block_table'" in capsys.readouterr().out


def case_of(feature: str, **fields: Any) -> Case:
    case = next(adapt_case(case, 64) for case in CASES if case.feature == feature)
    return replace(case, spec=replace(case.spec, **fields))


def host() -> HostAiter:
    return HostAiter("x/aiter", fake_machine("gfx942", real("amd-aiter")))


def test_a_strided_array_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with stubbed(real("amd-aiter")):
        run_case(host(), case_of("mixed"))
        edited(monkeypatch, FUNCTIONS[UNIFIED], lambda a: {"block_table": a["block_table"].t().contiguous().t()})
        with pytest.raises(ValueError, match="block_table has strides"):
            run_case(host(), case_of("mixed"))


LSE = {"returns_lse": True}
_SMALL = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="bfloat16", block_size=16)
DECODES = {
    "window": Case("decode window", "window", replace(_SMALL, window=(9, 0)), (40, 5), (1, 1)),
    "decode": Case("decode", "decode", _SMALL, (40, 5), (1, 1)),
}
MISTAKES: dict[str, tuple[str, str, dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "the window is one shorter": (UNIFIED, "window", {}, lambda a: {"window_size": (a["window_size"][0] - 1, 0)}),
    "the window is one longer": (UNIFIED, "window", {}, lambda a: {"window_size": (a["window_size"][0] + 1, 0)}),
    "scales are swapped": (
        UNIFIED,
        "float8_e4m3fn cache, scaled",
        {},
        lambda a: {"k_descale": a["v_descale"], "v_descale": a["k_descale"]},
    ),
    "lengths are one short": (UNIFIED, "mixed", {}, lambda a: {"seqused_k": (a["seqused_k"] - 1).clamp(min=1)}),
    "other pages": (UNIFIED, "mixed", {}, lambda a: {"block_table": a["block_table"].roll(1, 0)}),
    "no soft-cap": (UNIFIED, "soft-cap", {}, lambda a: {"softcap": 0.0}),
    "no slopes": (UNIFIED, "ALiBi", {}, lambda a: {"alibi_slopes": None}),
    "no sinks": (UNIFIED, "sinks", {}, lambda a: {"sinks": None}),
    "a decode's window is one shorter": (
        DECODE,
        "window",
        {},
        lambda a: {"sliding_window": a["sliding_window"] - 1},
    ),
    "a decode's workspace is too small": (
        DECODE,
        "decode",
        {},
        lambda a: {"workspace_buffer": a["workspace_buffer"][:-1]},
    ),
    "a prefill is not causal": (BATCH, "mixed", LSE, lambda a: {"causal": False}),
    "starts of queries and keys are swapped": (
        BATCH,
        "mixed",
        LSE,
        lambda a: {"cu_seqlens_q": a["kv_indptr"], "kv_indptr": a["cu_seqlens_q"]},
    ),
    "slots are one further": (BATCH, "mixed", LSE, lambda a: {"kv_page_indices": a["kv_page_indices"] + 1}),
    "another scale": (BATCH, "mixed", LSE, lambda a: {"softmax_scale": a["softmax_scale"] * 1.1}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_what_a_function_is_given_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, feature, fields, edit = MISTAKES[name]
    case = DECODES[feature] if kernel == DECODE else case_of(feature, **fields)
    with stubbed(real("amd-aiter")) as stub:
        assert run_case(host(), case).verdict
        assert kernel in stub.calls
        edited(monkeypatch, FUNCTIONS[kernel], edit)
        with pytest.raises((ConformanceError, ValueError)):
            run_case(host(), case)


FLASH_MISTAKES: dict[str, tuple[VendorFunction, dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "the window is one longer": (VARLEN, {"window": (9, 0)}, lambda a: {"window_size": (10, 0)}),
    "not causal": (VARLEN, {}, lambda a: {"causal": False}),
    "starts are swapped": (
        VARLEN,
        {},
        lambda a: {"cu_seqlens_q": a["cu_seqlens_k"], "cu_seqlens_k": a["cu_seqlens_q"]},
    ),
    "other pages": (VARLEN, {}, lambda a: {"block_table": a["block_table"].roll(1, 0)}),
    "a decode's window is one longer": (KVCACHE, {"window": (9, 0)}, lambda a: {"window_size": (10, 0)}),
    "a decode's lengths are one short": (KVCACHE, {}, lambda a: {"cache_seqlens": a["cache_seqlens"] - 1}),
    "a decode's pages": (KVCACHE, {}, lambda a: {"block_table": a["block_table"].roll(1, 0)}),
    "a decode's slopes": (KVCACHE, {"alibi": True}, lambda a: {"alibi_slopes": None}),
}


@pytest.mark.parametrize("name", FLASH_MISTAKES)
def test_a_mistake_in_what_flash_attn_is_given_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, fields, edit = FLASH_MISTAKES[name]
    new = (1, 1) if function is KVCACHE else (20, 5)
    case = Case("flash", "flash", replace(_SMALL, block_size=128, **fields), (140, 35), new)
    backend = HostFlashAttention("x/flash", fake_machine("gfx942", real("flash-attn"), COMPILED))
    with stubbed(real("flash-attn")) as stub:
        assert run_case(backend, case).verdict
        assert function.name in stub.calls
        edited(monkeypatch, function, edit)
        with pytest.raises((ConformanceError, ValueError)):
            run_case(backend, case)


def test_an_lse_in_base_2_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FUNCTIONS[BATCH].result

    def base_2(self: Any, *given: Any) -> Any:
        out, lse = right(*given)
        return out, lse / np.log(2)

    with stubbed(real("amd-aiter")):
        monkeypatch.setattr(type(FUNCTIONS[BATCH]), "result", base_2)
        with pytest.raises(ConformanceError, match="LSE"):
            run_case(host(), case_of("mixed", **LSE))


def test_stubs_leave_nothing_behind() -> None:
    with stubbed(real("amd-aiter"), real("flash-attn")):
        assert all("function" in function.__dict__ for function in (*FUNCTIONS.values(), VARLEN, KVCACHE))
    assert not any("function" in function.__dict__ for function in (*FUNCTIONS.values(), VARLEN, KVCACHE))


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="not run: Triton interprets, and compiles nothing"
)
def test_a_kernel_that_needs_more_lds_than_there_is_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pages of 128, which the verdict refuses because of this; and the report of one that fits."""
    pytest.importorskip("triton", reason="not run: needs triton")
    folder, target = real("amd-aiter"), aiter_triton.TARGETS["gfx942"]
    monkeypatch.setattr(signature_check, "_PROGRAMS", ((64, 16, 4, 1, 400), (128, 128, 4, 1, 400)))
    small, large = signature_check.resources(target, folder)
    assert small["lds_bytes"] <= target.lds_bytes < large["lds_bytes"]
    assert 0 < small["vgprs"] <= 256
    assert small["spills"] == 0
    assert small["code_bytes"] > 1000
    monkeypatch.setattr(signature_check, "rows", lambda compile_too: iter(()))
    monkeypatch.setattr(aiter_triton, "TARGETS", {"gfx942": target})
    assert signature_check.main([]) == 1
    assert "B of LDS, there are 65536" in capsys.readouterr().out
    monkeypatch.setattr(aiter_triton, "TARGETS", {"gfx942": replace(target, lds_bytes=160 << 10)})
    assert signature_check.main([]) == 0


def test_loading_the_kernel_leaves_nothing_behind() -> None:
    import sys

    pytest.importorskip("triton", reason="not run: needs triton")
    with aiter_triton.load(real("amd-aiter"), aiter_triton.TARGETS["gfx950"]) as module:
        assert "sinks" in inspect.signature(module.unified_attention).parameters
        assert "aiter" in sys.modules
    assert not [name for name in sys.modules if name.partition(".")[0] == "aiter"]
