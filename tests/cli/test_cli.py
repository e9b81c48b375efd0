"""The command line in processes of its own: exit status, words, and a plug-in that crashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import install, reports, run


def test_doctor_knows_the_machine_and_the_reference() -> None:
    done = run("doctor", "--json")
    data = json.loads(done.stdout)
    assert data["machine"]["name"] in data["platforms"]
    assert reports(done)["reference"]["state"] == "ok"
    assert data["explanation"]["chosen"]


def test_doctor_fits_eighty_columns_and_names_who_would_run() -> None:
    done = run("doctor")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "would run" in done.stdout
    assert "reference" in done.stdout


def test_doctor_survives_a_plugin_that_crashes(tmp_path: Path) -> None:
    environ = install(tmp_path, "crashes", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    done = run("doctor", "--json", **environ)
    assert done.returncode == 1
    report = reports(done)["crashes/bad"]
    assert report["state"] == "broken"
    assert "SIGSEGV" in report["reason"]
    assert report["distribution"] == "crashes 2.0"
    assert "ATTN_DISPATCH_DISABLE=crashes/bad" in report["remedy"]
    assert reports(done)["reference"]["state"] == "ok"


def test_doctor_survives_a_kernel_that_aborts(tmp_path: Path) -> None:
    environ = install(
        tmp_path,
        "aborts",
        """
        import os
        from attn_dispatch.reference import ReferenceBackend

        class Backend(ReferenceBackend):
            def run(self, *args, **keywords):
                os.abort()
        """,
    )
    report = reports(run("doctor", "--json", **environ))["aborts/bad"]
    assert (report["state"], "SIGABRT" in report["reason"]) == ("broken", True)


def test_doctor_says_what_is_wrong_with_a_plugin_that_does_not_load(tmp_path: Path) -> None:
    environ = install(tmp_path, "missing", "raise ImportError('torch 2.13.0 found, 2.8.* needed')\n")
    done = run("doctor", **environ)
    assert done.returncode == 1
    assert "2.8.* needed" in " ".join(done.stdout.split())


def test_verify_fails_on_a_backend_that_is_wrong(tmp_path: Path) -> None:
    environ = install(
        tmp_path,
        "wrong",
        """
        from attn_dispatch.reference import ReferenceBackend

        class Backend(ReferenceBackend):
            def run(self, call):
                call.k, call.v = call.v, call.k
                return super().run(call)
        """,
    )
    arguments = ("verify", "--backend", "wrong/bad", "--feature", "decode", "--json")
    done = run(*arguments, **environ)
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert row["entries"][0]["state"] == "FAILED"
    assert "clause 6" in row["entries"][0]["detail"]


def test_verify_writes_its_table(tmp_path: Path) -> None:
    file = tmp_path / "support.md"
    done = run(
        "verify", "--backend", "reference", "--feature", "LSE", "--feature", "uint4 cache", "--markdown", str(file)
    )
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert "| LSE | yes |" in text
    assert "| uint4 cache | no |" in text
    assert "asymmetric integers" in text
    assert "| ALiBi | not run |" in text


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (("verify", "--backend", "refrence"), {}, "Did you mean reference?"),
        (("verify",), {"ATTN_DISPATCH_BAKEND": "x"}, "Did you mean ATTN_DISPATCH_BACKEND?"),
        (("verify", "--feature", "no such"), {}, "no such"),
        (("doctor", "--heads", "5"), {}, "num_heads=5"),
        (("nonsense",), {}, "nonsense"),
    ],
)
def test_a_wrong_request_ends_with_two_and_says_why(arguments: tuple, environ: dict, words: str) -> None:
    done = run(*arguments, **environ)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_command_that_cannot_be_loaded_breaks_no_other(tmp_path: Path) -> None:
    environ = install(tmp_path, "broken", "raise ImportError('no such vendor')\n")
    points = tmp_path / "broken-2.0.dist-info" / "entry_points.txt"
    points.write_text("[attn_dispatch.commands]\nsing = broken:sing\n")
    done = run("sing", **environ)
    assert (done.returncode, "ImportError: no such vendor" in done.stderr) == (2, True)
    assert run("verify", "--help", **environ).returncode == 0
    points.write_text("[attn_dispatch.commands]\nno equals sign\n")
    assert run("verify", "--help", **environ).returncode == 0
