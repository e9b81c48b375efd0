"""Who runs a variant, and with whose arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenes import BACKENDS, host, made, make_scene, own

import attn_dispatch as ad
from attn_dispatch.backend import Refusal, Verdict
from attn_dispatch.contract.arrays import library_of
from attn_dispatch.errors import BackendRefusedError, FallbackWarning, NoBackendError, UnknownBackendError
from attn_dispatch.reference import ReferenceBackend
from attn_dispatch.variants import BlockSparse, Cascade, Differential, LocalStride, Longformer, SplitKV


def spec_of(**fields: Any) -> ad.AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "dtype": "float32", "block_size": 32}
    return ad.AttentionSpec(**(plain | fields))


VARIANTS: dict[str, Any] = {
    "block-sparse": lambda backend: BlockSparse(spec_of(), LocalStride(1, 2), None, backend),
    "block-sparse per head": lambda backend: BlockSparse(spec_of(), LocalStride(1, 2, (1, 2)), None, backend),
    "longformer": lambda backend: Longformer(spec_of(window=(20, 0)), backend),
    "differential": lambda backend: Differential(spec_of(), np.float32([0.5, 0.7]), 0.4, backend=backend),
    "cascade": lambda backend: Cascade(spec_of(), backend),
    "split-KV": lambda backend: SplitKV(spec_of(), 1, backend),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(VARIANTS))
def test_arrays_of_any_library(backend: str, name: str) -> None:
    """NumPy's arrays give NumPy's, with the numbers that the backend's own library gives."""
    variant = made(lambda: VARIANTS[name](backend))
    scene = make_scene(variant.spec, (40, 90), (1, 5))
    batch = scene.batch()
    rows = np.concatenate(scene.q), scene.rows(scene.keys), scene.rows(scene.values)
    caches = [variant.allocate(scene.num_blocks) for _ in range(2)]
    mine = variant.run(variant.plan(batch), *(own(variant, x) for x in rows), caches[0])
    theirs = variant.run(variant.plan(batch), *rows, caches[1])
    assert library_of(mine) == variant.backend.capabilities.libraries[0]
    assert library_of(theirs) == "numpy"
    # What is merged here is merged by the library that the results are of: two ways to round an exponential.
    np.testing.assert_allclose(host(mine), host(theirs), rtol=1e-6, atol=1e-6)


class Laid(ReferenceBackend):
    """The reference over a cache in another layout."""

    def __init__(self, layout: ad.CacheLayout) -> None:
        super().__init__(f"laid/{layout.name}")
        self._layout = layout

    def layout(self, spec: ad.AttentionSpec) -> ad.CacheLayout:
        return self._layout


LAYOUTS = [
    ad.HND,
    ad.NHD,
    ad.CacheLayout("joint", (("pages", "N B K 2 D"),)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_layout_computes_or_is_refused_before_anything_is_written(name: str, layout: ad.CacheLayout) -> None:
    usual = VARIANTS[name]("reference")
    try:
        variant = VARIANTS[name](Laid(layout))
    except BackendRefusedError as error:
        assert name == "block-sparse per head"
        assert layout.name in str(error)  # noqa: PT017
        return
    assert name != "block-sparse per head" or layout is ad.HND
    scene = make_scene(variant.spec, (40, 90), (1, 5))
    rows = np.concatenate(scene.q), scene.rows(scene.keys), scene.rows(scene.values)
    results = []
    for one in (variant, usual):
        cache = one.allocate(scene.num_blocks)
        out = np.zeros_like(rows[0])
        assert one.run(one.plan(scene.batch()), *rows, cache, out) is out
        results.append(out)
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)


def test_a_named_backend_that_cannot_fold_heads_is_passed_over() -> None:
    with pytest.raises(BackendRefusedError, match="pattern=one per head: layout NHD"):
        BlockSparse(spec_of(), LocalStride(1, 2, (1, 2)), None, Laid(ad.NHD))


def test_a_backend_that_was_named_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownBackendError):
        Cascade(spec_of(), "no/such")
    packed = spec_of(kv_cache_dtype="uint8")
    with pytest.raises(BackendRefusedError, match=r"Cascade is made of these passes(.|\n)*kv_cache_dtype=uint8"):
        Cascade(packed, "reference")
    with ad.use_backend("reference"):
        assert Cascade(spec_of()).backend == "reference"
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "reference")
    assert Longformer(spec_of(window=(20, 0))).backend == "reference"


def test_nothing_falls_back_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ",".join(name for name in ad.backends() if name != "reference")
    if others:
        monkeypatch.setenv("ATTN_DISPATCH_DISABLE", others)
    with pytest.warns(FallbackWarning, match="Cascade: reference was chosen"):
        assert Cascade(spec_of()).backend == "reference"
    with pytest.raises(NoBackendError, match="no backend runs all of them"):
        Cascade(spec_of(kv_cache_dtype="uint8"))


class NoCross(ReferenceBackend):
    """The reference without cross layers, and without something else if told so."""

    also: tuple[str, Any] = ("", None)

    def verdict(self, spec: ad.AttentionSpec) -> Verdict:
        found = []
        if spec.kind == "cross":
            found.append(Refusal("kind", spec.kind, "not here"))
        if self.also[0] and getattr(spec, self.also[0]) == self.also[1]:
            found.append(Refusal(*self.also, "not here"))
        return self.refuse(*found)


def test_no_variant_needs_cross_layers() -> None:
    backend = NoCross("no cross")
    spec = spec_of()
    variant = BlockSparse(spec, LocalStride(1, 2, (1, 2)), None, backend)
    usual = BlockSparse(spec, LocalStride(1, 2, (1, 2)), None, "reference")
    scene = make_scene(spec, (40, 90), (1, 5))
    rows = np.concatenate(scene.q), scene.rows(scene.keys), scene.rows(scene.values)
    results = []
    for one in (variant, usual):
        cache = one.allocate(scene.num_blocks)
        results.append((one.run(one.plan(scene.batch()), *rows, cache), cache.key.copy()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert results[0][1].any()
    assert Longformer(spec_of(window=(20, 0)), backend).backend is backend
    neither = NoCross("neither")
    neither.also = ("causal", False)
    with pytest.raises(BackendRefusedError, match=r"causal=False"):
        Longformer(spec_of(window=(20, 0)), neither)


def test_differential_takes_the_form_that_is_accepted() -> None:
    backend = NoCross("narrow")
    backend.also = ("head_size", 64)
    assert Differential(spec_of(), 0.5, 0.4, backend=backend).form == "two"
    with pytest.raises(BackendRefusedError):
        Differential(spec_of(), 0.5, 0.4, form="one", backend=backend)
    backend.also = ("num_kv_heads", 1)
    with pytest.raises(BackendRefusedError, match=r"head_size=64(.|\n)*or"):
        Differential(spec_of(), 0.5, 0.4, backend=backend)


def test_repr_says_what_it_is() -> None:
    for make in VARIANTS.values():
        text = repr(make("reference"))
        assert "backend=reference" in text
        assert "heads=4/2" in text
