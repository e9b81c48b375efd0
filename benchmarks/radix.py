"""The prefix cache on traces whose prompts share prefixes: hit rate against an infinite cache, cost against the step.

    python benchmarks/radix.py                                  # hit rates, and the manager's own time
    python benchmarks/radix.py --backend cpu/numba --layers 30  # beside steps that really attend
    python benchmarks/radix.py --backend cpu/numba --layers 30 --linear 576/1536/49152  # ... and multiply by weights

Workloads, seeded: few-shot prompts (one preamble, many questions), conversations (each turn brings all that was
said before), trees of thought (branches that go on from a common line of thought), prefixes that arrive in turn. A
scheduler with a token budget runs them, as an engine would; `--max-passed 0` admits in order of arrival:

    python benchmarks/radix.py --trace interleaved --blocks 160 --most 3 [--max-passed 0]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attn_dispatch.cache import CacheManager, OutOfBlocks, ScheduledStep, Sequence, WaitingQueue


@dataclass
class Request:
    """A prompt, the tokens that the model will answer with, and the request whose answer it waits for."""

    prompt: list[int]
    answer: list[int]
    after: int | None = None


@dataclass
class Trace:
    """Requests in order of arrival."""

    name: str
    requests: list[Request] = field(default_factory=list)

    def add(self, prompt: list[int], answer: list[int], after: int | None = None) -> int:
        """Append a request; return its number."""
        self.requests.append(Request(prompt, answer, after))
        return len(self.requests) - 1


def words(rng: np.random.Generator, low: int, high: int) -> list[int]:
    """Return between `low` and `high` random token ids."""
    return rng.integers(0, 32000, rng.integers(low, high + 1)).tolist()  # type: ignore[no-any-return]


def few_shot(seed: int, requests: int = 96) -> Trace:
    """Four tasks with an instruction and examples each; every request is one more question to one of them."""
    rng = np.random.default_rng([seed, 1])
    system = words(rng, 40, 60)
    tasks = [system + words(rng, 400, 900) for _ in range(4)]
    trace = Trace("few-shot")
    for _ in range(requests):
        trace.add(tasks[rng.integers(4)] + words(rng, 20, 80), words(rng, 8, 40))
    return trace


def multi_turn(seed: int, users: int = 16, turns: int = 6) -> Trace:
    """Conversations side by side: each turn's prompt is everything before it, and a new message."""
    rng = np.random.default_rng([seed, 2])
    system = words(rng, 150, 250)
    history = [(list(system), -1) for _ in range(users)]
    trace = Trace("multi-turn")
    for _ in range(turns):
        for user in rng.permutation(users).tolist():
            said, last = history[user]
            prompt, answer = said + words(rng, 20, 120), words(rng, 30, 120)
            number = trace.add(prompt, answer, None if last < 0 else last)
            history[user] = (prompt + answer, number)
    return trace


def tree_of_thought(seed: int, problems: int = 6, width: int = 3, depth: int = 3) -> Trace:
    """Problems with a common instruction; each thought is continued in several ways."""
    rng = np.random.default_rng([seed, 3])
    system = words(rng, 200, 300)
    trace = Trace("tree of thought")
    for _ in range(problems):
        level: list[tuple[list[int], int | None]] = [(system + words(rng, 60, 160), None)]
        for _ in range(depth):
            following: list[tuple[list[int], int | None]] = []
            for thought, parent in level:
                for _ in range(width):
                    answer = words(rng, 30, 90)
                    number = trace.add(thought, answer, parent)
                    following.append((thought + answer, number))
            level = following
    return trace


def interleaved(seed: int, prefixes: int = 8, rounds: int = 12) -> Trace:
    """Prompts of 512 common tokens and a few of their own, the prefixes in turn: the worst order for a small cache."""
    rng = np.random.default_rng([seed, 5])
    common = [words(rng, 512, 512) for _ in range(prefixes)]
    trace = Trace("interleaved")
    for _ in range(rounds):
        for prefix in common:
            trace.add(prefix + words(rng, 8, 24), words(rng, 4, 12))
    return trace


def traces(seed: int) -> list[Trace]:
    """Return the workloads, and the first three of them mixed together."""
    parts = [few_shot(seed), multi_turn(seed), tree_of_thought(seed)]
    return [*parts, mixed(seed, parts), interleaved(seed)]


