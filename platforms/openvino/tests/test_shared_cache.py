"""One cache, two backends: what `openvino/paged` has filled is read by `cpu/numba`, and the reverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch import AttentionMetadata, AttentionSpec
from attn_dispatch.conformance.tolerance import OUTPUT_FLOOR
from attn_dispatch.dispatch import registry

NAME, OTHER = "openvino/paged", "cpu/numba"
BOTH = [(NAME, OTHER), (OTHER, NAME)]

pytestmark = pytest.mark.skipif(not ad.backends().get(OTHER), reason=f"not run: {OTHER} is not installed beside")

SPECS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "float16 cache of float32": {"kv_cache_dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "window": {"window": (20, 0)},
    "sinks": {"sinks": True},
    "ALiBi": {"alibi": True},
    "Dv != D": {"value_head_size": 32},
    "9 heads over 3": {"num_heads": 9, "num_kv_heads": 3},
    "head size 72": {"head_size": 72},
}


@pytest.mark.parametrize("spec", list(SPECS))
@pytest.mark.parametrize(("fills", "reads"), BOTH, ids=[f"{a} fills" for a, _ in BOTH])
def test_each_reads_what_the_other_wrote(layer: Callable[..., Any], spec: str, fills: str, reads: str) -> None:
    rng = np.random.default_rng(1)
    heads = SPECS[spec].get("num_heads", 4)
    own = {"alibi_slopes": 0.1 * np.arange(1, heads + 1, dtype=np.float32)} if "alibi" in SPECS[spec] else {}
    own |= {"sinks": rng.standard_normal(heads).astype(np.float32)} if "sinks" in SPECS[spec] else {}
    it = layer(own, **SPECS[spec])
    for name in (fills, reads):
        if not (verdict := registry().load(name).verdict(it.spec)):
            pytest.skip(f"refused: {name}: {verdict}")
    first, second, exact = it.on(fills), it.on(reads), it.on("reference")
    cache, checked = first.allocate(9), exact.allocate(9)
    assert first.backend.layout(it.spec) == second.backend.layout(it.spec)
    tables = [[7, 2], [4], [0, 8, 5]]
    prefill = AttentionMetadata.build([33, 5, 64], [33, 5, 64], tables)
    q, k, v = it.arrays(102)
    first.run(first.plan(prefill), q, k, v, cache)
    exact.run(exact.plan(prefill), q, k, v, checked)
    stored = [x.copy() for x in cache.gather(range(9))]
    # A decode and a chunk, by the other one, on the same memory.
    step = AttentionMetadata.build([1, 7, 1], [34, 12, 65], tables)
    q, k, v = it.arrays(9)
    found = second.run(second.plan(step), q, k, v, cache)
    expected = exact.run(exact.plan(step), q, k, v, checked)
    floor = OUTPUT_FLOOR[it.spec.dtype]
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), atol=2 * floor, rtol=2 * floor)
    # What the first one had written is as it was, and the second has put its own beside it: bit for bit.
    new = step.view("decoder").side.slots
    block, offset = np.divmod(new, it.spec.block_size)
    for before, after, rows in zip(stored, cache.gather(range(9)), (k, v), strict=True):
        before[block, :, offset] = rows.astype(before.dtype)
        np.testing.assert_array_equal(after, before)
    # And the first one reads on.
    last = AttentionMetadata.build([1, 1, 1], [35, 13, 66], tables)
    q, k, v = it.arrays(3)
    found = first.run(first.plan(last), q, k, v, cache)
    expected = exact.run(exact.plan(last), q, k, v, checked)
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), atol=2 * floor, rtol=2 * floor)


# A language model of random numbers, without a framework: layers that differ, one that reads another's cache.

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE = 61, 48, 4, 2, 16


@dataclass
class Block:
    """One layer's weights and what it asks of attention."""

    spec: AttentionSpec
    weights: dict[str, np.ndarray]
    cache_of: int


class Model:
    """Full attention, a window of 12, and a layer that reads the first one's cache."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        plain = AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=SIZE, dtype="float32")
        specs = [(plain, 0), (replace(plain, window=(11, 0)), 1), (replace(plain, writes_kv=False), 0)]
        shapes = {"q": (WIDTH, HEADS * SIZE), "k": (WIDTH, KV_HEADS * SIZE), "v": (WIDTH, KV_HEADS * SIZE)}
        shapes |= {"o": (HEADS * SIZE, WIDTH)}
        self.embedding = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
        self.blocks = [
            Block(
                spec,
                {name: (0.25 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()},
                owner,
            )
            for spec, owner in specs
        ]

    def generate(self, prompts: list[list[int]], count: int, backends: list[str]) -> list[list[int]]:
        """Return `count` tokens after each prompt. Step i runs on `backends[i]`; the last ones repeat in turn."""
        tables = [[3, 0], [5, 1], [2, 4]][: len(prompts)]
        caches = [ad.attention(block.spec, backends[0]).allocate(6) for block in self.blocks[:2]]
        lens, fresh = [0] * len(prompts), [list(prompt) for prompt in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        turns = cycle(backends[1:])
        for step in range(count):
            backend = backends[0] if step == 0 else next(turns)
            new = [len(tokens) for tokens in fresh]
            lens = [n + more for n, more in zip(lens, new, strict=True)]
            batch = AttentionMetadata.build(new, lens, tables)
            x = self.embedding[np.concatenate(fresh)]
            for block in self.blocks:
                attn, w = ad.attention(block.spec, backend), block.weights
                q = (x @ w["q"]).reshape(-1, HEADS, SIZE)
                k, v = ((x @ w[name]).reshape(-1, KV_HEADS, SIZE) for name in "kv")
                read = (None, None) if not block.spec.writes_kv else (k, v)
                out = attn.run(attn.plan(batch), q, *read, caches[block.cache_of])
                x = x + out.reshape(-1, HEADS * SIZE) @ w["o"]
                x = x / np.sqrt((x**2).mean(axis=1, keepdims=True))
            logits = x[np.cumsum(new) - 1] @ self.embedding.T
            fresh = [[int(token)] for token in logits.argmax(axis=1)]
            for own, (token,) in zip(said, fresh, strict=True):
                own.append(token)
        return said


def test_prefill_and_decode_on_different_backends_in_one_model() -> None:
    model = Model()
    prompts = [[(5 * i + s) % VOCABULARY for i in range(n)] for s, n in enumerate((9, 33, 20))]
    expected = model.generate(prompts, 20, ["reference", "reference"])
    assert len({token for said in expected for token in said}) > 10  # a model that repeats itself would show nothing
    ways = [[NAME, NAME], [NAME, OTHER], [OTHER, NAME], [NAME, OTHER, NAME], [OTHER, NAME, OTHER]]
    for way in ways:
        assert model.generate(prompts, 20, way) == expected, way
    # The window matters to these tokens: without it, others come out.
    model.blocks[1].spec = replace(model.blocks[1].spec, window=(-1, -1))
    assert model.generate(prompts, 20, [NAME, OTHER]) != expected
