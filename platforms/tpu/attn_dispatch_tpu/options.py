"""What a step's program is compiled for. No vendor is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.contract import AttentionSpec

from .kernels import Kernel
from .planning import BatchShape
from .tiles import choose_tiles

__all__ = ["ProgramOptions", "program_options"]

# Interpreting a program costs by its operations: few pages to a grid step, which also takes every sequence through
# several of them.
_SIMULATED_TOKENS, _SIMULATED_PAGES = 64, 4


@dataclass(frozen=True)
class ProgramOptions:
    """All that a program is compiled for. Equal options and shapes share one.

    Attributes:
        kernel: its name.
        batch: the batch's sizes.
        heads, kv_heads, head_size, value_size: of the spec: H, K, D, Dv.
        padded_kv_heads, group, lanes: what the kernel sees.
        cache_dtype: what the pages hold.
        causal, scale, window, soft_cap: of the spec; the window counts tokens, the query's own included.
        sinks: the softmax has one.
        tile_pages, tile_queries: `tiles.Tiles`.
        simulated: how it is interpreted, or "" on a TPU.
    """

    kernel: str
    batch: BatchShape
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    padded_kv_heads: int
    group: int
    lanes: int
    cache_dtype: str
    causal: bool
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: bool
    tile_pages: int
    tile_queries: int
    simulated: str = ""

    @property
    def keeps_pages(self) -> bool:
        """Whether the kernel takes the pages and returns them, also when nothing is written."""
        return self.kernel != "ragged"


def program_options(kernel: Kernel, spec: AttentionSpec, batch: BatchShape, simulated: str = "") -> ProgramOptions:
    """Return what a batch of these layers is compiled for; the same on every generation."""
    tiles = choose_tiles(kernel.grid_step(spec), batch.pages_per_seq, batch.tokens)
    pages = tiles.pages
    if simulated:
        pages = min(pages, _SIMULATED_PAGES, max(1, _SIMULATED_TOKENS // spec.block_size))
    return ProgramOptions(
        kernel=kernel.name,
        batch=batch,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        value_size=spec.value_head_size,
        padded_kv_heads=kernel.kv_heads(spec),
        group=kernel.group(spec),
        lanes=kernel.lanes(spec),
        cache_dtype=spec.kv_cache_dtype,
        causal=spec.causal,
        scale=spec.scale,
        window=spec.window[0] + 1 if spec.window[0] >= 0 else None,
        soft_cap=spec.logits_soft_cap,
        sinks=spec.sinks,
        tile_pages=pages,
        tile_queries=tiles.queries,
        simulated=simulated,
    )