def mixed(seed: int, parts: list[Trace]) -> Trace:
    """Return several traces shuffled into one, each in its own order."""
    rng = np.random.default_rng([seed, 4])
    order = rng.permutation(np.repeat(np.arange(len(parts)), [len(p.requests) for p in parts]))
    trace = Trace("mixed")
    numbers: list[list[int]] = [[] for _ in parts]
    for part in order.tolist():
        request = parts[part].requests[len(numbers[part])]
        after = None if request.after is None else numbers[part][request.after]
        numbers[part].append(trace.add(request.prompt, request.answer, after))
    return trace


def oracle_hit_rate(trace: Trace) -> float:
    """Return the share of prompt tokens that an infinite cache of single tokens has, one request after the other."""
    tree: dict[int, Any] = {}
    hits = asked = 0
    for request in trace.requests:
        node, depth = tree, 0
        while depth < len(request.prompt) - 1 and request.prompt[depth] in node:
            node, depth = node[request.prompt[depth]], depth + 1
        hits += depth
        asked += len(request.prompt)
        node = tree
        for token in request.prompt + request.answer[:-1]:
            node = node.setdefault(token, {})
    return hits / asked


@dataclass
class Clock:
    """Where the time went, in seconds."""

    manager: float = 0.0
    batch: float = 0.0
    attention: float = 0.0
    linear: float = 0.0
    steps: int = 0


class Engine:
    """A scheduler: decodes go first, prefills share what is left of a step's budget; the most cached is admitted first.

    Args:
        manager: of the cache.
        budget: tokens of a step.
        most: requests that run at once.
        attend: called with each step and its batch.
        multiply: called with each step.
        max_passed: see `WaitingQueue`.
    """

    def __init__(
        self,
        manager: CacheManager,
        budget: int = 512,
        most: int = 16,
        attend: Any = None,
        multiply: Any = None,
        max_passed: int = 16,
    ) -> None:
        self.manager, self.budget, self.most, self.attend, self.multiply = manager, budget, most, attend, multiply
        self.max_passed = max_passed
        self.clock = Clock()
        self.preempted = 0

    def play(self, trace: Trace) -> None:
        """Run every request to its end."""
        coming = list(range(len(trace.requests)))
        numbers: dict[Sequence, int] = {}
        waiting = WaitingQueue(self.manager, max_passed=self.max_passed)
        running: dict[int, Sequence] = {}
        done: set[int] = set()
        while coming or waiting or running:
            begin = time.perf_counter()
            for number in [n for n in coming[:64] if (after := trace.requests[n].after) is None or after in done]:
                coming.remove(number)
                seq = self.manager.begin(trace.requests[number].prompt)
                numbers[seq] = number
                waiting.append(seq)
            while waiting and len(running) < self.most:
                seq = waiting.first()
                waiting.remove(seq)
                running[numbers[seq]] = seq
            step = self._step(running)
            ready = time.perf_counter()
            self.clock.manager += ready - begin
            metadata = step.metadata
            self.clock.batch += time.perf_counter() - ready
            if self.attend is not None:
                begin = time.perf_counter()
                self.attend(step, metadata)
                self.clock.attention += time.perf_counter() - begin
            if self.multiply is not None:
                begin = time.perf_counter()
                self.multiply(step)
                self.clock.linear += time.perf_counter() - begin
            begin = time.perf_counter()
            self.manager.commit(step)
            for number, seq in list(running.items()):
                request = trace.requests[number]
                if not seq.remaining:
                    answered = seq.length - len(request.prompt)
                    if answered == len(request.answer) - 1:
                        self.manager.free(seq)
                        del running[number]
                        done.add(number)
                    else:
                        self.manager.append(seq, request.answer[answered : answered + 1])
            self.clock.manager += time.perf_counter() - begin
            self.clock.steps += 1

    def _step(self, running: dict[int, Sequence]) -> ScheduledStep:
        ready = sorted(running.values(), key=lambda one: (one.remaining > 1, one.id))
        while True:
            left, wanted = self.budget, []
            for seq in ready:
                # One prefill at a time: what it computes, the next one may find.
                count = min(left, seq.remaining - (self.manager.cached_tokens(seq) - seq.computed))
                if count > 0:
                    wanted.append((seq, count))
                    left -= count
            step = self.manager.step(wanted)
            if not isinstance(step, OutOfBlocks):
                return step
            # The youngest one gives way; what it has computed stays cached as long as there is room.
            youngest = max(ready, key=lambda one: one.id)
            ready.remove(youngest)
            self.preempted += bool(youngest.num_blocks)
            self.manager.preempt(youngest)


