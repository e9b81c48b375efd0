"""The interface cell notices what it is there for: a call that does not bind, and a kernel that needs too much LDS."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attn_dispatch.conformance import CASES, Row, as_markdown
from attn_dispatch_rocm.aiter import AiterBackend
from attn_dispatch_rocm.aiter_calls import Unified
from platforms.rocm.evidence import aiter_triton, signature_check

from .conftest import real

pytestmark = pytest.mark.interface


def test_rows_are_what_was_compared_and_nothing_more(tmp_path: Path) -> None:
    real("amd-aiter"), real("flash-attn")
    assert signature_check.main(["--no-compile", "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "rocm-interface.json").read_text())
    rows = [Row.from_dict(row) for row in data["rows"]]
    assert [row.backend for row in rows] == ["rocm/aiter", "rocm/flash-attention"]
    for row in rows:
        assert not row.available
        assert row.evidence == "interface"
        assert {entry.state for entry in row.entries} <= {"interface", "interface, partly", "no"}
        assert "not here" in row.machine
    states = {entry.feature: entry.state for entry in rows[0].entries}
    assert (states["window"], states["float32"], states["uint8 cache"]) == ("interface", "no", "no")
    page = as_markdown(rows)
    assert "| evidence | interface | interface |" in page
    assert "amd-aiter 0.1.7.post2.dev18" in page
    assert "takes a soft-cap and does not apply it" in page


def test_a_call_that_does_not_bind_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real("amd-aiter"), real("flash-attn")
    right = Unified.arguments

    def renamed(self: Any, *arrays: Any, **named: Any) -> Any:
        found = dict(right(self, *arrays, **named))
        found["block_tables"] = found.pop("block_table")
        return found

    monkeypatch.setattr(Unified, "arguments", renamed)
    assert signature_check.main(["--no-compile"]) == 1
    assert "TypeError: missing a required argument: 'block_table'" in capsys.readouterr().out


def test_a_strided_array_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real("amd-aiter")
    backend = AiterBackend("x/aiter", signature_check.pretended("gfx942", folder))
    case = next(signature_check.fitted(case, 64) for case in CASES if case.feature == "mixed")
    signature_check.checked(backend, case, folder)
    right = Unified.arguments

    def strided(self: Any, *arrays: Any, **named: Any) -> Any:
        found = dict(right(self, *arrays, **named))
        return found | {"block_table": found["block_table"].t().contiguous().t()}

    monkeypatch.setattr(Unified, "arguments", strided)
    with pytest.raises(AssertionError, match="block_table"):
        signature_check.checked(backend, case, folder)


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
    monkeypatch.setattr(signature_check, "rows", lambda compile_too, say: iter(()))
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
