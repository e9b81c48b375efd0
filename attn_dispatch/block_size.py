"""Tokens in a block, left to the backend: FlashAttention 2 takes 256, OpenVINO 32, xFormers 64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attn_dispatch.backend import Backend
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE

__all__ = ["accepted_sizes", "common_size", "resolved"]

SIZES = (32, 16, 64, 128, 256, 8, 512, 1)
"""What a backend is asked for, the preferred first: small blocks waste less at the end of a sequence."""


def accepted_sizes(backend: Backend, spec: AttentionSpec) -> tuple[int, ...]:
    """Return the block sizes that a backend accepts for a layer, the preferred first."""
    return tuple(size for size in SIZES if backend.verdict(replace(spec, block_size=size)))


def resolved(backend: Backend, spec: AttentionSpec) -> AttentionSpec:
    """Return a spec with a block size: its own, or the first that the backend accepts (or would refuse least)."""
    if spec.has_block_size:
        return spec
    size = next(iter(accepted_sizes(backend, spec)), DEFAULT_BLOCK_SIZE)
    return replace(spec, block_size=size)


def common_size(layers: Sequence[tuple[Backend, AttentionSpec]]) -> int | None:
    """Return the first block size that every layer's backend accepts, for a pool of blocks that they share."""
    accepted = [accepted_sizes(backend, spec) for backend, spec in layers]
    return next((size for size in SIZES if all(size in sizes for sizes in accepted)), None)
