"""The reference is the oracle of everything else, so it is held against arithmetic that is written out here."""

from __future__ import annotations

from attn_dispatch.conformance import BackendConformance


class TestReference(BackendConformance):
    backend = "reference"
