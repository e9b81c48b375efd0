"""What a check may end with: nothing (it passed), `ConformanceError`, `Refused`, `NotRun`."""

from __future__ import annotations

from attn_dispatch.backend import Verdict

__all__ = ["ConformanceError", "NotRun", "Refused"]


class ConformanceError(AssertionError):
    """A backend accepted something and did not do what the contract says."""


class Refused(Exception):
    """The backend refuses what the check is about, by verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class NotRun(Exception):
    """The check cannot be made here: why."""
