"""The interface cell: its rows, and that it notices a call that the vendor does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from attn_dispatch.conformance import CASES, Row, as_markdown
from attn_dispatch_cuda import interface_cell

from .conftest import real

pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
pytest.importorskip("xformers.ops.fmha", reason="not run: xformers is not installed, or does not import")

from attn_dispatch_cuda import flashinfer_step
from attn_dispatch_cuda.flash_calls import Flash2, Flash3, Flash4
from attn_dispatch_cuda.xformers import interpreted
from attn_dispatch_cuda.xformers_step import XformersStep

pytestmark = [
    pytest.mark.interface,
    pytest.mark.skipif(interpreted(), reason="not run: xFormers' verdicts are those of Triton's interpreter"),
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of some features alone: the command itself, which CI runs beside, goes through them all."""
    for package in ("flash-attn", "flash-attn-4"):
        real(package)
    features = ("mixed", "decode", "ALiBi", "float32", "encoder + LSE", "sinks", "empty batch", "float8_e4m3fn cache")
    monkeypatch.setattr(interface_cell, "CASES", [case for case in CASES if case.feature in features])


def test_rows_are_what_was_compared_and_nothing_more(tmp_path: Path) -> None:
    assert interface_cell.main(["--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "cuda-interface.json").read_text())
    rows = {row["backend"]: Row.from_dict(row) for row in data["rows"]}
    assert list(rows) == ["cuda/flash-attention", "cuda/flashinfer", "cuda/xformers"]
    for row in rows.values():
        assert not row.available
        assert row.evidence == "interface"
        assert row.machine == "NVIDIA H200 (not here)"
        states = {entry.feature: entry.state for entry in row.entries}
        assert (states["mixed"], states["sinks"], states["float32"]) == ("interface", "interface", "no")
        assert "empty batch" not in states
    for title in ("FlashAttention 2 2.8.3.post2 (", "3 (flash_attn_interface) 3.0.0.b1 (", "4 4.0.0b36 ("):
        assert title in rows["cuda/flash-attention"].reason
        assert f"{title}0 cases" not in rows["cuda/flash-attention"].reason
    assert re.search(r"and [1-9]\d* cases also by BatchAttention", rows["cuda/flashinfer"].reason)
    assert "| evidence | interface | interface | interface |" in as_markdown(rows.values())


@pytest.mark.parametrize(
    ("where", "method", "failing"),
    [
        (Flash2, "arguments", "cuda/flash-attention"),
        (Flash3, "arguments", "cuda/flash-attention"),
        (Flash4, "arguments", "cuda/flash-attention"),
        (flashinfer_step, "decode_arguments", "cuda/flashinfer"),
        (flashinfer_step, "ragged_arguments", "cuda/flashinfer"),
        (flashinfer_step, "mixed_arguments", "cuda/flashinfer"),
        (XformersStep, "arguments", "cuda/xformers"),
    ],
    ids=str,
)
def test_an_argument_that_the_vendor_does_not_know_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Any, method: str,
    failing: str,
) -> None:  # fmt: skip
    right = getattr(where, method)

    def wrong(*given: Any, **named: Any) -> Any:
        found = right(*given, **named)
        if isinstance(found, dict):
            return found | {"invented": 1}
        first, arguments = found
        return first, arguments | {"invented": 1}

    monkeypatch.setattr(where, method, wrong)
    assert interface_cell.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "unexpected keyword argument 'invented'" in said
    failed = {row.split()[0] for row in re.split(r"^(?=cuda/)", said, flags=re.MULTILINE) if "FAILED:" in row}
    assert failed == {failing}
    assert not list(tmp_path.iterdir())
