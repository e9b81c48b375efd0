"""Backends that are wrong on purpose, each against the checks that must catch it, run as `verify` runs them."""

from __future__ import annotations

import pytest

from attn_dispatch.conformance import CHECKS, BackendConformance, perform, verify
from attn_dispatch.conformance.impostors import IMPOSTORS, Honest, Impostor
from attn_dispatch.conformance.impostors.state import refuses_everything

CHECK = {check.name: check for check in CHECKS}


class TestHonest(BackendConformance):
    """What every impostor is but for one thing passes all of the kit."""

    backend = Honest()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impostor", IMPOSTORS, ids=lambda impostor: impostor.name)
def test_an_impostor_is_caught_by_each_check_that_it_names(impostor: Impostor) -> None:
    assert impostor.caught_by
    for name in impostor.caught_by:
        row = verify(impostor.make(), checks=[CHECK[name]])
        assert row.failed, f"{name} lets it through: {row.entries}"


def test_there_are_many_and_each_has_its_name() -> None:
    assert len({impostor.name for impostor in IMPOSTORS}) == len(IMPOSTORS) >= 120


def test_verify_runs_every_check() -> None:
    ran: list[str] = []
    verify(refuses_everything(), progress=lambda check: ran.append(check.name))
    assert ran == [check.name for check in CHECKS]


def test_a_backend_that_is_here_and_runs_no_case_fails() -> None:
    row = verify(refuses_everything())
    assert row.failed
    assert "ran none of" in row.entries[0].detail


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("a window one token wider", "window of 33", "as if the window were one token wider"),
        ("query heads take key heads in turn", "heads 8/2", "as if query heads took key heads in turn"),
        ("the soft-cap dropped", "soft-cap float32", "as if there were no soft-cap"),
        ("an LSE in base 2", "LSE float32", "as if the LSE were in base 2"),
        ("k_scale ignored when reading", "int8 cache, scaled", "as if k_scale were left out"),
        ("nothing computed", "decode float32", "as if nothing had been computed"),
        ("an LSE without the sink", "sinks and LSE", "as if the LSE left out the sink"),
        ("no capabilities", "decode float32", "write `capabilities = Capabilities("),
        ("a plan that is a dict", "decode float32", "plan returned a dict: return an attn_dispatch.backend.Plan"),
        ("no LSE although it was asked for", "LSE float32", "with return_lse=True return (out, lse)"),
        ("an LSE although nobody asked", "decode float32", "return the output alone"),
    ],
)
def test_a_failure_says_what_it_looks_like(name: str, check: str, words: str) -> None:
    impostor = next(one for one in IMPOSTORS if one.name == name)
    finding = perform(CHECK[check], impostor.make())
    assert words in finding.detail


def test_a_failure_names_sequence_token_and_head() -> None:
    impostor = next(one for one in IMPOSTORS if one.name == "new tokens after the 70th are not computed")
    detail = perform(CHECK["prefill of 130"], impostor.make()).detail
    assert "sequence 1 (75 new tokens, 125 keys), token 7" in detail
    assert "head" in detail
    assert ": 0 instead of" in detail
