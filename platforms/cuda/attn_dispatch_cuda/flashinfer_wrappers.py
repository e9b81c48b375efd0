"""FlashInfer's wrappers: made, leased to plans, and given back.

A wrapper owns memory (8 MB on the device, 8 MB pinned) and one plan. Plans of ours lease wrappers and give them back
when they are gone. The float workspace is one per device: a device's layers run one after the other, on one stream.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import flashinfer
import torch

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import is_quantised

from .flashinfer import decode_kernel

__all__ = ["Making", "fixed", "forget", "leased", "mark", "mixed_bytes"]

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends; zeroed, as its first use wants it."""


@dataclass(frozen=True)
class Making:
    """What a wrapper is made for; equal ones share wrappers.

    Attributes:
        kind: which: "ragged" for keys outside of a cache, "mixed" is `BatchAttention`.
        device: where it runs.
        spec: the layers.
        layout: of the cache.
        kernels: `auto`, `fa2` or `fa3`.
    """

    kind: Literal["decode", "prefill", "mixed", "ragged"]
    device: torch.device
    spec: AttentionSpec
    layout: str
    kernels: str

    @property
    def backend(self) -> str:
        """The prefill kernels, of a cache."""
        return "fa2" if is_quantised(self.spec.kv_cache_dtype) else self.kernels


_lock = threading.Lock()
_workspaces: dict[torch.device, torch.Tensor] = {}
_mixed_workspaces: dict[torch.device, torch.Tensor] = {}
_free: dict[Making, list[Any]] = {}
_planned_at: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def workspace(device: torch.device) -> torch.Tensor:
    """Return the device's workspace, made once."""
    with _lock:
        found = _workspaces.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return found


def mixed_bytes(spec: AttentionSpec, processors: int) -> int:
    """Return how large a float workspace `BatchAttention` plans with.

    It sets aside the most partial results that its schedule can make, which grow with the key/value heads; its own
    384 MiB are too little for 32 of them on an H200, where `plan` would fail.

    Args:
        spec: the layers.
        processors: of the GPU.
    """
    blocks = processors * (1 if spec.head_size >= 256 else 2)
    splits = 4 * blocks * (128 + 16)  # rows of a tile of prompts, and of decodes
    return splits * spec.num_kv_heads * (2 * spec.value_head_size + 4) + 256


def leased(made: Making, plan: object) -> Any:
    """Return a wrapper that no living plan has, to be given back when the plan is gone."""
    with _lock:
        ready = _free.setdefault(made, [])
        at = next((i for i, wrapper in enumerate(ready) if _copied(wrapper)), None)
        wrapper = None if at is None else ready.pop(at)
    if wrapper is None:
        wrapper = _new(made)
    weakref.finalize(plan, _give_back, made, wrapper)
    return wrapper


def _give_back(made: Making, wrapper: Any) -> None:
    """Without the lock: this runs whenever a step happens to be collected, also while the lock is held."""
    _free[made].append(wrapper)


def forget(device: torch.device) -> None:
    """Drop a device's workspaces and the wrappers that no plan has."""
    with _lock:
        _workspaces.pop(device, None)
        _mixed_workspaces.pop(device, None)
        for made, ready in _free.items():
            if made.device == device:
                ready.clear()


def _new(made: Making) -> Any:
    if made.kind == "mixed":
        return _batch_attention(made)
    work = workspace(made.device)
    if made.kind == "decode":
        tensor_cores = decode_kernel(made.spec.group_size)
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            work, made.layout, use_tensor_cores=tensor_cores, backend="fa2"
        )
    if made.kind == "ragged":
        return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(work, "NHD", backend=made.kernels)
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(work, made.layout, backend=made.backend)


def _batch_attention(made: Making) -> Any:
    """Return a `BatchAttention` whose float workspace is the device's: it holds nothing from one run to the next."""
    with torch.inference_mode(False):
        wrapper = flashinfer.BatchAttention(made.layout, str(made.device))
        wrapper.float_workspace_buffer = None  # 384 MiB of its own, which torch's allocator may use again
        wrapper.float_workspace_buffer = _mixed_workspace(made)
    return wrapper


def _mixed_workspace(made: Making) -> torch.Tensor:
    device = made.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    needed = mixed_bytes(made.spec, processors)
    with _lock:
        found = _mixed_workspaces.get(device)
        if found is None or found.numel() < needed:
            found = _mixed_workspaces[device] = torch.empty(needed, dtype=torch.uint8, device=device)
    return found


def fixed(made: Making, count: int, room: int) -> Any:
    """Return a wrapper whose buffers stay; it is not given back.

    Args:
        made: for decodes, or for any sequences.
        count: sequences.
        room: pages of all of them.
    """

    def zeros(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=made.device)

    work = workspace(made.device)
    if made.kind == "decode":
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            work,
            made.layout,
            use_cuda_graph=True,
            use_tensor_cores=decode_kernel(made.spec.group_size),
            paged_kv_indptr_buffer=zeros(count + 1),
            paged_kv_indices_buffer=zeros(room),
            paged_kv_last_page_len_buffer=zeros(count),
            backend="fa2",
        )
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        work,
        made.layout,
        use_cuda_graph=True,
        qo_indptr_buf=zeros(count + 1),
        paged_kv_indptr_buf=zeros(count + 1),
        paged_kv_indices_buf=zeros(room),
        paged_kv_last_page_len_buf=zeros(count),
        backend=made.backend,
    )


def mark(device: torch.device, wrapper: Any) -> None:
    """Remember when the wrapper's pinned memory will have been read: until then it cannot plan another batch."""
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record()
        _planned_at[wrapper] = event


def _copied(wrapper: Any) -> bool:
    event = _planned_at.get(wrapper)
    return event is None or bool(event.query())
