"""What stands behind a vendor's signature: its semantics against the reference, its checks against wrong calls."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.conformance.interface import (
    Package,
    SignatureStub,
    as_float64,
    attend_pages,
    attend_rows,
    install_together,
    signature,
)
from attn_dispatch.contract import LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.reference import attend


@pytest.mark.parametrize("queries", [1, 5, 9])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": False},
        {"window": (3, 0)},
        {"window": (0, 0)},
        {"causal": False, "window": (3, 2)},
        {"causal": False, "window": (-1, 0)},
        {"logits_soft_cap": 1.5, "scale": 0.3},
        {"alibi": True},
        {"sinks": True},
        {"alibi": True, "sinks": True, "logits_soft_cap": 1.5, "window": (2, 0)},
    ],
    ids=str,
)
def test_the_semantics_are_the_contracts(fields: dict[str, Any], queries: int) -> None:
    """Written independently of the reference, and the same where both are defined: fewer keys than queries included."""
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, dtype="float64", **fields)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((queries, 4, 8))
    key, value = (rng.standard_normal((7, 2, 8)) for _ in range(2))
    own: dict[str, Any] = {}
    if spec.alibi:
        own["alibi_slopes"] = np.array([0.5, 0.25, 1.0, 0.125], np.float32)
    if spec.sinks:
        own["sinks"] = np.array([0.5, -1.0, 3.0, 0.0], np.float32)
    expected = attend(spec, q, key, value, LayerParameters(spec, **own))
    found = attend_rows(
        q, key, value, scale=spec.scale, causal=spec.causal, window=spec.window, soft_cap=spec.logits_soft_cap or 0.0,
        slopes=own.get("alibi_slopes"), sinks=own.get("sinks"),
    )  # fmt: skip
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_pages_are_read_in_the_order_of_the_table() -> None:
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((6, 4, 2, 8)), rng.standard_normal((6, 4, 2, 8))
    q = rng.standard_normal((3, 2, 8))
    tables, lens = [[5, 0, 3], [2]], [9, 4]
    out, lse = attend_pages(q, [0, 1, 3], pages, tables, lens, scale=0.5, causal=True)
    for rows, table, length in ((slice(0, 1), tables[0], 9), (slice(1, 3), tables[1], 4)):
        key, value = (side[table].reshape(-1, 2, 8)[:length] for side in pages)
        expected = attend_rows(q[rows], key, value, scale=0.5, causal=True)
        assert np.array_equal(out[rows], expected[0])
        assert np.array_equal(lse[rows], expected[1])
    with pytest.raises(ValueError, match="5 keys in 1 pages of 4"):
        attend_pages(q, [0, 1, 3], pages, [[5, 0, 3], [2]], [9, 5], scale=0.5)


def test_small_types_are_widened() -> None:
    array = np.array([0.5, -448.0]).astype(numpy_dtype("float8_e4m3fn"))
    assert as_float64(array).tolist() == [0.5, -448.0]


SOURCE = """
def function(a, b=1): ...
def function(a, /, b, c=None, *rest, d, e=2.0, **named): ...
class Wrapper:
    def plan(self, x, *, y=0): ...
"""


def test_signatures_are_read_from_sources(tmp_path: Path) -> None:
    file = tmp_path / "vendor.py"
    file.write_text(f"raise RuntimeError('imported')\n{SOURCE}")
    found = signature(file, "function")
    assert list(found.parameters) == ["a", "b", "c", "rest", "d", "e", "named"]
    assert found.parameters["b"].default is inspect.Parameter.empty
    assert (found.parameters["c"].default, found.parameters["e"].default) == ("None", "2.0")
    assert list(signature(file, "plan", within="Wrapper").parameters) == ["self", "x", "y"]
    for name, within in (("absent", None), ("plan", None), ("function", "Wrapper"), ("plan", "Absent")):
        with pytest.raises(LookupError, match=name):
            signature(file, name, within)


def test_a_wrong_call_is_refused(tmp_path: Path) -> None:
    def vendor(q: Any, lens: Any = None, *args: Any, scale: float = 1.0) -> None: ...

    stub, real = SignatureStub(), inspect.signature(vendor)
    assert stub.bind("vendor", real, 1, scale=2.0) == {"q": 1, "scale": 2.0}
    assert stub.calls == {"vendor": 1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'scalar'"):
        stub.bind("vendor", real, 1, scalar=2.0)
    with pytest.raises(TypeError, match="swallows"):
        stub.bind("vendor", real, 1, 2, 3)
    assert stub.calls == {"vendor": 1}
    torch = pytest.importorskip("torch", reason="not run: torch is not installed")
    q = torch.zeros(2, 3, 4)
    stub.bind("vendor", real, q, torch.zeros(3, dtype=torch.int32))
    for arrays, words in (
        ((q.transpose(1, 2),), "last dimension dense"),
        (((q, q.double()),), "float64"),
        ((q, torch.zeros(3, dtype=torch.int64)), "int64"),
        ((q, torch.zeros(4, 4, dtype=torch.int32)[:, :2]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            stub.bind("vendor", real, *arrays)


def test_packages_are_files(tmp_path: Path) -> None:
    package = Package("vendor==1.0", tmp_path / "packages")
    with pytest.raises(FileNotFoundError, match=r"vendor==1\.0 was not fetched: python fetch\.py"):
        package.needed("python fetch.py")
    for name, file in (("one", "a.py"), ("two", "b.py"), ("three", "a.py")):
        (tmp_path / name / "vendor").mkdir(parents=True)
        (tmp_path / name / "vendor" / file).write_text(name)
    site = install_together(tmp_path / "site", *(tmp_path / name for name in ("one", "two", "three")))
    assert [(site / "vendor" / file).read_text() for file in ("a.py", "b.py")] == ["three", "two"]


def test_a_package_is_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's part is done by hand here: an archive in the folder that it was told."""
    import tarfile
    import zipfile

    def download(command: list[str], **named: Any) -> None:
        where = Path(command[command.index("-d") + 1])
        requirement = command[-1]
        if requirement == "broken==1":
            raise subprocess.CalledProcessError(1, command)
        if requirement == "wheel==1":
            with zipfile.ZipFile(where / "wheel-1.whl", "w") as archive:
                archive.writestr("wheel/a.py", "a")
                archive.writestr("wheel/big.so", "b")
        else:
            inside = where / "source-1"
            inside.mkdir()
            (inside / "a.py").write_text("a")
            with tarfile.open(where / "source-1.tar.gz", "w:gz") as archive:
                archive.add(inside, "source-1")
            (inside / "a.py").unlink()
            inside.rmdir()

    monkeypatch.setattr(subprocess, "run", download)
    folder = tmp_path / "packages"
    wheel = Package("wheel==1", folder, keeps=lambda name: name.endswith(".py")).fetch()
    assert [path.name for path in sorted((wheel / "wheel").iterdir())] == ["a.py"]
    assert [path.name for path in Package("source==1", folder, ("--no-binary", ":all:")).fetch().iterdir()] == ["a.py"]
    with pytest.raises(subprocess.CalledProcessError):
        Package("broken==1", folder).fetch()
    assert sorted(path.name for path in folder.iterdir()) == ["source==1", "wheel==1"]


def test_it_imports_no_vendor() -> None:
    script = "import sys, attn_dispatch.conformance.interface; assert not {'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
