"""What verdicts rest upon, in the vendors' real sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from platforms.rocm.evidence.source_facts import FACTS, Fact

from .conftest import real

pytestmark = pytest.mark.interface


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.says)
def test_it_is_so(fact: Fact) -> None:
    assert fact.holds(real(fact.package)), f"{fact.package}: no longer so in {fact.file}: {fact.says}"


@pytest.mark.parametrize("fact", [f for f in FACTS if f.pattern in ("slopes-as-bias", "tables-unread")], ids=str)
def test_a_repaired_vendor_would_be_noticed(fact: Fact, tmp_path: Path) -> None:
    """The same file with the mistake put right."""
    source = real(fact.package) / fact.file
    text = source.read_text()
    if fact.pattern == "slopes-as-bias":
        repaired = text.replace(
            "        out,\n        alibi_slopes,\n        None,\n",
            "        out,\n        None,\n        alibi_slopes,\n",
        )
        header = tmp_path / "aiter_meta/csrc/include/rocm_ops.hpp"
        header.parent.mkdir(parents=True)
        header.write_text((real(fact.package) / "aiter_meta/csrc/include/rocm_ops.hpp").read_text())
    else:
        repaired = text.replace("cu_seqlens_q: torch.Tensor", "cu_seqlens_q: torch.Tensor", 1)
        at = repaired.index("def varlen_fwd(")
        body = repaired.index("    if DEBUG", at)
        repaired = repaired[:body] + "    pages = block_table_[0]\n" + repaired[body:]
    assert repaired != text
    file = tmp_path / fact.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(repaired)
    assert not fact.holds(tmp_path)
