"""All layers' caches as one thing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.cache import CacheManager, OutOfBlocks, ScheduledStep, Swap
from attn_dispatch.errors import CacheError

B = 4


def layers() -> list[ad.Attention]:
    sizes = [(2, 8), (1, 16), (2, 8)]
    return [
        ad.attention(
            ad.AttentionSpec(num_heads=2, num_kv_heads=k, head_size=d, dtype="float32", block_size=B), "reference"
        )
        for k, d in sizes
    ]


def contents(caches: ad.Caches, blocks: list[int]) -> list[bytes]:
    return [np.asarray(array).tobytes() for cache in caches for array in cache.gather(blocks)]


def fill(caches: ad.Caches) -> None:
    rng = np.random.default_rng(0)
    for cache in caches:
        for array in cache.arrays.values():
            array[...] = rng.standard_normal(array.shape)


def test_copies_and_swaps_of_a_manager() -> None:
    model = layers()
    caches, host = ad.Caches(model, 8), ad.Caches(model, 4)
    fill(caches)
    manager = CacheManager(8, B, host_blocks=4, prefix_caching=False)
    seq = manager.begin(range(6))
    step = manager.step([seq])
    assert isinstance(step, ScheduledStep)
    manager.commit(step)
    (fork,) = manager.fork(seq)
    manager.append(fork, [9])
    before = contents(caches, [int(seq.blocks[-1])])
    step = manager.step([fork])
    assert isinstance(step, ScheduledStep)
    assert step.copy_from
    caches.apply(step)
    manager.commit(step)
    assert contents(caches, [int(fork.blocks[-1])]) == before
    expected = contents(caches, fork.blocks.tolist())
    swap = manager.swap_out([fork])
    assert isinstance(swap, Swap)
    caches.swap_out(host, swap)
    for cache in caches:
        cache.copy_blocks([0], [5])  # something else is computed meanwhile
    swap = manager.swap_in([fork])
    assert isinstance(swap, Swap)
    caches.swap_in(host, swap)
    assert contents(caches, fork.blocks.tolist()) == expected


def test_as_many_blocks_as_fit() -> None:
    model = layers()
    block = 2 * B * 4 * (16 + 16 + 16)  # keys and values, tokens, bytes, heads times head size of each layer
    caches = ad.Caches.within(model, 10 * block + 5)
    assert (caches.num_blocks, caches.block_bytes, len(caches)) == (10, block, 3)
    with pytest.raises(CacheError, match=f"needs {block} bytes, {block - 1} were given"):
        ad.Caches.within(model, block - 1)


def test_layers_that_share_a_cache() -> None:
    caches = ad.Caches(layers(), 4, shared={2: 0})
    assert caches[2] is caches[0]
    assert caches.block_bytes == 2 * B * 4 * 32
    for wrong in ({0: 0}, {1: 2}, {1: 0, 2: 1}):
        with pytest.raises(CacheError, match="cannot share the cache"):
            ad.Caches(layers(), 4, shared=wrong)


def test_where_a_steps_tokens_are() -> None:
    manager = CacheManager(8, B)
    first, second = manager.begin(range(6)), manager.begin([7, 8, 9])
    step = manager.step([(first, 4), second])
    assert isinstance(step, ScheduledStep)
    assert step.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert step.last_rows.tolist() == [6]  # the first one goes on in the next step
    assert step.completes.tolist() == [False, True]
    manager.commit(step)
    manager.append(second, [5])
    step = manager.step([second, first])
    assert isinstance(step, ScheduledStep)
    assert step.positions.tolist() == [3, 4, 5]
    assert step.last_rows.tolist() == [0, 2]


def test_a_request_that_is_not_admitted_has_no_blocks() -> None:
    manager = CacheManager(4, 2)
    first = manager.begin([1, 1, 2, 2, 3])
    step = manager.step([first])
    assert step  # narrows: OutOfBlocks is false
    manager.commit(step)
    second = manager.begin([1, 1, 2, 2, 4])
    before = manager.usage()
    assert not manager.try_admit(second, 8)  # two more blocks beside the two that it shares: one is free
    assert (second.num_blocks, second.computed, manager.usage()) == (0, 0, before)
    assert not manager.try_admit(second, 5, reserved=1)
    assert manager.try_admit(second, 5)
    assert (second.num_blocks, second.computed) == (2, 4)
    assert isinstance(manager.step([manager.begin([9] * 5)]), OutOfBlocks)


def test_the_example_of_an_engine() -> None:
    """Runs as printed; two of the three prompts find the first one's 32 tokens."""
    script = Path(__file__).parents[2] / "examples" / "engine.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True, text=True, check=False, env={**os.environ, "ATTN_DISPATCH_BACKEND": "reference"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hit_tokens=64" in done.stdout
