"""An engine in thirty lines: continuous batching, copy-on-write and a prefix cache, over a "model" of attention alone.

python examples/engine.py
"""

from __future__ import annotations

import numpy as np

import attn_dispatch as ad
from attn_dispatch.cache import ScheduledStep

BLOCKS, BLOCK_SIZE = 256, 16

spec = ad.AttentionSpec(num_heads=8, num_kv_heads=2, head_size=64, dtype="float32", block_size=BLOCK_SIZE)
layers = [ad.attention(spec) for _ in range(4)]
caches, manager = ad.Caches(layers, BLOCKS), ad.CacheManager(BLOCKS, BLOCK_SIZE)
embedding = np.random.default_rng(0).standard_normal((97, 8, 64), np.float32)


def model(step: ScheduledStep) -> np.ndarray:
    """Return [sequences, vocabulary]: logits after the last token of each sequence that the step completes."""
    x, plan = embedding[step.tokens], layers[0].plan(step.metadata)
    for layer, cache in zip(layers, caches, strict=True):
        x = x + layer.run(plan, x, x[:, :2].copy(), x[:, 2:4].copy(), cache)
    return x[step.last_rows].reshape(-1, 512) @ embedding.reshape(97, 512).T


prompt = list(range(1, 40))
waiting = [manager.begin([*prompt, question]) for question in (50, 60, 70)]
running = waiting[:1]
answers: dict[int, list[int]] = {}
while running:
    step = manager.step(running)
    assert step, str(step)  # OutOfBlocks: an engine would preempt one of its sequences
    caches.apply(step)
    logits = model(step)
    manager.commit(step)
    for seq, token in zip(running, logits.argmax(-1).tolist(), strict=True):
        manager.append(seq, [token])
        answers.setdefault(seq.id, []).append(token)
    running = [seq for seq in waiting if len(answers.get(seq.id, ())) < 5]  # the others join after the first step
for seq in waiting:
    manager.free(seq)  # its full blocks are found again by prompts that begin alike
print(answers)
print(manager.usage())
