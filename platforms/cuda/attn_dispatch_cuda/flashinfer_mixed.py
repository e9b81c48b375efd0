"""FlashInfer's `BatchAttention`: which layers' mixed batches it computes, and the workspace that it plans with.

No vendor is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_dispatch.contract import AttentionSpec

from .gpus import Capability, sm

__all__ = ["mixed_bytes", "not_by_one_kernel"]


def not_by_one_kernel(spec: AttentionSpec, capabilities: Sequence[Capability]) -> str:
    """Return why `BatchAttention` does not compute a layer's mixed batches here; empty when it does.

    It launches two blocks per processor (one for head size 256) cooperatively, without asking whether they fit: 136 KiB
    of shared memory for head sizes 128 and 256, where sm_86, sm_89 and sm_12x have 100.
    """
    if spec.kind == "encoder":
        return "BatchAttention reads pages"
    if spec.window[0] >= 0:
        return "BatchAttention has no windows"
    if spec.kv_cache_dtype != spec.dtype:
        return f"BatchAttention is tried by its authors on a cache of the layer's own type ({spec.dtype})"
    small = [sm(c) for c in capabilities if c[0] not in (9, 10, 11) and c not in ((8, 0), (8, 7))]
    return f"BatchAttention's blocks do not fit {small[0]}'s shared memory" if small else ""


def mixed_bytes(spec: AttentionSpec, processors: int) -> int:
    """Return how large a workspace `BatchAttention` plans with.

    It sets aside the most partial results that its schedule can make, which grow with the key/value heads; its own
    384 MiB are too little for 32 of them on an H200, where `plan` would fail.
    """
    blocks = processors * (1 if spec.head_size >= 256 else 2)
    splits = 4 * blocks * (128 + 16)  # rows of a tile of prefills, and of decodes
    return splits * spec.num_kv_heads * (2 * spec.value_head_size + 4) + 256
