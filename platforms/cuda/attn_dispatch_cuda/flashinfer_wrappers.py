"""FlashInfer's wrappers: made, leased to batches and given back; and the memory that those of a stream share.

A wrapper has one plan, in 8 MB of its own on the device, copied there from 8 MB of pinned memory of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import flashinfer
import torch

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import is_quantised

from .flashinfer_mixed import mixed_bytes

__all__ = [
    "Kind",
    "Workspace",
    "Wrapper",
    "WrapperKey",
    "decode_on_tensor_cores",
    "forget",
    "workspace_of",
]

Kind = Literal["decode", "prefill", "mixed", "ragged"]

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends; zeroed, as its first use wants it."""


class WrapperKey(NamedTuple):
    """What a wrapper is made for; batches with equal keys may lease the same one, unless it has buffers that stay.

    `kind`: see `flashinfer_call.Part`; `kernels`: `auto`, `fa2` or `fa3`; `room`: of a fixed plan, how many sequences
    and pages its buffers have room for.
    """

    kind: Kind
    spec: AttentionSpec
    layout: str
    kernels: str
    room: tuple[int, int] | None = None


def decode_on_tensor_cores(spec: AttentionSpec) -> bool:
    """Whether decodes go over tensor cores: a group of several heads fills a tile of theirs.

    FlashInfer's CUDA-core kernel is compiled for few group sizes, and reads keys once for each head of a group.
    """
    return spec.group_size not in (1, 2)


class Wrapper:
    """A wrapper of FlashInfer's that may be planned again and again, by a host that is ahead of the device."""

    def __init__(self, key: WrapperKey, workspace: Workspace) -> None:
        self._key, self._workspace = key, workspace
        self._copied: Any = None
        self._make()

    def _make(self) -> None:
        self._memory = self._workspace.memory
        self._vendor = _make(self._key, self._memory)
        self.run = self._vendor.run

    @property
    def idle(self) -> bool:
        """Whether its pinned memory has been read, so that planning need not wait."""
        return self._copied is None or bool(self._copied.query())

    def plan(self, *arguments: Any, **named: Any) -> None:
        """Plan a batch. Waits until the device has read the last plan, which lies in the same pinned memory."""
        if self._copied is not None:
            self._copied.synchronize()
        with self._workspace.running():
            try:
                self._vendor.plan(*arguments, **named)
            except Exception:
                if not hasattr(self._vendor, "workspace_size"):
                    raise
                needed = self._vendor.workspace_size(*arguments, **named)[0]
                if needed <= self._memory.numel():
                    raise
                self._workspace.grow(needed)
                self._make()
                self._vendor.plan(*arguments, **named)
            self._copied = record_event(self._workspace.device)


def record_event(device: torch.device) -> Any:
    """Return an event behind what the device was given until now; None for host memory."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Workspace:
    """What the wrappers of one stream share: memory for partial results, and those that no batch has.

    Two streams have two, so that their kernels do not overwrite each other's results. Captured graphs have one of their
    own: those of a device are to be replayed one after the other.

    Attributes:
        device: where it is.
        memory: u8, at least `WORKSPACE_BYTES`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._stream = current_stream(device)
        self._free: dict[WrapperKey, list[Wrapper]] = {}
        self.grow(WORKSPACE_BYTES)

    def grow(self, size: int) -> None:
        """Have at least so many bytes; wrappers that were made before keep what they have."""
        self.memory = torch.zeros(size, dtype=torch.uint8, device=self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep other threads out, and on another stream than last time wait for what was queued there.

        A graph that is being captured waits for nothing: torch begins to capture when the device has nothing to do.
        """
        with self._lock:
            stream = current_stream(self.device)
            if stream != self._stream and not capturing(self.device):
                stream.wait_stream(self._stream)
                self._stream = stream
            yield

    def lease(self, key: WrapperKey, batch: object) -> Wrapper:
        """Return a wrapper that no living batch has, to be given back when the batch is gone."""
        with self._lock:
            if key.room is not None:
                return Wrapper(key, self)
            free = self._free.setdefault(key, [])
            at = next((i for i, wrapper in enumerate(free) if wrapper.idle), None)
            needed = _needed_bytes(key, self.device)
            if needed > self.memory.numel():
                self.grow(needed)
            wrapper = Wrapper(key, self) if at is None else free.pop(at)
            # Without the lock, in an append: this runs whenever a batch happens to be collected.
            weakref.finalize(batch, free.append, wrapper)
            return wrapper


def current_stream(device: torch.device) -> Any:
    """Return the current stream of a device; None for host memory."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def capturing(device: torch.device) -> bool:
    """Whether the current stream's work is being captured in a graph."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


_workspaces: dict[tuple[torch.device, Any], Workspace] = {}
_workspaces_lock = threading.Lock()


def workspace_of(device: torch.device, *, graphs: bool) -> Workspace:
    """Return the workspace of a device's current stream, or of its graphs, which may be replayed on any."""
    key = (device, "graphs" if graphs else current_stream(device))
    with _workspaces_lock:
        if key not in _workspaces:
            _workspaces[key] = Workspace(device)
        return _workspaces[key]


def forget(device: torch.device) -> None:
    """Drop a device's workspaces and the wrappers that no batch has."""
    with _workspaces_lock:
        for key in [key for key in _workspaces if key[0] == device]:
            del _workspaces[key]


def _needed_bytes(key: WrapperKey, device: torch.device) -> int:
    """Return how large a wrapper's workspace must be before it is planned; `plan` asks for more where it can."""
    if key.kind != "mixed":
        return 0
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return mixed_bytes(key.spec, processors)


def _make(key: WrapperKey, memory: torch.Tensor) -> Any:
    """Return a wrapper of the vendor's over a workspace's memory."""
    if key.kind == "mixed":
        mixed = flashinfer.BatchAttention(key.layout, str(memory.device))
        mixed.float_workspace_buffer = memory  # instead of 384 MiB of its own
        return mixed
    if key.kind == "ragged":
        return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(memory, "NHD", backend=key.kernels)
    buffers: dict[str, Any] = {}
    suffix = "buffer" if key.kind == "decode" else "buf"
    if key.room is not None:
        sizes = {"indptr": key.room[0] + 1, "indices": key.room[1], "last_page_len": key.room[0]}
        zeros = {name: torch.zeros(size, dtype=torch.int32, device=memory.device) for name, size in sizes.items()}
        buffers = {f"paged_kv_{name}_{suffix}": array for name, array in zeros.items()} | {"use_cuda_graph": True}
    if key.kind == "decode":
        options = {"use_tensor_cores": decode_on_tensor_cores(key.spec), "backend": "fa2"}
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(memory, key.layout, **options, **buffers)
    if key.room is not None:
        buffers["qo_indptr_buf"] = torch.zeros(key.room[0] + 1, dtype=torch.int32, device=memory.device)
    backend = "fa2" if is_quantised(key.spec.kv_cache_dtype) else key.kernels
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(memory, key.layout, backend=backend, **buffers)
