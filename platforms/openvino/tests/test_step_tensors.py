"""Arrays are bound where they lie: no later call may read or write what an earlier one was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.contract.arrays import as_numpy
from attn_dispatch.errors import ArrayError

torch = pytest.importorskip("torch", reason="not run: torch is not installed")

BACKEND = "openvino/paged"
SPECS = {
    # Small arrays are copied, larger ones bound, and the largest never have room in a frame.
    "small": ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, dtype="float32"),
    "bound": ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="float32"),
    "in place": ad.AttentionSpec(num_heads=32, num_kv_heads=16, head_size=256, dtype="float32"),
}


class Layer:
    """A decode step of three sequences, and what it should give."""

    def __init__(self, spec: ad.AttentionSpec) -> None:
        self.spec = spec
        batch = ad.AttentionMetadata.build([1, 1, 1], [40, 3, 64], [[4, 0], [2], [1, 3]], spec.block_size)
        sides = [ad.attention(spec, name) for name in (BACKEND, "reference")]
        context = [40, 3, 64]
        filled = ad.AttentionMetadata.build(context, context, [[4, 0], [2], [1, 3]], spec.block_size)
        rows = [self.arrays(sum(context), seed=9)[i] for i in range(3)]
        self.sides = []
        for attn in sides:
            cache = attn.allocate(5)
            attn.run(attn.plan(filled), *rows, cache)
            self.sides.append((attn, attn.plan(batch), cache))

    def arrays(self, tokens: int, seed: int) -> list[np.ndarray[Any, Any]]:
        rng = np.random.default_rng(seed)
        heads = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
        return [rng.standard_normal((tokens, h, self.spec.head_size)).astype(np.float32) for h in heads]

    def run(self, q: Any, k: Any, v: Any, out: Any = None) -> tuple[Any, np.ndarray[Any, Any]]:
        """Return what the backend gives, and what the reference does."""
        (own, plan, cache), (exact, its_plan, its_cache) = self.sides
        expected = exact.run(its_plan, *(np.array(as_numpy(x)) for x in (q, k, v)), its_cache)
        return own.run(plan, q, k, v, cache, out=out), expected


@pytest.fixture(params=SPECS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(SPECS[request.param])


def near(found: Any, expected: Any) -> bool:
    return bool(np.allclose(as_numpy(found), expected, atol=2e-5))


@pytest.mark.parametrize("library", ["torch", "numpy", "both"])
def test_every_result_stays_what_it_was(layer: Layer, library: str) -> None:
    """Results are kept while memory of dropped arrays is used again, so that bindings go stale in all ways."""
    results = []
    for seed in range(40):
        arrays: list[Any] = layer.arrays(3, seed)
        if library == "torch" or (library == "both" and seed % 3):
            arrays = [torch.from_numpy(x) for x in arrays]
        found, expected = layer.run(*arrays)
        if seed % 2:
            results.append((found, expected))
        before = [np.array(as_numpy(x)) for x in arrays]
        layer.run(*(x + 1 for x in arrays))
        assert all(np.array_equal(as_numpy(x), y) for x, y in zip(arrays, before, strict=True))
    assert all(near(found, expected) for found, expected in results)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_the_same_memory_with_other_numbers(layer: Layer, library: str) -> None:
    q, k, v = (torch.from_numpy(x) if library == "torch" else x for x in layer.arrays(3, 0))
    for _ in range(4):
        assert near(*layer.run(q, k, v))
        q += 0.5
        k *= -1
        v += 1


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_an_output_that_is_the_query(layer: Layer, library: str) -> None:
    """Refused by the core; and through memory that two torch storages share, which it does not see, it is right."""
    for seed in range(3):
        q, k, v = (torch.from_numpy(x) if library == "torch" else x for x in layer.arrays(3, seed))
        with pytest.raises(ArrayError, match="out and q overlap"):
            layer.run(q, k, v, out=q)
        if library == "torch":
            room = np.concatenate([np.zeros_like(q.numpy())[:1], q.numpy()])
            found, expected = layer.run(torch.from_numpy(room[1:]), k, v, out=torch.from_numpy(room)[1:])
            assert near(found, expected)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_an_output_of_any_strides(layer: Layer, library: str) -> None:
    heads, size = layer.spec.num_heads, layer.spec.head_size
    for seed in range(3):
        arrays: list[Any] = layer.arrays(3, seed)
        room: Any = np.zeros((3, heads, 2 * size), np.float32)
        if library == "torch":
            arrays, room = [torch.from_numpy(x) for x in arrays], torch.from_numpy(room)
        for out in (room[:, :, :size], room[:, :, ::2], room.reshape(6, heads, size)[3:]):
            found, expected = layer.run(*arrays, out=out)
            assert found is out
            assert near(found, expected)


def test_what_is_not_contiguous_is_copied(layer: Layer) -> None:
    for seed in range(3):
        wide = [torch.from_numpy(np.concatenate([x, x], axis=2)) for x in layer.arrays(3, seed)]
        assert near(*layer.run(*(x[:, :, : layer.spec.head_size] for x in wide)))


def test_an_output_on_another_device(layer: Layer) -> None:
    """Its address means nothing to this process: writing there ended it."""
    q, k, v = (torch.from_numpy(x) for x in layer.arrays(3, 0))
    heads, size = layer.spec.num_heads, layer.spec.head_size
    with pytest.raises(ArrayError, match="out on meta"):
        layer.run(q, k, v, out=torch.empty((3, heads, size), device="meta"))
    assert near(*layer.run(q, k, v))


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_negative_views_are_read_as_what_they_stand_for(layer: Layer, which: str) -> None:
    """torch keeps a sign beside the memory (`imag` of a conjugate): the memory itself holds the opposite."""
    arrays = dict(zip("qkv", map(torch.from_numpy, layer.arrays(3, 0)), strict=True))
    negative = torch._neg_view(arrays[which])
    (own, plan, cache), (exact, its_plan, its_cache) = layer.sides
    resolved = arrays | {which: -arrays[which]}
    expected = exact.run(its_plan, *(x.numpy() for x in resolved.values()), its_cache)
    try:
        found = own.run(plan, *(arrays | {which: negative}).values(), cache)
    except ArrayError as error:
        assert which in str(error)  # noqa: PT017  # refusing is as good as computing
        return
    assert near(found, expected)
