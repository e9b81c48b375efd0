"""The table of named cases: one list that serves the kit, `verify`'s support table and the benchmarks."""

from __future__ import annotations

from attn_dispatch.conformance.case import BASIC_CASES, Case
from attn_dispatch.conformance.hard_cases import HARD_CASES

__all__ = ["CASES", "FEATURES", "Case"]

CASES: tuple[Case, ...] = (*BASIC_CASES, *HARD_CASES)
"""Every case. Names are unique."""

FEATURES: tuple[str, ...] = tuple(dict.fromkeys(case.feature for case in CASES))
"""Rows of the support table that cases stand behind, in order."""