def multiplying(layers: int, heads: tuple[int, int, int], sizes: tuple[int, int, int]) -> Any:
    """Return what a model's weights do in a step, float32: no norm, no rotation, no activation, no sampling."""
    (h, k, d), (hidden, inner, vocabulary) = heads, sizes
    shapes = [(hidden, (h + 2 * k) * d), (h * d, hidden), (hidden, 2 * inner), (inner, hidden)]
    rng = np.random.default_rng(0)
    weights = [[rng.standard_normal(shape, np.float32) for shape in shapes] for _ in range(layers)]
    head = rng.standard_normal((hidden, vocabulary), np.float32)
    rows = [rng.standard_normal((4096, shape[0]), np.float32) for shape in shapes]

    def run(step: ScheduledStep) -> None:
        n = step.num_tokens
        for layer in weights:
            for x, weight in zip(rows, layer, strict=True):
                x[:n] @ weight
        rows[0][: len(step.sequences)] @ head

    return run


def attending(backend: str, layers: int, heads: tuple[int, int, int], manager: CacheManager) -> Any:
    """Return what a model's attention layers do in a step (and nothing else of the model)."""
    import attn_dispatch as ad
    from attn_dispatch.contract.arrays import as_library

    h, k, d = heads
    spec = ad.AttentionSpec(num_heads=h, num_kv_heads=k, head_size=d, dtype="float32", block_size=manager.block_size)
    attn = ad.attention(spec, backend)
    caches = [attn.allocate(manager.num_blocks) for _ in range(layers)]
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((4096, n, d), np.float32) for n in (h, k, k)]
    q, key, value = (as_library(x, attn.backend.capabilities.libraries[0]) for x in rows)

    def run(step: ScheduledStep, metadata: Any) -> None:
        n = step.num_tokens
        plan = attn.plan(metadata)
        for cache in caches:
            cache.copy_blocks(step.copy_from, step.copy_to)
            attn.run(plan, q[:n], key[:n], value[:n], cache)

    return run


def main() -> None:
    """Play the traces and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--blocks", type=int, default=8192, help="of the cache; fewer than a trace needs means eviction"
    )
    parser.add_argument("--backend", default="", help="attend in every step, with this backend")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", default="9/3/64", help="query heads / key-value heads / head size")
    parser.add_argument("--linear", default="", help="hidden / inner / vocabulary: multiply by such weights as well")
    parser.add_argument("--trace", help="only this one")
    parser.add_argument("--most", type=int, default=16, help="requests that run at once")
    parser.add_argument("--max-passed", type=int, default=16, help="how often a request is overtaken (0: never)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    h, k, d = map(int, arguments.heads.split("/"))
    multiply = None
    if arguments.linear:
        hidden, inner, vocabulary = map(int, arguments.linear.split("/"))
        multiply = multiplying(arguments.layers, (h, k, d), (hidden, inner, vocabulary))
    for trace in traces(arguments.seed):
        if arguments.trace not in (None, trace.name):
            continue
        manager = CacheManager(arguments.blocks, arguments.block_size)
        attend = attending(arguments.backend, arguments.layers, (h, k, d), manager) if arguments.backend else None
        engine = Engine(manager, attend=attend, multiply=multiply, most=arguments.most, max_passed=arguments.max_passed)
        engine.play(trace)
        usage, clock, oracle = manager.usage(), engine.clock, oracle_hit_rate(trace)
        row = {
            "trace": trace.name,
            "requests": len(trace.requests),
            "steps": clock.steps,
            "hit_rate": usage.hit_rate,
            "oracle": oracle,
            "of_oracle": usage.hit_rate / oracle,
            "evicted": usage.evicted_blocks,
            "preempted": engine.preempted,
            "manager_us_per_step": 1e6 * clock.manager / clock.steps,
            "batch_us_per_step": 1e6 * clock.batch / clock.steps,
            "attention_us_per_step": 1e6 * clock.attention / clock.steps,
            "linear_us_per_step": 1e6 * clock.linear / clock.steps,
        }
        rows.append(row)
        if not arguments.json:
            share = f", {clock.manager / clock.attention:.2%} of attention alone" if clock.attention else ""
            if clock.attention and clock.linear:
                share += f", {clock.manager / (clock.attention + clock.linear):.2%} with the weights' part"
            print(
                f"{trace.name:16} {row['requests']:4} requests, {clock.steps:5} steps: hit rate {usage.hit_rate:.1%}, "
                f"oracle {oracle:.1%} ({row['of_oracle']:.1%} of it), {usage.evicted_blocks} evicted, "
                f"{engine.preempted} preempted; manager {row['manager_us_per_step']:.0f} us a step, batch "
                f"{row['batch_us_per_step']:.0f} us{share}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
