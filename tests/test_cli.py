"""The command line in processes of its own: exit status, words, and a plug-in that crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ATTN_DISPATCH_")} | {"COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "attn_dispatch", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | environ,
        timeout=300,
    )


def install(folder: Path, name: str, source: str, entry: str = "Backend") -> dict[str, str]:
    (folder / f"{name}.py").write_text(dedent(source))
    info = folder / f"{name}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[attn_dispatch.backends.cpu]\n1 {name}/bad = {name}:{entry}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def reports(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    return {report["name"]: report for report in json.loads(done.stdout)["backends"]}


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
