"""The report of `attn-dispatch generate`: as data, and as a summary for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import attn_dispatch as ad
from attn_dispatch_generate.run import Run

if TYPE_CHECKING:
    from attn_dispatch.integrations.transformers import PagedCache

__all__ = ["as_json", "summary"]


def as_json(run: Run, cache: PagedCache, prompts: list[str], texts: list[str], load_s: float) -> dict[str, Any]:
    """Return the whole run as plain values.

    Args:
        run: what the engine did.
        cache: on what.
        prompts: as given.
        texts: the answers.
        load_s: seconds that loading took.
    """
    block_size = cache.manager.block_size
    slots = run.blocks_peak * block_size
    layers = [
        {
            "backend": layer.backend.name,
            "source": layer.explanation.source,
            "layers": count,
            "spec": str(layer.spec),
        }
        for layer, count in cache.attentions
    ]
    return {
        "backend": ", ".join(dict.fromkeys(layer.backend.name for layer, _ in cache.attentions)),
        "source": layers[0]["source"] if layers else "",
        "layers": layers,
        "prompts": prompts,
        "texts": texts,
        "prompt_token_ids": [list(c.prompt) for c in run.completions],
        "token_ids": [c.tokens for c in run.completions],
        "finish_reasons": [c.finish_reason for c in run.completions],
        "timings": {
            "load_s": load_s,
            "warmup_s": run.warmup_s,
            "prefill_s": run.prefill_s,
            "prefill_tokens": run.prefill_tokens,
            "prefill_steps": run.prefill_steps,
            "prefill_tokens_per_s": run.prefill_tokens / run.prefill_s if run.prefill_s else None,
            "decode_s": run.decode_s,
            "decode_tokens": run.decode_tokens,
            "decode_steps": run.decode_steps,
            "decode_tokens_per_s": run.decode_tokens / run.decode_s if run.decode_s else None,
        },
        "kv_cache": {
            "block_size": block_size,
            "blocks": run.blocks_peak,
            "blocks_allocated": cache.pool.num_blocks,
            "block_bytes": cache.block_bytes,
            "tokens": run.tokens_at_peak,
            "waste": run.waste,
            "waste_at_peak": 1 - run.tokens_at_peak / slots if slots else 0.0,
            "padded_tokens": run.padded_tokens,
        },
        "prefix_cache": {
            "sharing": cache.manager.prefix_caching,
            "prompt_tokens": run.prompt_tokens,
            "hit_tokens": run.hit_tokens,
            "hit_rate": run.hit_rate,
            "blocks_shared": run.blocks_shared,
            "blocks_unshared": run.blocks_unshared,
            "blocks_cached": len(cache.pool.evictable),
            "blocks_evicted": run.evicted_blocks,
        },
    }


def summary(facts: dict[str, Any], cache: PagedCache, stats: bool) -> RenderableType:
    """Return the summary that ends a run.

    Args:
        facts: from `as_json`.
        cache: for the verdicts.
        stats: say more.
    """
    times, kv, prefixes = facts["timings"], facts["kv_cache"], facts["prefix_cache"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    layers: Counter[str] = Counter()
    for layer in facts["layers"]:
        layers[layer["backend"]] += layer["layers"]
    for backend, count in layers.items():
        table.add_row("backend", Text(f"{backend}, by {facts['source']} ({count} layers)"))
    table.add_row("prefill", _speed(times["prefill_tokens"], times["prefill_s"], times["prefill_tokens_per_s"]))
    table.add_row("decode", _speed(times["decode_tokens"], times["decode_s"], times["decode_tokens_per_s"]))
    table.add_row(
        "KV cache",
        f"{kv['blocks']} blocks of {kv['block_size']} tokens, {_size(kv['blocks'] * kv['block_bytes'])}, "
        f"{kv['waste']:.1%} of it unused",
    )
    if prefixes["hit_tokens"]:
        table.add_row("prefixes", f"{prefixes['hit_tokens']} prompt tokens found in the cache, not computed again")
    if not stats:
        return table
    finished = [facts["finish_reasons"].count(reason) for reason in ("stop", "length")]
    table.add_row("model", Text(f"{facts['model']}, {facts['dtype']} on {facts['device']}"))
    table.add_row("sequences", f"{len(facts['prompts'])}: {finished[0]} ended, {finished[1]} reached the limit")
    table.add_row("start", f"{times['load_s']:.2f} s to load, {times['warmup_s']:.2f} s to warm up")
    table.add_row("steps", f"{times['prefill_steps']} of prompts, {times['decode_steps']} of new tokens")
    tokens = sum(map(len, facts["prompt_token_ids"])) + sum(map(len, facts["token_ids"]))
    table.add_row("padding", f"none: {tokens} tokens; a rectangle would hold {kv['padded_tokens']}")
    table.add_row("blocks", f"{kv['blocks_allocated']} allocated, {_size(kv['blocks_allocated'] * kv['block_bytes'])}")
    table.add_row(
        "hit rate",
        f"{prefixes['hit_rate']:.1%}: {prefixes['hit_tokens']} of {prefixes['prompt_tokens']} prompt tokens"
        if prefixes["sharing"]
        else "no prefix is shared (--no-prefix-sharing)",
    )
    table.add_row(
        "shared",
        f"{prefixes['blocks_shared']} blocks at once; each sequence with its own, {prefixes['blocks_unshared']} would "
        f"be in use instead of {kv['blocks']}",
    )
    table.add_row(
        "waste", f"{kv['waste']:.2%} of the slots in use held no token, {kv['waste_at_peak']:.2%} when most were in use"
    )
    table.add_row(
        "at the end", f"{prefixes['blocks_cached']} blocks of prefixes kept, {prefixes['blocks_evicted']} evicted"
    )
    for layer in facts["layers"]:
        table.add_row("layers", Text(f"{layer['layers']} x {layer['spec']}: {layer['backend']}"))
    verdicts = [Text(str(ad.explain(layer.spec, cache.backend))) for layer, _ in cache.attentions]
    return Group(table, "", *verdicts)


def _speed(tokens: int, seconds: float, rate: float | None) -> str:
    return f"{tokens} tokens in {seconds:.2f} s" + (f", {rate:.1f} tokens/s" if rate else "")


def _size(number_of_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number_of_bytes < 1024:
            return f"{number_of_bytes:.4g} {unit}"
        number_of_bytes /= 1024
    return f"{number_of_bytes:.4g} GiB"
