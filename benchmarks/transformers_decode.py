"""Decode steps of a transformers model: the paged cache on each backend against transformers' own sdpa path.

    python benchmarks/transformers_decode.py [--model DIR|smollm2] [--batch 1 8 32] [--context 128] [--backend B ...]

Both paths take turns, step by step, in one process: what disturbs the machine disturbs both. Every step's tokens are
compared. The ratio is sdpa's time over ours (above 1: ours is faster), of the fastest step and of the median one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console

import attn_dispatch as ad
from attn_dispatch.integrations.transformers import NAME, PagedCache
from attn_dispatch_generate.loading import load
from attn_dispatch_generate.models import find_model


def timed(step: Callable[[], Any], times: list[float]) -> list[int]:
    """Run a step and return the tokens that it chooses."""
    began = perf_counter()
    tokens: list[int] = step().argmax(-1).tolist()
    times.append(perf_counter() - began)
    return tokens


def compare(model: Any, backend: str, batch: int, context: int, steps: int) -> str:
    """Return one line: milliseconds of a step on either path, and their ratio."""
    prompts = torch.randint(100, 1000, (batch, context), generator=torch.Generator().manual_seed(0))
    theirs, ours = transformers.DynamicCache(config=model.config), PagedCache(model, backend=backend)
    manager = ours.manager
    sequences = [manager.begin(prompt) for prompt in prompts.tolist()]
    last = torch.arange(batch)

    model.set_attn_implementation("sdpa")
    tokens = model(prompts, past_key_values=theirs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    model.set_attn_implementation(NAME)
    step = ours.next_step([(seq, context) for seq in sequences])
    model(
        prompts.view(1, -1),
        position_ids=torch.arange(context).repeat(batch)[None],
        past_key_values=ours,
        logits_to_keep=last,
    )
    manager.commit(step)

    def their_step() -> Any:
        return model(torch.tensor(tokens)[:, None], past_key_values=theirs).logits[:, -1]

    def our_step() -> Any:
        for seq, token in zip(sequences, tokens, strict=True):
            manager.append(seq, [token])
        step = ours.next_step([(seq, 1) for seq in sequences])
        at = torch.full((1, batch), context + len(our_times))
        said = model(torch.tensor([tokens]), position_ids=at, past_key_values=ours, logits_to_keep=last).logits[0]
        manager.commit(step)
        return said

    their_times: list[float] = []
    our_times: list[float] = []
    differ = 0
    for _ in range(steps):
        model.set_attn_implementation("sdpa")
        expected = timed(their_step, their_times)
        model.set_attn_implementation(NAME)
        differ += sum(a != b for a, b in zip(timed(our_step, our_times), expected, strict=True))
        tokens = expected
    best, middle = min(their_times) / min(our_times), median(their_times) / median(our_times)
    return (
        f"{backend:<16} batch {batch:>3}  sdpa {min(their_times) * 1e3:7.1f} ms  paged {min(our_times) * 1e3:7.1f} ms  "
        f"ratio {best:.2f} (median {middle:.2f})  {batch / min(our_times):7.1f} tokens/s  "
        f"{differ} of {steps * batch} tokens differ"
    )


def main() -> None:
    """Print a line for each backend and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", nargs="+", help="default: every one that is available, but the reference")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    folder = Path(find_model(given.model, Console(stderr=True)))
    model, _ = load(folder, given.dtype, "cpu")
    if given.threads:
        torch.set_num_threads(given.threads)
    backends = given.backend or [name for name, here in ad.backends().items() if here and name != "reference"]
    print(f"{folder.name}, {given.dtype}, context {given.context}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        for batch in given.batch:
            for backend in backends:
                print(compare(model, backend, batch, given.context, given.steps), flush=True)


if __name__ == "__main__":
    main()
