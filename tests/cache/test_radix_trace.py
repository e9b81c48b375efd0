"""The prefix cache finds nearly everything that a cache without limits would, on the benchmark's traces."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from attn_dispatch.cache import CacheManager

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "radix.py"


@pytest.fixture(scope="module")
def radix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_radix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks_radix"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["few_shot", "multi_turn", "tree_of_thought"])
@pytest.mark.parametrize("seed", [0, 1])
def test_hit_rate_beside_an_infinite_cache(radix: ModuleType, name: str, seed: int) -> None:
    trace = getattr(radix, name)(seed)
    manager = CacheManager(8192, 16)
    radix.Engine(manager).play(trace)
    usage = manager.usage()
    assert usage.prompt_tokens == sum(len(request.prompt) for request in trace.requests)
    assert usage.evicted_blocks == 0
    assert usage.hit_rate >= 0.95 * radix.oracle_hit_rate(trace)
    assert usage.used_blocks == 0


def test_with_little_memory_it_evicts_and_goes_on(radix: ModuleType) -> None:
    trace = radix.multi_turn(0, users=8, turns=4)
    manager = CacheManager(120, 16)
    engine = radix.Engine(manager)
    engine.play(trace)
    usage = manager.usage()
    assert usage.evicted_blocks > 100
    assert 0 < usage.hit_rate < 0.95 * radix.oracle_hit_rate(trace)
    assert usage.used_blocks == 0


def test_prefixes_that_arrive_in_turn_are_found_in_a_cache_for_four_of_them(radix: ModuleType) -> None:
    rates = {}
    for max_passed in (0, 16, 96):
        manager = CacheManager(4 * 36, 16)
        radix.Engine(manager, most=3, max_passed=max_passed).play(radix.interleaved(0))
        rates[max_passed] = manager.usage().hit_rate
    assert rates[0] < 0.05
    assert rates[16] > 0.6
    assert rates[96] > 0.8


def test_the_same_seed_gives_the_same_trace(radix: ModuleType) -> None:
    assert radix.traces(3)[3].requests == radix.traces(3)[3].requests
    assert radix.few_shot(3).requests != radix.few_shot(4).requests


def test_without_prefixes_in_common_the_oracle_finds_nothing(radix: ModuleType) -> None:
    trace = radix.Trace("apart")
    for i in range(4):
        trace.add([i] * 40, [9, 9])
    assert radix.oracle_hit_rate(trace) == 0
    trace.add([3] * 40, [9])
    assert radix.oracle_hit_rate(trace) == 39 / 200
