"""Costs that are counted, not timed: nothing here depends on how busy the machine is."""

from __future__ import annotations

import numpy as np
import pytest

import attn_dispatch as ad


def test_a_caches_size_is_checked_without_looking_at_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ad.AttentionSpec(num_heads=2, head_size=8, dtype="float32")
    attn = ad.attention(spec, "reference")
    plan = attn.plan(ad.AttentionMetadata.build([1], [40], [[2, 0]]))
    monkeypatch.setattr(ad.contract.Side, "check_fits", lambda *_: pytest.fail("O(1) says that the block is there"))
    q, k = np.zeros((1, 2, 8), np.float32), np.zeros((1, 2, 8), np.float32)
    attn.run(plan, q, k, k, attn.allocate(3))


def test_a_batch_is_seen_once_per_kind() -> None:
    batch = ad.AttentionMetadata.build([1], [40], [[2, 0]])
    assert batch.view("decoder") is batch.view("decoder")
