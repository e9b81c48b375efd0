"""What the compile check compiles: kernels, for layers. No vendor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from attn_dispatch.contract import AttentionSpec
from attn_dispatch_triton.tiles import SMALLEST, Tiles

__all__ = ["Row", "rows"]


@dataclass(frozen=True)
class Row:
    """One kernel for one layer.

    Attributes:
        name: unique.
        kernel: one of `compiling.KERNELS`.
        fields: of the layer.
        paged: keys are in a cache.
        rare: compiled with `--all` only.
        tiles: others than a launch would choose: of layers that the verdict refuses, so that none are chosen.
        level: the fixed maximum of `decode`; None: a running one.
    """

    name: str
    kernel: str
    fields: dict[str, Any] = field(hash=False)
    paged: bool = True
    rare: bool = False
    tiles: Tiles | None = None
    level: float | None = None

    @property
    def spec(self) -> AttentionSpec:
        """The layer: Llama's heads unless said otherwise."""
        return AttentionSpec(**{"num_heads": 32, "num_kv_heads": 8, **self.fields})


def rows() -> Iterator[Row]:
    """Yield what is compiled for every target."""
    everything = {"window": (127, 0), "logits_soft_cap": 30.0, "alibi": True, "sinks": True, "returns_lse": True}
    layers: dict[str, dict[str, Any]] = {
        "D 64 bf16 B 16": {"head_size": 64, "block_size": 16},
        "D 128 bf16 B 16": {"block_size": 16},
        "D 128 fp16 B 64": {"dtype": "float16", "block_size": 64},
        "D 256 bf16 B 32": {"head_size": 256},
        "D 512 bf16 B 32": {"head_size": 512},
        "D 128 bf16 B 16, everything": {"block_size": 16, **everything},
        "D 128 bf16, fp8 cache": {"kv_cache_dtype": "float8_e4m3fn"},
        "D 128 fp16, int8 cache": {"dtype": "float16", "kv_cache_dtype": "int8"},
        "D 128 fp32": {"dtype": "float32"},
        "D 64 bf16 B 16, one kv head": {"head_size": 64, "block_size": 16, "num_kv_heads": 1},
        "D 192 / 128 bf16 B 64": {"head_size": 192, "value_head_size": 128, "block_size": 64},
    }
    for name, fields in layers.items():
        for kernel in ("prefill", "decode"):
            yield Row(f"{kernel}, {name}", kernel, fields)
    rare: dict[str, dict[str, Any]] = {
        "D 8 fp32 B 8": {"head_size": 8, "dtype": "float32", "block_size": 8},
        "D 72 bf16 B 1": {"head_size": 72, "block_size": 1},
        "D 80 fp16 B 256": {"head_size": 80, "dtype": "float16", "block_size": 256},
        "D 33 bf16 B 17": {"head_size": 33, "block_size": 17},
        "D 128 fp16, fp8 e5m2 cache": {"dtype": "float16", "kv_cache_dtype": "float8_e5m2"},
        "D 128 fp32, fp8 cache": {"dtype": "float32", "kv_cache_dtype": "float8_e4m3fn"},
        "D 256 fp16, int8 cache": {"head_size": 256, "dtype": "float16", "kv_cache_dtype": "int8"},
        "D 64 fp32, bf16 cache": {"head_size": 64, "dtype": "float32", "kv_cache_dtype": "bfloat16"},
        "D 512 fp32": {"head_size": 512, "dtype": "float32"},
        "D 1024 bf16": {"head_size": 1024},
    }
    for name, fields in rare.items():
        for kernel in ("prefill", "decode"):
            yield Row(f"{kernel}, {name}", kernel, fields, rare=True)
    latent = {"head_size": 576, "value_head_size": 512, "num_kv_heads": 1, "block_size": 64}
    yield Row("decode, D 576 / 512 bf16 B 64, one kv head", "decode", latent)
    fixed: dict[str, dict[str, Any]] = {
        "D 128 bf16 B 16": {"block_size": 16},
        "D 128 fp16, int8 cache": {"dtype": "float16", "kv_cache_dtype": "int8"},
    }
    for name, fields in fixed.items():
        yield Row(f"decode, fixed maximum, {name}", "decode", fields, level=0.0)
    yield Row("undivided, D 128 bf16 B 16", "undivided", {"block_size": 16})
    encoder = {"head_size": 64, "kind": "encoder", "dtype": "float16", "window": (63, 64)}
    yield Row("prefill, D 64 fp16, encoder without a cache", "prefill", encoder, paged=False)
    yield Row("merge, D 128 bf16, sinks, LSE", "merge", {"sinks": True, "returns_lse": True})
    yield Row("merge, D 1024 bf16", "merge", {"head_size": 1024}, rare=True)
    yield Row("write, D 128 bf16", "write", {})
    yield Row("write, D 128 bf16, fp8 cache", "write", {"kv_cache_dtype": "float8_e4m3fn"}, rare=True)
    for kernel in ("prefill", "decode"):
        yield Row(f"{kernel}, D 2048 bf16", kernel, {"head_size": 2048}, tiles=SMALLEST)
        wide = {"head_size": 1024, "dtype": "float32"}
        yield Row(f"{kernel}, D 1024 fp32", kernel, wide, rare=True, tiles=SMALLEST)
